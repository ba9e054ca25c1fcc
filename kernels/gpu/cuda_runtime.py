"""The CUDA runtime's errors, and what GPUs have free; without Paddle, for processes that compute nothing on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from cuda.bindings import runtime

_BOOT = (
    "import sys; sys.path[:] = [entry for entry in sys.path if entry]; "
    "from zerokl.kernels.gpu.cuda_runtime import main; main()"
)


def check(answer: tuple[Any, ...]) -> Any:
    """The value of a call of the CUDA runtime. Raises RuntimeError naming the error if it failed."""
    if int(answer[0]) != 0:
        raise RuntimeError(f"CUDA: {answer[0].name}")
    return answer[1] if len(answer) > 1 else None


def memory(number: int = 0) -> tuple[int, int]:
    """Bytes of a GPU's memory that are free, and all. Raises RuntimeError where there is no such GPU.

    It is the calling thread's current one from then on, and the process keeps some hundred MiB there.
    """
    count = int(check(runtime.cudaGetDeviceCount()))
    if number >= count:
        raise RuntimeError(f"there is no GPU {number}: CUDA sees {count}, numbered from 0")
    check(runtime.cudaSetDevice(number))
    error, free, total = runtime.cudaMemGetInfo()
    check((error,))
    return int(free), int(total)


def memories(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """`memory` of each, asked by a process that ends at once: this one touches no GPU."""
    command = [sys.executable, "-c", _BOOT, *map(str, numbers)]
    asked = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        last_words = asked.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"memory of GPUs {list(numbers)}: {last_words.removeprefix('RuntimeError: ')}")
    return [(free, total) for free, total in json.loads(asked.stdout)]


def main() -> None:
    """Of the process that is asked; the GPUs' numbers are its arguments."""
    print(json.dumps([memory(int(number)) for number in sys.argv[1:]]))
