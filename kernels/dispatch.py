"""One implementation of the op table per device. An implementation is imported when it is first asked for."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.ops import AttentionSpec, KVPool, Ops

Array = TypeVar("Array")

DEVICES = ("cpu", "gpu", "reference")


class EngineOps(Ops[Array], Protocol[Array]):
    """An op table that also places the engine's long-lived arrays on its device."""

    def tensor(self, values: NDArray[np.float32]) -> Array:
        """A copy of `values` in the device's form, independent of it afterwards."""
        ...

    def kv_pool(self, num_layers: int, num_blocks: int, block_size: int, spec: AttentionSpec) -> KVPool[Array]:
        """A new pool of keys and values; see `KVPool` for the layouts."""
        ...


def get_ops(device: str = "cpu", num_threads: int | None = None) -> EngineOps[Any]:
    """The ops of a device, with buffers of their own.

    "cpu": NumPy over the C++ extension; `num_threads` is for the whole process (None: leave as is). "gpu": Paddle
    tensors over Triton kernels, needs the `gpu` extra. "reference": the definition in NumPy float64, slow. Raises
    ValueError for another name, ImportError if what the device needs is not installed: there is no fallback.
    """
    if device == "cpu":
        from zerokl.kernels.cpu.ops import CpuOps

        ops: EngineOps[Any] = CpuOps(num_threads)
        return ops
    if device == "gpu":
        from zerokl.kernels.gpu.ops import GpuOps

        return GpuOps()
    if device == "reference":
        from zerokl.kernels.reference.ops import ReferenceOps

        return ReferenceOps()
    raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
