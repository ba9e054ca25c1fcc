"""A set of tensors as a publisher of a GPU's memory finds it: looked at anew for each publication, described once.

A trainer publishes the same tensors again and again. What each says of itself is read every time, and of each
allocation the driver is asked whether it is the one of before; only where any of that differs is anything made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zerokl.weight_sync.device_descriptor import encode_layout
from zerokl.weight_sync.device_memory import DEVICE_DTYPES, DeviceMemory, StoredTensor, as_rows
from zerokl.weight_sync.errors import DeviceHandleError, ManifestError
from zerokl.weight_sync.manifest import plan_layout
from zerokl.weight_sync.tensor_spec import TensorSpec

Seen = list[tuple[str, int, tuple[int, ...], Any, bool]]
"""Of each tensor its name, address, shape, dtype as it says it, and whether it is contiguous."""
Located = tuple[int, int]
"""First address of an allocation, and bytes from there."""


@dataclass(frozen=True, eq=False)
class KnownTensors:
    """What was made of a set of tensors, for as long as it is found at the same place in the same allocations."""

    seen: Seen
    bases: list[int]
    """First addresses of the allocations, each once."""
    ids: list[int]
    """Their numbers: another allocation at the same address has another."""
    located: list[Located]
    """Of an empty tensor zeros."""
    stored: list[StoredTensor]
    specs: tuple[TensorSpec, ...]
    total_bytes: int
    """Of a buffer for them all."""
    layout: bytes


def look_at(memory: DeviceMemory, named: Sequence[tuple[str, Any]], last: KnownTensors | None) -> KnownTensors:
    """What is known of these tensors: `last`, if they are the same, or what is found of them now.

    Raises ManifestError for what cannot be published, DeviceHandleError for a tensor that is in no allocation of this
    GPU, or in more.
    """
    seen = _seen(named)
    if last is not None and seen == last.seen and _are_there(memory, last):
        return last
    described = _described(seen)
    specs, total_bytes = plan_layout(described)
    layout = encode_layout(specs, total_bytes)
    located = _located(memory, seen, specs)
    bases = _bases(memory, located, specs)
    return KnownTensors(
        seen=seen,
        bases=bases,
        ids=memory.allocation_ids(bases),
        located=located,
        stored=[as_rows(at, shape, dtype) for (_, at, *_), (_, dtype, shape) in zip(seen, described, strict=True)],
        specs=specs,
        total_bytes=total_bytes,
        layout=layout,
    )


def _seen(named: Sequence[tuple[str, Any]]) -> Seen:
    """What the tensors say of themselves: the same one may have been given other memory."""
    seen = []
    for name, tensor in named:
        if not hasattr(tensor, "data_ptr"):
            raise ManifestError(f"tensor {name!r} is a {type(tensor).__name__}, not a tensor on a GPU")
        contiguous = not hasattr(tensor, "is_contiguous") or bool(tensor.is_contiguous())
        seen.append((name, int(tensor.data_ptr()), tuple(tensor.shape), tensor.dtype, contiguous))
    return seen


def _are_there(memory: DeviceMemory, known: KnownTensors) -> bool:
    """Whether the allocations are still those."""
    try:
        return memory.allocation_ids(known.bases) == known.ids
    except RuntimeError:  # one is gone: who asks for each tensor's can say whose
        return False


def _described(seen: Seen) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor."""
    described = []
    for name, _, shape, dtype, contiguous in seen:
        word = str(dtype).rpartition(".")[2]  # "paddle.bfloat16"
        if word not in DEVICE_DTYPES:
            raise ManifestError(f"tensor {name!r} has dtype {word}; must be one of {DEVICE_DTYPES}")
        if not contiguous:
            raise ManifestError(f"tensor {name!r} is not contiguous")
        described.append((name, word, shape))
    return described


def _located(memory: DeviceMemory, seen: Seen, specs: Sequence[TensorSpec]) -> list[Located]:
    found = []
    for (_, address, *_), spec in zip(seen, specs, strict=True):
        if not spec.nbytes:
            found.append((0, 0))
            continue
        try:
            base, size = memory.allocation_of(address)
        except RuntimeError as error:
            raise DeviceHandleError(f"tensor {spec.name!r} is not in a GPU's memory: {error}") from error
        if address + spec.nbytes > base + size:
            raise DeviceHandleError(f"tensor {spec.name!r} does not lie in one allocation")
        found.append((base, address - base))
    return found


def _bases(memory: DeviceMemory, located: Sequence[Located], specs: Sequence[TensorSpec]) -> list[int]:
    """The allocations, each once; all on this GPU: kernels may not reach another's memory, which ends the process."""
    first: dict[int, str] = {}
    for spec, (base, _) in zip(specs, located, strict=True):
        if base:
            first.setdefault(base, spec.name)
    for base, name in first.items():
        if (gpu := memory.gpu_of(base)) != memory.gpu:
            raise DeviceHandleError(f"tensor {name!r} is on GPU {gpu}, but is published from GPU {memory.gpu}")
    return list(first)
