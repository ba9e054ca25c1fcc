"""The op table on Paddle's GPU tensors: float32, by plain Triton kernels.

One copy to the device opens a step (`begin_step`: metadata and sampling options together), one copy back closes it
(end of `sample`); nothing between waits for the host. Rows are padded to the step's bucket; what padding rows hold is
arbitrary.
Paddle serves memory and copies alone: no Paddle operator computes anything here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import triton
from numpy.typing import NDArray

from zerokl.kernels.gpu import attention, driver, elementwise, linear, sampling
from zerokl.kernels.gpu.step_arrays import StepLayout, lay_out
from zerokl.kernels.ops import KV_SPLIT, AttentionSpec, KVPool, LayerParams, SampleResult, SamplingBatch, StepInputs

Tensor = Any  # paddle.Tensor; Paddle's annotations do not cover what is used here

_VOCAB_BLOCK = 1024  # the fixed partition of a row of logits
_ENTRY_BLOCK = 64
_TILE = {"BLOCK_M": linear.BLOCK_M, "BLOCK_N": linear.BLOCK_N, "BLOCK_K": linear.BLOCK_K}


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """Matrices on top of each other, [N, K], and their biases [N]."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class PackedGateUp:
    """The two input matrices of a SwiGLU block, [F, E] each."""

    gate: Tensor
    up: Tensor


class GpuOps:
    """`zerokl.kernels.ops.Ops[paddle.Tensor]` on one GPU. Weights are given as NumPy arrays.

    Results live in buffers found by their place in the order of the step's calls: no op of a step writes what an
    earlier one returned, and a later step with the same shapes has the same addresses. Not for several threads.
    Raises RuntimeError where there is no usable GPU.
    """

    def __init__(self, device: int = 0) -> None:
        self._place = driver.activate(device)
        self._buffers: dict[tuple[int, tuple[int, ...], str], Tensor] = {}
        self._calls = 0
        self._inputs: StepInputs | None = None
        self._layout: StepLayout | None = None
        self._sections: dict[str, Tensor] = {}
        self._bucket_arrays: dict[tuple[tuple[str, int], ...], Tensor] = {}
        self._pool: KVPool[Tensor] | None = None

    # -- placement -----------------------------------------------------------------------------------------------------
    def tensor(self, values: NDArray[np.float32]) -> Tensor:
        """A float32 copy of `values` on the device."""
        return paddle.to_tensor(np.ascontiguousarray(values, np.float32), place=self._place)

    def kv_pool(self, num_layers: int, num_blocks: int, block_size: int, spec: AttentionSpec) -> KVPool[Tensor]:
        """An uninitialised pool; nothing is read before it was written."""
        heads, size = spec.num_kv_heads, spec.head_dim
        return KVPool(
            keys=paddle.empty([num_layers, num_blocks, heads, size, block_size], "float32"),
            values=paddle.empty([num_layers, num_blocks, heads, block_size, size], "float32"),
            block_size=block_size,
        )

    def _take(self, *shape: int, dtype: str = "float32") -> Tensor:
        key = (self._calls, shape, dtype)
        self._calls += 1
        if key not in self._buffers:
            self._buffers[key] = paddle.empty(list(shape), dtype)
        return self._buffers[key]

    # -- packing -------------------------------------------------------------------------------------------------------
    def pack_linear(self, weights: Sequence[Any], biases: Sequence[Any]) -> PackedLinear:
        """See `Ops.pack_linear`. A missing bias beside a present one counts as zeros.

        A single matrix that is on the device already (the embedding of a tied model) is shared, not copied.
        """
        if len(weights) == 1 and not isinstance(weights[0], np.ndarray):
            assert biases[0] is None
            return PackedLinear(weights[0], None)
        bias = None
        if any(part is not None for part in biases):
            parts = [np.zeros(len(w), np.float32) if b is None else b for w, b in zip(weights, biases, strict=True)]
            bias = self.tensor(np.concatenate(parts))
        return PackedLinear(self.tensor(np.concatenate(weights)), bias)

    def pack_gate_up(self, gate: Any, up: Any) -> PackedGateUp:
        """See `Ops.pack_gate_up`."""
        return PackedGateUp(self.tensor(gate), self.tensor(up))

    def pack_experts(self, count: int, experts: Any) -> Any:
        """Not available: raises NotImplementedError, so that a mixture of experts fails when it is loaded."""
        raise NotImplementedError("mixtures of experts run on the CPU only (device='cpu')")

    def route(self, x: Any, params: Any, spec: Any) -> Any:
        """Not available, as `pack_experts`."""
        raise NotImplementedError("mixtures of experts run on the CPU only (device='cpu')")

    def moe(self, x: Any, routing: Any, experts: Any, shared: Any) -> Any:
        """Not available, as `pack_experts`."""
        raise NotImplementedError("mixtures of experts run on the CPU only (device='cpu')")

    # -- a step --------------------------------------------------------------------------------------------------------
    def begin_step(self, inputs: StepInputs, pool: KVPool[Tensor]) -> None:
        """See `Ops.begin_step`. Waits for the step before, whose arrays it overwrites."""
        self._inputs, self._pool, self._calls = inputs, pool, 0
        self._layout = layout = self._lay_out(inputs)
        paddle.device.cuda.synchronize()
        staged = paddle.to_tensor(layout.flat, place=self._place)
        # Into the bucket's own array, at an address that a recorded step may keep.
        count = layout.flat.size
        flat = self._bucket_arrays.setdefault(layout.key(), staged)
        if flat is not staged:
            _launch(sampling.copy_kernel, (triton.cdiv(count, _VOCAB_BLOCK),), staged, flat, count, BLOCK=_VOCAB_BLOCK)
            paddle.device.cuda.synchronize()
        self._sections = {name: flat[section] for name, section in layout.sections.items()}

    def _lay_out(self, inputs: StepInputs) -> StepLayout:
        return lay_out(inputs)

    # -- ops -----------------------------------------------------------------------------------------------------------
    def embedding(self, token_ids: NDArray[np.int32], table: Tensor) -> Tensor:
        """Rows of the table: [T] -> [T, E]."""
        assert self._inputs is not None and self._layout is not None and token_ids is self._inputs.token_ids
        return self._rows_of(table, "token_ids", self._layout.num_tokens)

    def gather_rows(self, x: Tensor, rows: NDArray[np.int32]) -> Tensor:
        """Some rows of x: [T, E], [R] -> [R, E]."""
        assert self._inputs is not None and self._layout is not None and rows is self._inputs.logit_rows
        return self._rows_of(x, "rows", self._layout.num_rows)

    def _rows_of(self, table: Tensor, section: str, count: int, dtype: str = "float32") -> Tensor:
        width = table.shape[1]
        out = self._take(count, width, dtype=dtype)
        _launch(
            elementwise.embedding_kernel, (count,), self._sections[section], table, out,
            WIDTH=width, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        rows, width = x.shape
        out = self._take(rows, width)
        _launch(
            elementwise.rms_norm_kernel, (rows,), x, weight, out, eps,
            WIDTH=width, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        return out

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Ops.add_rms_norm`; the sum takes the place of `residual`."""
        rows, width = residual.shape
        out = self._take(rows, width)
        _launch(
            elementwise.add_rms_norm_kernel, (rows,), residual, delta, weight, out, eps,
            WIDTH=width, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        return residual, out

    def linear(self, x: Tensor, weight: PackedLinear) -> Tensor:
        """[T, K] -> [T, sum N_i], biases added."""
        (rows, k), n = x.shape, weight.weight.shape[0]
        out = self._take(rows, n)
        grid = (triton.cdiv(rows, linear.BLOCK_M), triton.cdiv(n, linear.BLOCK_N))
        bias = weight.weight if weight.bias is None else weight.bias
        _launch(
            linear.linear_kernel, grid, x, weight.weight, bias, out, rows, n,
            K=k, HAS_BIAS=weight.bias is not None, **_TILE,
        )  # fmt: skip
        return out

    qkv_linear = linear

    def swiglu_linear(self, x: Tensor, weight: PackedGateUp) -> Tensor:
        """See `Ops.swiglu_linear`: [T, E] -> [T, F]."""
        (rows, k), n = x.shape, weight.gate.shape[0]
        out = self._take(rows, n)
        grid = (triton.cdiv(rows, linear.BLOCK_M), triton.cdiv(n, linear.BLOCK_N))
        _launch(linear.swiglu_linear_kernel, grid, x, weight.gate, weight.up, out, rows, n, K=k, **_TILE)
        return out

    def attention(
        self, qkv: Tensor, layer: int, params: LayerParams[Tensor], rope: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `Ops.attention`."""
        assert self._pool is not None and self._layout is not None, "attention before begin_step"
        pool, at = self._pool, self._sections
        tokens, heads, size = qkv.shape[0], spec.num_heads, spec.head_dim
        query, out = self._take(tokens, heads * size), self._take(tokens, heads * size)
        first_block = layer * pool.keys.shape[1]
        sizes = {"HEADS": heads, "KV_HEADS": spec.num_kv_heads, "SIZE": size, "BLOCK_SIZE": pool.block_size}
        q_norm = qkv if params.q_norm is None else params.q_norm
        k_norm = qkv if params.k_norm is None else params.k_norm
        _launch(
            attention.qkv_to_cache_kernel, (tokens, heads + 2 * spec.num_kv_heads),
            qkv, q_norm, k_norm, spec.norm_eps, at["positions"], rope, at["slots"],
            pool.keys, pool.values, query, first_block,
            HALF_BLOCK=triton.next_power_of_2(size // 2), INTERLEAVED=spec.rotary_layout == "interleaved",
            HAS_NORM=params.q_norm is not None, **sizes,
        )  # fmt: skip
        _launch(
            attention.attention_kernel, (tokens, heads),
            query, pool.keys, pool.values, at["tables"], at["positions"], at["sequences"], out,
            spec.scale, first_block, self._layout.max_blocks,
            SIZE_BLOCK=triton.next_power_of_2(size), SPLIT=KV_SPLIT, **sizes,
        )  # fmt: skip
        return out

    def sample(self, hidden: Tensor, lm_head: PackedLinear, batch: SamplingBatch) -> SampleResult:
        """See `Ops.sample`; `batch` is the step's. A row whose logits are not all finite gets token -1."""
        assert self._inputs is not None and batch is self._inputs.sampling
        logits = self._logits(hidden, lm_head)
        rows, vocab = logits.shape
        processed = self._take(rows, vocab)
        out = self._take(rows, int(sampling.NUM_RESULTS), dtype="int32")
        at = self._sections
        _launch(
            sampling.copy_kernel, (triton.cdiv(rows * vocab, _VOCAB_BLOCK),), logits, processed, rows * vocab,
            BLOCK=_VOCAB_BLOCK,
        )  # fmt: skip
        _launch(
            sampling.bias_kernel, (rows,), processed, at["bias_start"], at["bias_token"], at["bias_value"], vocab,
            BLOCK=_ENTRY_BLOCK,
        )  # fmt: skip
        _launch(
            sampling.penalty_kernel, (rows,), processed, at["options"],
            at["history_start"], at["history_token"], at["history_count"], vocab, BLOCK=_ENTRY_BLOCK,
        )  # fmt: skip
        _launch(
            sampling.sample_kernel, (rows,), logits, processed, at["options"], out, vocab,
            BLOCK=_VOCAB_BLOCK, CHUNKS=triton.next_power_of_2(triton.cdiv(vocab, _VOCAB_BLOCK)),
        )  # fmt: skip
        paddle.device.cuda.synchronize()
        return sample_result(out.numpy()[: len(batch.forced)], batch.want_raw)

    def _logits(self, hidden: Tensor, lm_head: PackedLinear) -> Tensor:
        return self.linear(hidden, lm_head)


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    kernel[grid](*args, enable_fp_fusion=False, **options)


def sample_result(columns: NDArray[np.int32], want_raw: bool) -> SampleResult:
    """Results [R, NUM_RESULTS] of the sampling kernels as fresh arrays."""
    floats = columns.view(np.float32)
    return SampleResult(
        tokens=columns[:, int(sampling.TOKEN)].copy(),
        logprobs=floats[:, int(sampling.LOGPROB)].copy(),
        policy_logprobs=floats[:, int(sampling.POLICY_LOGPROB)].copy(),
        entropy=floats[:, int(sampling.ENTROPY)].copy(),
        raw_logprobs=floats[:, int(sampling.RAW_LOGPROB)].copy() if want_raw else None,
    )
