"""One implementation of the op table per device. An implementation is imported when it is first asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.communicator import Communicator
from zerokl.kernels.ops import AttentionSpec, KVPool, Ops
from zerokl.kernels.row_stream import NamedRows, WholeTensors

if TYPE_CHECKING:
    from zerokl.kernels.cpu.ops import CpuOps
    from zerokl.kernels.gpu.cuda_calls import CudaCalls
    from zerokl.kernels.gpu.device_packing import DevicePacker, Place
    from zerokl.kernels.gpu.shared_memory import SharedGpuMemory

Array = TypeVar("Array")

DEVICES = ("cpu", "gpu", "reference")
DTYPES = {"cpu": ("float32",), "gpu": ("bfloat16", "float32"), "reference": ("float32",)}
"""Types of weights, keys and values by device, the default first."""

_GPU_PACKAGES = ("paddle", "triton", "cuda")


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


def get_ops(
    device: str = "cpu", num_threads: int | None = None, dtype: str | None = None, number: int = 0
) -> EngineOps[Any]:
    """The ops of a device, with buffers of their own.

    "cpu": NumPy over the C++ extension; `num_threads` is for the whole process (None: leave as is). "gpu": Paddle
    tensors over Triton kernels on the GPU of this `number`, the one of the process; needs the `gpu` extra. "reference":
    the definition in NumPy float64, slow. `dtype` is one of the device's (None: the first of `DTYPES`). Raises
    ValueError for another name, ImportError if what the device needs is not installed, RuntimeError where that GPU
    cannot be used: there is no fallback.
    """
    dtype = resolve_dtype(device, dtype)
    if device == "cpu":
        from zerokl.kernels.cpu.ops import CpuOps

        ops: EngineOps[Any] = CpuOps(num_threads)
        return ops
    if device == "gpu":
        require_gpu_packages()
        from zerokl.kernels.gpu.ops import GpuOps

        return GpuOps(dtype=dtype, number=number)  # type: ignore[arg-type]
    from zerokl.kernels.reference.ops import ReferenceOps

    return ReferenceOps()


def resolve_dtype(device: str, dtype: str | None) -> str:
    """`dtype`, or the device's default for None. Raises ValueError for a device or a type that there is not."""
    if device not in DTYPES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if dtype is None:
        return DTYPES[device][0]
    if dtype not in DTYPES[device]:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES[device])} on device {device!r}, got {dtype!r}")
    return dtype


def require_gpu_packages() -> None:
    """Raise ImportError naming the packages that device "gpu" needs and that are not installed."""
    missing = [name for name in _GPU_PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(f"device 'gpu' needs `pip install zerokl[gpu]`; not installed: {', '.join(missing)}")


def gpu_memory(number: int = 0) -> tuple[int, int]:
    """Bytes of a GPU's memory that are free, and all.

    Raises ImportError as `get_ops`, RuntimeError where there is no usable GPU of this number.
    """
    require_gpu_packages()
    from zerokl.kernels.gpu.paddle_device import memory

    return memory(number)


def gpu_memories(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """`gpu_memory` of several GPUs, which this process does not touch: another one asks, and ends."""
    require_gpu_packages()
    from zerokl.kernels.gpu.cuda_runtime import memories

    return memories(numbers)


def spread_experts(ops: EngineOps[Any], group: Communicator[Any]) -> None:
    """Have `ops` run mixtures over the ranks of a group: their `moe` takes `SpreadWeights` from then on.

    Raises ValueError for ops of a device that cannot.
    """
    cpu = _as_cpu_ops(ops)
    if cpu is None:
        raise ValueError(f"device must be 'cpu' where experts are on {group.size} ranks, got {type(ops).__name__}")
    from zerokl.kernels.cpu.spread_experts import SpreadExperts

    cpu.experts = SpreadExperts(group)


def weight_packer(ops: EngineOps[Any], tensors: Mapping[str, Any]) -> tuple[WeightPacker[Any], Mapping[str, Any]]:
    """What packs a new set of weights for `ops`, and `tensors` (arrays or RowStreams by name) in the form it takes.

    Another thread may run steps with `ops` meanwhile. A value that is not finite raises NonFiniteWeightsError when its
    tensor is read.
    """
    cpu = _as_cpu_ops(ops)
    if cpu is not None and embeds_from_head(ops):
        return cpu.packer.next_set(), NamedRows(tensors)
    return ops, WholeTensors(tensors, patterns=getattr(ops, "takes_patterns", False))


def device_memory(device: str = "gpu", number: int | None = None) -> SharedGpuMemory:
    """A GPU's memory for weights that other processes share: what `zerokl.weight_sync.DevicePublisher` asks for.

    `number` is the one GPU that this process computes on; None: Paddle's current one.

    Raises ValueError for another device, ImportError as `get_ops`, RuntimeError where there is no usable GPU of this
    number.
    """
    if device != "gpu":
        raise ValueError(f"device must be 'gpu' for weights in a GPU's memory, got {device!r}")
    require_gpu_packages()
    from zerokl.kernels.gpu.shared_memory import shared_gpu_memory

    return shared_gpu_memory(number)


def device_reader(number: int = 0) -> CudaCalls:
    """What maps other processes' memory on a GPU and copies it to the host; computes nothing.

    Raises as `gpu_memory`.
    """
    require_gpu_packages()
    from zerokl.kernels.gpu.cuda_calls import CudaCalls

    return CudaCalls(number)


def device_packer(ops: EngineOps[Any], place: Place) -> DevicePacker:
    """What packs a new set of weights of `ops`, on a GPU, from `zerokl.kernels.device_tensors.DeviceTensors`; `place`
    copies them.
    """
    from zerokl.kernels.gpu.device_packing import DevicePacker

    gpu: Any = ops
    return DevicePacker(gpu.slots, gpu.dtype, place)


def embeds_from_head(ops: EngineOps[Any]) -> bool:
    """Whether the `embedding` of `ops` takes what its packer's `pack_linear` made of a tied table."""
    # A class made of it may pack otherwise; its module, which needs the extension, need not be there.
    return _as_cpu_ops(ops) is not None and type(ops).__name__ == "CpuOps"


def fill_weights(values: NDArray[np.float32], out: NDArray[Any]) -> int:
    """Write float32 [n] to float32 [n] or, rounded to nearest, ties to even, to bfloat16 patterns (uint16) [n].

    Returns the xxh3_64 of what `out` then holds. On the calling thread; takes C-contiguous arrays. It is the `fill` of
    `zerokl.weight_sync.WeightPublisher` that costs least.
    """
    from zerokl.kernels.cpu.filling import fill

    return fill(values, out)


def release_spare_weights(ops: EngineOps[Any]) -> int:
    """Give up the memory of dropped sets of weights, which the next set would use again.

    On the CPU it goes back to the system; returns its bytes there, else 0.
    """
    slots = getattr(ops, "slots", None)  # a GPU's
    if slots is not None:
        slots.release_spare()
    cpu = _as_cpu_ops(ops)
    return 0 if cpu is None else cpu.packer.slabs.release_spare()


def forget_step(ops: EngineOps[Any]) -> None:
    """Have `ops` let go of the pool and the buffers of the last step."""
    forget = getattr(ops, "forget_step", None)  # the reference has none
    if forget is not None:
        forget()


def host_storage(ops: EngineOps[Any]) -> Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]] | None:
    """What gives uninitialised NumPy arrays for weights of `ops`; None where its arrays are not NumPy's."""
    cpu = _as_cpu_ops(ops)
    if cpu is None:
        return None
    slabs = cpu.packer.slabs

    def take(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        return slabs.take(*shape) if dtype == np.float32 else np.empty(shape, dtype)

    return take


def _as_cpu_ops(ops: EngineOps[Any]) -> CpuOps | None:
    """`ops` if they are those of the CPU, whose extension other devices do without."""
    module = sys.modules.get("zerokl.kernels.cpu.ops")
    return ops if module is not None and isinstance(ops, module.CpuOps) else None
