"""Settings of the kernels, which a test may change, are the process's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from zerokl.kernels.cpu import _cpu


@pytest.fixture(autouse=True)
def restored_settings() -> Iterator[None]:
    """Threads and instruction set are after each test what they were before."""
    threads, instruction_set = _cpu.num_threads(), _cpu.instruction_set()
    yield
    _cpu.set_num_threads(threads)
    _cpu.set_instruction_set(instruction_set)
