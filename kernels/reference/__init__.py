"""The definition of every op: NumPy float64, written to be read and compared with, not to be fast.

Importing this package loads nothing; each name comes from its module on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerokl.kernels.reference.ops import ReferenceOps as ReferenceOps

_MODULE_OF = {"ReferenceOps": "zerokl.kernels.reference.ops"}
__all__ = ["ReferenceOps"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
