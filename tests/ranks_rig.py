"""Several ranks in one process: a communicator and a thread for each."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from zerokl.rollout.expert_parallel.shared_memory import SharedMemoryCommunicator

Result = TypeVar("Result")


def each(size: int, work: Callable[[int], Result]) -> list[Result]:
    """`work(rank)` of all ranks at once; their results, or the first error of the lowest rank that had one."""
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank hangs"
    for error in errors:
        if error is not None:
            raise error
    return results


@contextmanager
def communicators(size: int) -> Iterator[list[SharedMemoryCommunicator]]:
    """One end per rank, connected."""
    with tempfile.TemporaryDirectory() as folder:
        bound = [SharedMemoryCommunicator.bind(rank, size, folder) for rank in range(size)]
        ends = each(size, lambda rank: SharedMemoryCommunicator.connect(bound[rank], 10.0))
    try:
        yield ends
    finally:
        for end in ends:
            end.close()
