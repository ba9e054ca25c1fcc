# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""Packs weights that are on the GPU already: bit for bit the operands that `HostPacker` makes of arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import triton
import triton.language as tl

from zerokl.kernels.gpu.device import Device
from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.matmul import dtype_of
from zerokl.kernels.gpu.packed import Dtype, PackedExperts, PackedGateUp, PackedLinear, dtype_of_shape

_BLOCK = 1024


@triton.jit(do_not_specialize=["first", "stride", "width"])
def place_kernel(
    source_ptr, out_ptr, first, stride, width, ZERO: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr
):
    """Row r of source [rows, width] goes to the entries of `out` from first + r * stride on; zeros with ZERO.

    ROUND: to the nearest bfloat16 value, ties to even, whatever the type of `out`.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if ZERO:
        x = tl.zeros((BLOCK,), tl.float32)
    else:
        x = tl.load(source_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if ROUND:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16 << 16
        x = bits.to(tl.float32, bitcast=True)
    tl.store(out_ptr + first + row * stride + column, x.to(out_ptr.dtype.element_ty), mask=inside)


class ParameterPacker:
    """`HostPacker` for float32 tensors on the device of a `GpuOps`. Launches copies on the stream of its steps.

    What needs no other form is shared with the tensor that was given, not copied.
    """

    def __init__(self, device: Device, dtype: Dtype, *, rounds: bool = False) -> None:
        """`dtype`: of matrices, as of `GpuOps`. `rounds`: every value becomes the nearest bfloat16 value first."""
        self._device = device
        self._dtype = dtype
        self._rounds = rounds

    def tensor(self, values: Tensor) -> Tensor:
        """See `HostPacker.tensor`."""
        return self._joined([values], list(values.shape), dtype_of_shape(values.shape, self._dtype))

    def pack_linear(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> PackedLinear:
        """See `HostPacker.pack_linear`."""
        bias = None
        if any(part is not None for part in biases):
            sizes = [weight.shape[0] for weight in weights]
            bias = self._joined(biases, [sum(sizes)], "float32", sizes)
        return PackedLinear(self._matrix(weights), bias)

    def pack_gate_up(self, gate: Tensor, up: Tensor) -> PackedGateUp:
        """See `HostPacker.pack_gate_up`."""
        rows, width = gate.shape
        out = self._device.empty([2 * rows, width], self._dtype)
        self._place_in_turn(gate, up, out, 0)
        return PackedGateUp(out)

    def pack_experts(self, count: int, experts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> PackedExperts:
        """See `HostPacker.pack_experts`."""
        gate_up = down = None
        for number, (gate, up, back) in enumerate(experts):
            rows, width = gate.shape
            if gate_up is None:
                gate_up = self._device.empty([count, 2 * rows, width], self._dtype)
                down = self._device.empty([count, width, rows], self._dtype)
            self._place_in_turn(gate, up, gate_up, number * 2 * rows * width)
            self._place(back, down, number * rows * width, rows)
        assert number == count - 1, f"{count} experts were promised, {number + 1} came"
        return PackedExperts(gate_up, down)

    def _matrix(self, parts: Sequence[Tensor]) -> Tensor:
        """On top of each other."""
        rows, width = sum(part.shape[0] for part in parts), parts[0].shape[1]
        return self._joined(parts, [rows, width], self._dtype)

    def _joined(
        self, parts: Sequence[Tensor | None], shape: Sequence[int], dtype: str, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """One after the other; parts that are None have zeros, as many as `sizes` says."""
        if len(parts) == 1 and not self._changes(parts[0], dtype):
            return parts[0]
        out = self._device.empty(shape, dtype)
        if sizes is None:
            sizes = [part.shape[0] * part.shape[1] if len(part.shape) == 2 else part.shape[0] for part in parts]
        for part, size, end in zip(parts, sizes, accumulate(sizes), strict=True):
            rows, width = (1, size) if part is None or len(part.shape) == 1 else part.shape
            self._place(part, out, end - size, width, rows=rows)
        return out

    def _changes(self, tensor: Tensor, dtype: str) -> bool:
        """Whether the tensor's values are not yet what `dtype` and rounding make of them."""
        return dtype_of(tensor) != dtype or (self._rounds and dtype == "float32")

    def _place_in_turn(self, gate: Tensor, up: Tensor, out: Tensor, first: int) -> None:
        width = gate.shape[1]
        self._place(gate, out, first, width, stride=2 * width)
        self._place(up, out, first + width, width, stride=2 * width)

    def _place(
        self, source: Tensor | None, out: Tensor, first: int, width: int, *, rows: int = 0, stride: int = 0
    ) -> None:
        """Rows of `width` entries to `out` from entry `first` on, `stride` (0: width) apart; None stands for zeros."""
        rounds = self._rounds or dtype_of(out) == "bfloat16"
        place_kernel[(rows or source.shape[0], triton.cdiv(width, _BLOCK))](
            out if source is None else source, out, first, stride or width, width, ZERO=source is None, ROUND=rounds,
            BLOCK=_BLOCK,
        )  # fmt: skip
