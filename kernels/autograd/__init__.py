"""Differentiable twins of the CPU ops: Paddle PyLayers whose forwards are the engine's own C++ kernels.

A forward pass built from `AutogradOps` gives the same bits as the engine's `CpuOps`, and Paddle's autograd can
differentiate it. Importing a name from here imports Paddle and the C++ extension; importing the package does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerokl.kernels.autograd.lm_head import lm_head_logprobs as lm_head_logprobs
    from zerokl.kernels.autograd.ops import AutogradOps as AutogradOps

_MODULE_OF = {
    "AutogradOps": "zerokl.kernels.autograd.ops",
    "lm_head_logprobs": "zerokl.kernels.autograd.lm_head",
}
__all__ = ["AutogradOps", "lm_head_logprobs"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
