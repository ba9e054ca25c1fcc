"""A `rollout-server` as a process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def server_process(
    model: Path, endpoint: str, *options: str, program: Sequence[str] = ("-m", "zerokl.rollout.server.main")
) -> Iterator[subprocess.Popen[str]]:
    """A `rollout-server` that says that it serves; killed if the test leaves it running.

    `program`: what Python is given to run it.
    """
    command = [sys.executable, *program, "--model", str(model), "--bind", endpoint]
    command += ["--set", "num_blocks=256", "--set", "block_size=8", "--set", "num_threads=1", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as server:  # a group of its own
        try:
            yield server
        finally:
            server.kill()


def address_of(server: subprocess.Popen[str]) -> str:
    """Where it says that it serves; the lines before are passed over."""
    assert server.stdout is not None
    line = server.stdout.readline()
    while line and not line.startswith("serving "):
        line = server.stdout.readline()
    return line.split()[-1]
