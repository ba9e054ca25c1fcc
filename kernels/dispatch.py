"""One implementation of the op table per device. An implementation is imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.communicator import Communicator
from zerokl.kernels.ops import AttentionSpec, KVPool, Ops
from zerokl.kernels.row_stream import NamedRows, WholeTensors

Array = TypeVar("Array")

DEVICES = ("cpu", "gpu", "reference")


class WeightPacker(Protocol[Array]):
    """The part of an op table that makes a set of weights."""

    def tensor(self, values: NDArray[np.float32]) -> Array:
        """A copy of `values` in the device's form, independent of it afterwards."""
        ...

    def pack_linear(self, weights: Sequence[Array], biases: Sequence[Array | None]) -> Any:
        """See `Ops.pack_linear`."""
        ...

    def pack_gate_up(self, gate: Array, up: Array) -> Any:
        """See `Ops.pack_gate_up`."""
        ...

    def pack_experts(self, count: int, experts: Iterable[tuple[Array, Array, Array]]) -> Any:
        """See `Ops.pack_experts`."""
        ...


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


def spread_experts(ops: EngineOps[Any], group: Communicator[Any]) -> None:
    """Have `ops` run mixtures over the ranks of a group: their `moe` takes `SpreadWeights` from then on.

    Raises ValueError for ops of a device that cannot.
    """
    from zerokl.kernels.cpu.ops import CpuOps
    from zerokl.kernels.cpu.spread_experts import SpreadExperts

    if not isinstance(ops, CpuOps):
        raise ValueError(f"device must be 'cpu' where experts are on {group.size} ranks, got {type(ops).__name__}")
    ops.experts = SpreadExperts(group)


def weight_packer(ops: EngineOps[Any], tensors: Mapping[str, Any]) -> tuple[WeightPacker[Any], Mapping[str, Any]]:
    """What packs a new set of weights for `ops`, and `tensors` (arrays or RowStreams by name) in the form it takes.

    Another thread may run steps with `ops` meanwhile. A value that is not finite raises NonFiniteWeightsError when its
    tensor is read.
    """
    from zerokl.kernels.cpu.ops import CpuOps

    if type(ops) is CpuOps:  # a class made of it may pack otherwise
        return ops.packer.next_set(), NamedRows(tensors)
    return ops, WholeTensors(tensors)


def embeds_from_head(ops: EngineOps[Any]) -> bool:
    """Whether the `embedding` of `ops` takes what its packer's `pack_linear` made of a tied table."""
    from zerokl.kernels.cpu.ops import CpuOps

    return type(ops) is CpuOps  # as in weight_packer


def fill_weights(values: NDArray[np.float32], out: NDArray[Any]) -> int:
    """Write float32 [n] to float32 [n] or, rounded to nearest, ties to even, to bfloat16 patterns (uint16) [n].

    Returns the xxh3_64 of what `out` then holds. On the calling thread; takes C-contiguous arrays. It is the `fill` of
    `zerokl.weight_sync.WeightPublisher` that costs least.
    """
    from zerokl.kernels.cpu.filling import fill

    return fill(values, out)


def release_spare_weights(ops: EngineOps[Any]) -> int:
    """Give memory of dropped sets of weights, which the next set would use again, to the system; returns its bytes."""
    from zerokl.kernels.cpu.ops import CpuOps

    return ops.packer.slabs.release_spare() if isinstance(ops, CpuOps) else 0


def forget_step(ops: EngineOps[Any]) -> None:
    """Have `ops` let go of the pool and the buffers of the last step."""
    from zerokl.kernels.cpu.ops import CpuOps

    if isinstance(ops, CpuOps):
        ops.forget_step()


def host_storage(ops: EngineOps[Any]) -> Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]] | None:
    """What gives uninitialised NumPy arrays for weights of `ops`; None where its arrays are not NumPy's."""
    from zerokl.kernels.cpu.ops import CpuOps

    if not isinstance(ops, CpuOps):
        return None

    def take(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        return ops.packer.slabs.take(*shape) if dtype == np.float32 else np.empty(shape, dtype)

    return take
