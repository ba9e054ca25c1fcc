"""`rollout-server` with one breach of its promises, which a chaos run must find.

python breached_server.py BREACH OPTIONS...
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.server import dispatcher
from zerokl.rollout.server.main import main
from zerokl.weight_sync.segments import OwnedSegment

_FORGOTTEN: list[OwnedSegment] = []
_DROPPED = "1-1-0"
"""A request of the call whose answer is lost: the first one of traffic client 1."""


def drops_an_answer() -> None:
    """One call is done and never answered."""
    complete = dispatcher.Dispatcher.complete

    def lossy(self: dispatcher.Dispatcher, call: Any, outcome: Any) -> None:
        if _DROPPED in call.request_ids:
            call.is_answered = True
        complete(self, call, outcome)

    dispatcher.Dispatcher.complete = lossy  # type: ignore[method-assign]


def leaks_a_segment() -> None:
    """Shared memory outlives the server."""
    _FORGOTTEN.append(OwnedSegment("forgotten", 4096))
    _FORGOTTEN[0]._finalizer.detach()


def leaks_a_process() -> None:
    """A child outlives the server."""
    subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.pause()"],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def keeps_computed_tokens() -> None:
    """Requests of a rank that is started anew go on as if their keys and values were still there."""
    Scheduler.lose_ranks = lambda self, ranks: None  # type: ignore[method-assign]


BREACHES: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (drops_an_answer, leaks_a_segment, leaks_a_process, keeps_computed_tokens)
}


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        BREACHES[name]()
    sys.exit(main(sys.argv[2:]))
