"""`AutogradOps`: the op table for a trainer on the CPU, where every op is differentiable and returns a fresh tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray

from zerokl.kernels.autograd import elementwise
from zerokl.kernels.autograd import moe as mixture
from zerokl.kernels.autograd.arrays import Floats, array_of, read
from zerokl.kernels.autograd.attention import packed_attention
from zerokl.kernels.autograd.linear import fused_linear, swiglu_linear
from zerokl.kernels.autograd.lm_head import DEFAULT_CHUNK_ROWS, lm_head_logprobs, sample_logits
from zerokl.kernels.cpu import _cpu
from zerokl.kernels.experts import MoeParams, RouterSpec, Routing
from zerokl.kernels.ops import AttentionSpec, KVPool, LayerParams, SampleResult, SamplingBatch, StepInputs

Tensor = Any  # paddle.Tensor


@dataclass(frozen=True, slots=True)
class LinearParameters:
    """Matrices [N_i, K] that share their input, with their biases: the trainer's own parameters, as they stand."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]


class AutogradOps:
    """Implements `zerokl.kernels.ops.Ops` on float32 CPU tensors; same forward bits as the engine's `CpuOps`.

    A step holds whole sequences (no cached prefix): keys and values go to a scratch pool of one layer (`scratch_pool`)
    that every layer uses in turn. `rope` is a NumPy array, since nothing differentiates it.
    """

    def __init__(self) -> None:
        self._step: StepInputs | None = None
        self._caches: tuple[Floats, Floats] | None = None

    # -- packing: nothing is packed, see zerokl.kernels.autograd.linear -----------------------------------------------
    def pack_linear(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> LinearParameters:
        """The parameters themselves."""
        return LinearParameters(tuple(weights), tuple(biases))

    def pack_gate_up(self, gate: Tensor, up: Tensor) -> LinearParameters:
        """The parameters themselves."""
        return LinearParameters((gate, up), (None, None))

    def pack_experts(self, count: int, experts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> mixture.Experts:
        """The parameters themselves."""
        parameters = tuple(experts)
        assert len(parameters) == count
        return parameters

    # -- a step -------------------------------------------------------------------------------------------------------
    def begin_step(self, inputs: StepInputs, pool: KVPool[Tensor]) -> None:
        """Take a step of whole sequences and a pool of one layer. ValueError for a cached prefix or a larger pool."""
        if not np.array_equal(np.diff(inputs.seq_starts), inputs.context_lens):
            raise ValueError("inputs: context_lens must equal each sequence's number of tokens (no cached prefix)")
        if pool.keys.shape[0] != 1:
            raise ValueError(f"pool: must have 1 layer, which all layers use in turn, got {pool.keys.shape[0]}")
        self._step = inputs
        self._caches = (array_of(pool.keys)[0], array_of(pool.values)[0])

    # -- ops ----------------------------------------------------------------------------------------------------------
    def embedding(self, token_ids: NDArray[np.int32], table: Tensor) -> Tensor:
        """See `Ops.embedding`."""
        return elementwise.embedding(table, token_ids)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        return elementwise.rms_norm(x, weight, eps)

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Ops.add_rms_norm`; `residual` is left as it is."""
        return elementwise.add_rms_norm(residual, delta, weight, eps)

    def linear(self, x: Tensor, weight: LinearParameters) -> Tensor:
        """See `Ops.linear`."""
        outs = self.qkv_linear(x, weight)
        return outs[0] if len(outs) == 1 else paddle.concat(outs, axis=-1)

    def qkv_linear(self, x: Tensor, weight: LinearParameters) -> tuple[Tensor, ...]:
        """One tensor [T, N_i] per matrix."""
        return fused_linear(x, weight.weights, weight.biases)

    def swiglu_linear(self, x: Tensor, weight: LinearParameters) -> Tensor:
        """See `Ops.swiglu_linear`."""
        return swiglu_linear(x, *weight.weights)

    def route(self, x: Tensor, params: MoeParams[Tensor], spec: RouterSpec) -> Routing[Tensor]:
        """See `Ops.route`; gradients go through the router's weights, neither through its choice nor given weights."""
        assert self._step is not None, "route before begin_step"
        correction = None if params.correction is None else read(params.correction).reshape(-1)
        return mixture.route(self.linear(x, params.router), correction, spec, self._step.replay(spec.index))

    def moe(self, x: Tensor, routing: Routing[Tensor], experts: mixture.Experts, shared: Tensor | None) -> Tensor:
        """See `Ops.moe`."""
        return mixture.moe(x, routing, experts, shared)

    def attention(
        self,
        qkv: tuple[Tensor, ...],
        layer: int,  # all layers share the scratch pool
        params: LayerParams[Tensor],
        rope: Floats,
        spec: AttentionSpec,
    ) -> Tensor:
        """See `Ops.attention`."""
        step, caches = self._step, self._caches
        assert step is not None and caches is not None, "attention before begin_step"
        q, k, v = qkv
        if params.q_norm is not None:
            q = elementwise.rms_norm(q, params.q_norm, spec.norm_eps)
        if params.k_norm is not None:
            k = elementwise.rms_norm(k, params.k_norm, spec.norm_eps)
        interleaved = spec.rotary_layout == "interleaved"
        q = elementwise.rope(q, step.positions, rope, interleaved)
        k = elementwise.rope(k, step.positions, rope, interleaved)
        return packed_attention(q, k, v, step, spec, caches)

    def gather_rows(self, x: Tensor, rows: NDArray[np.int32]) -> Tensor:
        """See `Ops.gather_rows`."""
        return elementwise.gather_rows(x, rows)

    def sample(self, hidden: Tensor, lm_head: LinearParameters, batch: SamplingBatch) -> SampleResult:
        """Not differentiable; `logprobs` is."""
        weight = read(_head(lm_head))
        logits = np.empty((hidden.shape[0], weight.shape[0]), np.float32)
        _cpu.linear_unpacked(read(hidden), weight, None, logits)
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
        return lm_head_logprobs(hidden, _head(lm_head), targets, temperature, chunk_rows)


def _head(lm_head: LinearParameters) -> Tensor:
    assert lm_head.biases == (None,), "an LM head is one matrix without a bias"
    return lm_head.weights[0]
