"""The life of a worker's process, in a thread of its own from the first: signs of life, and an end with its parent.

It imports little, so that it begins long before the worker does.
"""

from __future__ import annotations

import os
import select
import shutil
import sys
import threading
from contextlib import suppress
from pathlib import Path

HEARTBEAT_SECONDS = 0.2
"""How often there is a sign of life."""


def begin() -> None:
    """Start the thread; arguments of the process: sockets' folder, rank, parent's pid, pipe for signs of life."""
    folder, parent, heartbeat = Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4])
    threading.Thread(target=_live, args=(folder, parent, heartbeat), name="zerokl-life", daemon=True).start()


def _live(folder: Path, parent: int, heartbeat: int) -> None:
    """Give signs of life until the parent's death; then clean up what it cannot any more, and end this process.

    (PR_SET_PDEATHSIG would not do: it fires when the *thread* that started this process ends.)
    """
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        descriptor = None
    # The parent may have died, and its pid may belong to another process, before the descriptor was opened.
    if descriptor is not None and os.getppid() == parent:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        os.set_blocking(heartbeat, False)
        beating = True
        while beating:
            with suppress(BlockingIOError, BrokenPipeError):  # nobody reads, and the pipe is full; the parent is ending
                os.write(heartbeat, b".")
            beating = not poll.poll(1000 * HEARTBEAT_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
