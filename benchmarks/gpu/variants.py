"""Op tables that an engine of ours is measured against: with the fastest products, and without log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import tokens_only
from choices import Choices
from products import Products

from zerokl.kernels.gpu import lm_head as heads
from zerokl.kernels.gpu import matmul
from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.ops import GpuOps
from zerokl.kernels.gpu.packed import Dtype, PackedGateUp, PackedLinear
from zerokl.rollout import model_runner


class FastestProducts(GpuOps):
    """Each product by the fastest candidate: its bits follow the number of rows."""

    def __init__(self, choices: Choices, wide_entries: int, dtype: Dtype) -> None:
        super().__init__(dtype=dtype)
        self._choices = choices
        device: Any = self.device
        self._products = Products(int(device.stream), device.empty, wide_entries)

    def _product(self, x: Tensor, weight: PackedLinear, dtype: str) -> Tensor:
        if weight.bias is not None or dtype != self.dtype:
            return super()._product(x, weight, dtype)
        (rows, k), n = x.shape, weight.weight.shape[0]
        out = self._step.take(rows, n)
        self._products.linear(self._choices.find("linear", rows, n, k), x, weight.weight, out)
        return out

    def swiglu_linear(self, x: Tensor, weight: PackedGateUp) -> Tensor:
        (rows, k), n = x.shape, weight.weight.shape[0]
        out = self._step.take(rows, n // 2)
        self._products.swiglu(self._choices.find("swiglu", rows, n, k), x, weight.weight, out)
        return out

    def _settle(self, hidden: Tensor, lm_head: PackedLinear, options: Tensor, out: Tensor) -> None:
        with mock.patch.object(matmul, "linear_with_tile_max", self._head_product):
            super()._settle(hidden, lm_head, options, out)

    def _head_product(self, x: Tensor, weight: Tensor, out: Tensor, tile_max: Tensor, *, tile: Any) -> None:
        (rows, k), n = x.shape, weight.shape[0]
        self._products.head(self._choices.find("head", rows, n, k), x, weight, out, tile_max, tile)


class TokensOnly(GpuOps):
    """The same tokens without log-probabilities and entropy, for rows without options at a temperature above 0."""

    def _settle(self, hidden: Tensor, lm_head: PackedLinear, options: Tensor, out: Tensor) -> None:
        rows, vocab = hidden.shape[0], lm_head.weight.shape[0]
        logits, tile_max = (
            self._step.take(rows, width, dtype="float32") for width in (vocab, heads.num_tiles(rows, vocab, self.dtype))
        )
        masses = self._step.take(rows, heads.num_chunks(vocab), dtype="int64")
        tokens_only.settle(hidden, lm_head.weight, options, logits, tile_max, masses, out)


@contextmanager
def engines_use(make_ops: Callable[[Dtype], GpuOps]) -> Iterator[None]:
    """Engines that are made inside run on these ops."""
    with mock.patch.object(model_runner, "get_ops", lambda _device, _num_threads, dtype, _number: make_ops(dtype)):
        yield
