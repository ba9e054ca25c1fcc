"""The op table: what a device must provide for the model code to run, and the plain data that steers it.

The model (`zerokl.rollout.models.decoder`) is written once over `Ops`. It allocates nothing and computes nothing
by itself: that keeps all numerics in this room, lets a GPU implementation capture a step as one graph, and makes the
trainer's differentiable forward (`zerokl.kernels.autograd`) the same program as the engine's.

`Array` stands for the device's array type: `numpy.ndarray` on the CPU, `paddle.Tensor` on GPUs and in the trainer.
An ops object owns allocation: what it returns may live in a buffer that the *next step* overwrites (never a later op of
the same step), except in the trainer's ops, which return fresh arrays for autograd.

Shape letters: T tokens of the step, S sequences of the step, R rows whose distribution is wanted, H query heads, KV
key/value heads, D head size, E hidden size, F inner size of a SwiGLU block, V vocabulary, B block size, P
prompt-and-output history entries, M mixtures of experts, k experts per token (`zerokl.kernels.experts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.experts import MoeParams, Replay, RouterSpec, Routing

Array = TypeVar("Array")
RotaryLayout = Literal["half", "interleaved"]

KV_SPLIT = 64
"""Keys per attention split, aligned to absolute positions (docs/numerics.md, rule 2). Not the block size."""

LINEAR_K_SEGMENT = 256
"""Inputs per partial sum of a CPU matrix product; partial sums are added in order (docs/numerics.md, rule 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Constants of a model's attention; one object for all layers."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """Factor on query-key products, usually head_dim ** -0.5; rounded to float32 by the op."""
    rotary_layout: RotaryLayout
    """"half": element i is paired with i + D/2 (Llama, Qwen). "interleaved": 2i with 2i + 1 (ERNIE 4.5)."""
    norm_eps: float
    """Epsilon of the per-head query and key norms, where the model has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """How to turn R rows of logits into tokens. All arrays have R rows and are C-contiguous.

    Order of processing for a row: logits -> + logit bias -> repetition, presence, frequency penalties -> / temperature
    -> top-k -> top-p (mass relative to what top-k kept) -> min-p (relative to the largest probability). Ties go to the
    lower id.
    """

    temperature: NDArray[np.float32]
    """0 means argmax; `policy_logprobs` and `entropy` then use temperature 1."""
    top_k: NDArray[np.int32]
    """0 means off."""
    top_p: NDArray[np.float32]
    """1 means off."""
    min_p: NDArray[np.float32]
    """0 means off."""
    repetition_penalty: NDArray[np.float32]
    """1 means off. Divides positive and multiplies negative logits of the history (CTRL, arXiv:1909.05858)."""
    presence_penalty: NDArray[np.float32]
    """Subtracted from tokens that the output holds."""
    frequency_penalty: NDArray[np.float32]
    """Subtracted, times the count, from tokens that the output holds."""
    seed: NDArray[np.uint64]
    """Philox key of the request."""
    sample_index: NDArray[np.uint32]
    """Philox counter word 1: which of the n samples of a prompt."""
    position: NDArray[np.uint32]
    """Philox counter word 0: absolute position of the token to draw."""
    forced: NDArray[np.int32]
    """-1: draw. Otherwise the token whose logprobs are wanted (scoring); nothing is drawn."""
    history_start: NDArray[np.int32]
    """[R + 1], offsets into the history_* arrays; a row without penalties has none."""
    history_token: NDArray[np.int32]
    """[P], distinct tokens of prompt and output. -1 at a row's end: the token that row r of the step before draws is to
    be counted too (`StepInputs.token_rows`)."""
    history_count: NDArray[np.int32]
    """[P], times the token stands in the output; 0 for tokens of the prompt alone. -1 - r where the token is -1."""
    bias_start: NDArray[np.int32]
    """[R + 1], offsets into the bias arrays."""
    bias_token: NDArray[np.int32]
    """Distinct within a row."""
    bias_value: NDArray[np.float32]
    """Added to the logit; -inf bans the token (min_tokens bans the stop tokens so)."""
    want_raw: bool = False
    """Also return `raw_logprobs`: log-softmax of the unprocessed logits at temperature 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """Outcome for R rows, NumPy arrays (fresh, the caller may keep them)."""

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    """Under the distribution sampled from; 0.0 at temperature 0; -inf for a forced token outside the support."""
    policy_logprobs: NDArray[np.float32]
    """Under softmax(logits / temperature): no bias, penalty or truncation. What the mismatch KL compares."""
    entropy: NDArray[np.float32]
    """Nats, of the same distribution as policy_logprobs."""
    raw_logprobs: NDArray[np.float32] | None = None
    """Under softmax(logits), if asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """One forward step of one rank as plain arrays: all that a worker needs beside weights and KV pool.

    Sequence s owns tokens seq_starts[s] : seq_starts[s + 1]; its last token of this step stands at absolute position
    context_lens[s] - 1. A bucketed runner may pad: sequences without tokens, tokens with slot -1, both ignored by
    every op.
    """

    token_ids: NDArray[np.int32]
    """[T]"""
    positions: NDArray[np.int32]
    """[T], absolute positions from 0."""
    slot_mapping: NDArray[np.int32]
    """[T], block * block_size + offset where the token's key and value go; -1 where they are there already."""
    seq_starts: NDArray[np.int32]
    """[S + 1], cu_seqlens_q."""
    context_lens: NDArray[np.int32]
    """[S], keys visible to the sequence's last token of this step."""
    block_tables: NDArray[np.int32]
    """[S, max blocks], block ids in position order, -1 beyond the end."""
    logit_rows: NDArray[np.int32]
    """[R], indices into the T tokens whose next-token distribution is wanted; may be empty."""
    sampling: SamplingBatch
    """R rows, aligned with logit_rows."""
    step: int = 0
    policy: str = "policy"
    """Name of the weight set to run: "policy" or a pinned one such as "reference"."""
    token_rows: NDArray[np.int32] | None = None
    """[T], rows of the step before whose tokens take the place of `token_ids`, -1 where there is none: a step may be
    given to a device before its host has seen the results of the last one. None: there is none anywhere."""
    routing: NDArray[np.int32] | None = None
    """[M, T, k], experts of each mixture in slot order in place of the routers' choice (routing replay).

    A row of -1 is not given: the router chooses.
    """
    routing_weights: NDArray[np.float32] | None = None
    """[M, T, k], gate weights for the rows of `routing` that are given; None: they are computed by the routers."""

    def replay(self, mixture: int) -> Replay | None:
        """What `routing` and `routing_weights` say of mixture number `mixture`; None if nothing."""
        if self.routing is None:
            return None
        return Replay(self.routing[mixture], None if self.routing_weights is None else self.routing_weights[mixture])


@dataclass(frozen=True, slots=True)
class KVPool(Generic[Array]):
    """Paged keys and values of every layer. Layouts favour the CPU kernels: keys transposed inside a block.

    On a GPU both are [layers, num_blocks, KV, B, D] in the type of its op table.
    """

    keys: Array
    """[layers, num_blocks, KV, D, B] float32"""
    values: Array
    """[layers, num_blocks, KV, B, D] float32"""
    block_size: int


@dataclass(frozen=True, slots=True)
class LayerParams(Generic[Array]):
    """Weights of one decoder layer in whatever form the ops object packs them into."""

    input_norm: Array
    qkv: Any
    q_norm: Array | None
    k_norm: Array | None
    o: Any
    post_norm: Array
    gate_up: Any
    """Of the dense block, or of a mixture's shared experts taken together; None where there is neither."""
    down: Any
    moe: MoeParams[Array] | None = None


@dataclass(frozen=True, slots=True)
class DecoderParams(Generic[Array]):
    """Weights of a decoder. With tied embeddings `lm_head` is packed from the embedding table."""

    embed: Any
    """[V, E], or where tied the packed head itself, on devices whose `embedding` reads it."""
    layers: tuple[LayerParams[Array], ...]
    final_norm: Array
    lm_head: Any
    rope: Array
    """[max positions, 2, D / 2] float32: cosines, then sines (made by zerokl.rollout.models.rope)."""


class Ops(Protocol[Array]):
    """One device's implementation. Rows are independent: an output row depends on its own input row and the weights."""

    # -- packing, at load time
    # ------------------------------------------------------------------------------------------
    def pack_linear(self, weights: Sequence[Array], biases: Sequence[Array | None]) -> Any:
        """Fuse matrices [N_i, K] (Hugging Face layout: y = x W^T + b) that share their input into one operand."""
        ...

    def pack_gate_up(self, gate: Array, up: Array) -> Any:
        """Fuse the two input matrices [F, E] of a SwiGLU block (with biases absent, as in every supported family)."""
        ...

    def pack_experts(self, count: int, experts: Iterable[tuple[Array, Array, Array]]) -> Any:
        """The `count` SwiGLU blocks of a mixture, (gate [F, E], up [F, E], down [E, F]) each, read one at a time."""
        ...

    # -- ops
    # ------------------------------------------------------------------------------------------------------------
    def embedding(self, token_ids: NDArray[np.int32], table: Array) -> Array:
        """[T] -> [T, E]"""
        ...

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x * (1 / sqrt(mean(x^2) + eps)) * weight over the last axis (arXiv:1910.07467)."""
        ...

    def add_rms_norm(self, residual: Array, delta: Array, weight: Array, eps: float) -> tuple[Array, Array]:
        """(residual + delta, rms_norm(residual + delta)); `residual` may be overwritten."""
        ...

    def linear(self, x: Array, weight: Any) -> Array:
        """[T, K] -> [T, sum N_i]"""
        ...

    def qkv_linear(self, x: Array, weight: Any) -> Any:
        """Query, key and value projections of [T, E]; the result is opaque and goes to `attention` only."""
        ...

    def swiglu_linear(self, x: Array, weight: Any) -> Array:
        """silu(x Wg^T) * (x Wu^T): [T, E] -> [T, F]"""
        ...

    def route(self, x: Array, params: MoeParams[Array], spec: RouterSpec) -> Routing[Array]:
        """The experts of each row of [T, E]: top k of softmax(x Wr^T) + correction, lower ids first among equals.

        Weights are the softmax without the correction. `StepInputs.replay` takes precedence for the rows it gives.
        """
        ...

    def moe(self, x: Array, routing: Routing[Array], experts: Any, shared: Array | None) -> Array:
        """The sum over slots, in order, of weight * expert(x), then + shared: [T, E] -> [T, E]. No row is dropped."""
        ...

    def attention(self, qkv: Any, layer: int, params: LayerParams[Array], rope: Array, spec: AttentionSpec) -> Array:
        """Per-head norms, rotary embedding, KV write, causal paged attention. Returns [T, H * D].

        Metadata and KV pool come from `begin_step`.
        """
        ...

    def gather_rows(self, x: Array, rows: NDArray[np.int32]) -> Array:
        """[T, E], [R] -> [R, E]"""
        ...

    def sample(self, hidden: Array, lm_head: Any, batch: SamplingBatch) -> SampleResult:
        """LM head on [R, E], then token, logprobs and entropy per row; logits need not be kept."""
        ...

    # -- a step
    # ---------------------------------------------------------------------------------------------------------
    def begin_step(self, inputs: StepInputs, pool: KVPool[Array]) -> None:
        """Take the step's metadata and make last step's buffers free for re-use."""
        ...


def check_temperature(temperature: float) -> None:
    """Raise ValueError for one that no log-probabilities are defined at: it must be finite and above 0."""
    if not (np.isfinite(temperature) and temperature > 0.0):
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")


def neutral_sampling(rows: int, forced: NDArray[np.int32] | None = None, temperature: float = 1.0) -> SamplingBatch:
    """A SamplingBatch of `rows` rows with every option off; used for scoring and tests."""
    off = np.zeros(rows + 1, np.int32)
    return SamplingBatch(
        temperature=np.full(rows, temperature, np.float32),
        top_k=np.zeros(rows, np.int32),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        repetition_penalty=np.ones(rows, np.float32),
        presence_penalty=np.zeros(rows, np.float32),
        frequency_penalty=np.zeros(rows, np.float32),
        seed=np.zeros(rows, np.uint64),
        sample_index=np.zeros(rows, np.uint32),
        position=np.zeros(rows, np.uint32),
        forced=np.full(rows, -1, np.int32) if forced is None else np.ascontiguousarray(forced, np.int32),
        history_start=off,
        history_token=np.zeros(0, np.int32),
        history_count=np.zeros(0, np.int32),
        bias_start=off,
        bias_token=np.zeros(0, np.int32),
        bias_value=np.zeros(0, np.float32),
    )
