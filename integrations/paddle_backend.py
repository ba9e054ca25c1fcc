"""Finding Paddle, and saying plainly which extra is missing or which installed packages do not go together.

pip cannot make two extras exclude each other, so what it lets through is checked here, before Paddle is imported.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

CPU_PACKAGE = "paddlepaddle"
GPU_PACKAGE = "paddlepaddle-gpu"


def import_paddle() -> Any:
    """The `paddle` module. Raises ImportError saying what to install or remove when the installation is not usable."""
    check_installation()
    return import_module("paddle")


def check_installation() -> None:
    """Raise ImportError if Paddle is absent, installed twice, or of a release that the installed NumPy breaks."""
    cpu, gpu = _version(CPU_PACKAGE), _version(GPU_PACKAGE)
    if cpu is not None and gpu is not None:
        raise ImportError(
            f"{CPU_PACKAGE} {cpu} and {GPU_PACKAGE} {gpu} are both installed and overwrite each other's files: remove "
            f"both (pip uninstall {CPU_PACKAGE} {GPU_PACKAGE}), then install one of zerokl[cpu] and zerokl[gpu]"
        )
    paddle = cpu if gpu is None else gpu
    if paddle is None:
        raise ImportError(
            "the trainer side of ZeroKL needs Paddle, which is not installed: pip install zerokl[cpu] for "
            f"{CPU_PACKAGE}, or pip install zerokl[gpu] for {GPU_PACKAGE}"
        )
    numpy = metadata.version("numpy")
    if _major(paddle) < 3 and _major(numpy) >= 2:
        raise ImportError(
            f"{CPU_PACKAGE if gpu is None else GPU_PACKAGE} {paddle} was built for NumPy 1 and breaks under NumPy "
            f'{numpy}: pip install "numpy<2", or Paddle 3.0 or later'
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _major(version: str) -> int:
    return int(version.split(".")[0])
