"""`AutogradOps`: the op table for a trainer on the CPU, where every op is differentiable and returns a fresh tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from numpy.typing import NDArray

from zerokl.kernels.autograd.arrays import Floats, array_of, read
from zerokl.kernels.autograd.attention import Attention, AttentionCall
from zerokl.kernels.autograd.elementwise import AddRMSNorm, Embedding, GatherRows, RMSNorm, Rope
from zerokl.kernels.autograd.linear import FusedLinear, SwiGLULinear
from zerokl.kernels.autograd.lm_head import DEFAULT_CHUNK_ROWS, lm_head_logprobs, sample_logits
from zerokl.kernels.cpu import _cpu
from zerokl.kernels.ops import AttentionSpec, KVPool, LayerParams, SampleResult, SamplingBatch, StepInputs

Tensor = paddle.Tensor
BLOCK_SIZE = 64
"""Of the scratch KV pool; no result depends on it."""


@dataclass(frozen=True, slots=True)
class LinearParameters:
    """Matrices [N_i, K] that share their input, with their biases: the trainer's own parameters, as they stand."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]


class AutogradOps:
    """Implements `zerokl.kernels.ops.Ops` on float32 CPU tensors; same forward bits as the engine's `CpuOps`.

    A step holds whole sequences (no cached prefix): keys and values go to a scratch pool of one layer, made by
    `packed_step`, that every layer uses in turn. `rope` is a NumPy array, since nothing differentiates it.
    """

    def __init__(self) -> None:
        self._step: StepInputs | None = None
        self._caches: tuple[Floats, Floats] | None = None

    # -- packing: nothing is packed, see zerokl.kernels.autograd.linear -------------------------------------------------
    def pack_linear(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> LinearParameters:
        return LinearParameters(tuple(weights), tuple(biases))

    def pack_gate_up(self, gate: Tensor, up: Tensor) -> LinearParameters:
        return LinearParameters((gate, up), (None, None))

    # -- a step ---------------------------------------------------------------------------------------------------------
    def begin_step(self, inputs: StepInputs, pool: KVPool[Tensor]) -> None:
        """Raises ValueError if a sequence does not start at position 0 or the pool has more than one layer."""
        lengths = np.diff(inputs.seq_starts)
        if not np.array_equal(lengths, inputs.context_lens):
            raise ValueError("inputs: each sequence must be whole: context_lens must equal its number of tokens")
        if pool.keys.shape[0] != 1:
            raise ValueError(f"pool: the trainer's scratch pool has 1 layer, got {pool.keys.shape[0]}")
        self._step = inputs
        self._caches = (array_of(pool.keys)[0], array_of(pool.values)[0])

    # -- ops ------------------------------------------------------------------------------------------------------------
    def embedding(self, token_ids: NDArray[np.int32], table: Tensor) -> Tensor:
        return Embedding.apply(table, token_ids)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return RMSNorm.apply(x, weight, eps)

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed = AddRMSNorm.apply(residual, delta, weight, eps)
        return total, normed

    def linear(self, x: Tensor, weight: LinearParameters) -> Tensor:
        outs = self.qkv_linear(x, weight)
        return outs[0] if len(outs) == 1 else paddle.concat(outs, axis=-1)

    def qkv_linear(self, x: Tensor, weight: LinearParameters) -> tuple[Tensor, ...]:
        operands = [part for pair in zip(weight.weights, weight.biases, strict=True) for part in pair]
        return tuple(FusedLinear.apply(x, *operands))

    def swiglu_linear(self, x: Tensor, weight: LinearParameters) -> Tensor:
        return SwiGLULinear.apply(x, *weight.weights)

    def attention(
        self, qkv: tuple[Tensor, ...], layer: int, params: LayerParams[Tensor], rope: Floats, spec: AttentionSpec
    ) -> Tensor:
        step, caches = self._step, self._caches
        assert step is not None and caches is not None, "begin_step comes first"
        q, k, v = qkv
        if params.q_norm is not None:
            q = RMSNorm.apply(q, params.q_norm, spec.norm_eps)
        if params.k_norm is not None:
            k = RMSNorm.apply(k, params.k_norm, spec.norm_eps)
        interleaved = spec.rotary_layout == "interleaved"
        q = Rope.apply(q, step.positions, rope, interleaved)
        k = Rope.apply(k, step.positions, rope, interleaved)
        call = AttentionCall(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            scale=spec.scale,
            seq_starts=step.seq_starts,
            context_lens=step.context_lens,
            block_tables=step.block_tables,
            slot_mapping=step.slot_mapping,
            key_cache=caches[0],
            value_cache=caches[1],
        )
        return Attention.apply(q, k, v, call)

    def gather_rows(self, x: Tensor, rows: NDArray[np.int32]) -> Tensor:
        return GatherRows.apply(x, rows)

    def sample(self, hidden: Tensor, lm_head: LinearParameters, batch: SamplingBatch) -> SampleResult:
        """Not differentiable; `logprobs` is."""
        weight, bias = _head(lm_head)
        logits = np.empty((hidden.shape[0], weight.shape[0]), np.float32)
        _cpu.linear_unpacked(read(hidden), read(weight), bias, logits)
        return sample_logits(logits, batch)

    def logprobs(
        self,
        hidden: Tensor,
        lm_head: LinearParameters,
        targets: NDArray[np.int32],
        temperature: float = 1.0,
        chunk_rows: int = DEFAULT_CHUNK_ROWS,
    ) -> tuple[Tensor, Tensor]:
        """`policy_logprobs` [R] of the targets and entropies [R], differentiable; see `lm_head_logprobs`."""
        weight, _ = _head(lm_head)
        return lm_head_logprobs(hidden, weight, targets, temperature, chunk_rows)


def _head(lm_head: LinearParameters) -> tuple[Tensor, None]:
    assert len(lm_head.weights) == 1 and lm_head.biases[0] is None, "an LM head is one matrix without a bias"
    return lm_head.weights[0], None
