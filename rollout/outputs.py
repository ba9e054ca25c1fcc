"""The record that a caller gets for each sampled continuation."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.request import FinishReason, Request
from zerokl.rollout.routing import RolloutRouting
from zerokl.rollout.sampling_params import SamplingParams

LogprobsDefinition = Literal["processed_logprobs"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """One sampled continuation of N tokens after a prompt of P; row i of each array belongs to token_ids[i]."""

    prompt_token_ids: NDArray[np.int32]
    """[P]"""
    token_ids: NDArray[np.int32]
    """[N], tokens that the policy sampled and no others; a stop token is among them."""
    text: str | None
    """Text of token_ids, cut before the stop string if one ended it; None without a tokenizer."""
    logprobs: NDArray[np.float32]
    """[N], under the distribution sampled from; see `logprobs_definition`. 0.0 at temperature 0."""
    policy_logprobs: NDArray[np.float32]
    """[N], under softmax(logits / temperature), without bias, penalties or truncation."""
    entropy: NDArray[np.float32]
    """[N], nats, of the same distribution as policy_logprobs."""
    raw_logprobs: NDArray[np.float32] | None
    """[N], under softmax(logits); None unless `SamplingParams.raw_logprobs` is set."""
    policy_versions: NDArray[np.int64]
    """[N], version of the weights that sampled each token."""
    steps: NDArray[np.int64]
    """[N], number of the engine's step whose forward gave each token."""
    phases: NDArray[np.uint8]
    """[N], 1 (decode): that forward computed one token of the sequence, which it had sampled itself. 0 (prefill): it
    computed tokens of the prompt, or several tokens at once, as after a preemption."""
    cached_lens: NDArray[np.int32]
    """[N], tokens at the sequence's start whose keys and values came from the prefix cache in that forward."""
    ranks: NDArray[np.int16]
    """[N], rank that computed each token."""
    finish_reason: FinishReason
    """"stop": a stop token or string; "length": max_tokens; "abort": ended by the caller."""
    stop_reason: int | str | None
    """The stop token id or stop string; None for other reasons."""
    num_cached_tokens: int
    """Tokens of the prompt whose keys and values came from the prefix cache."""
    num_preemptions: int
    """Times the request lost its KV blocks and was computed again."""
    num_restarts: int
    """Times its tokens were dropped, as older than `max_staleness`, and it began anew."""
    num_kept_updates: int
    """Weight updates that it went through with keys and values of the weights before (`kv="keep"`).

    Above 0 its later logprobs are those of no single version: a trainer's forward does not give the same bits.
    """
    seed: int
    """Key of the random numbers; with the same weights, prompt and parameters it gives the same tokens."""
    sample_index: int
    """Which of the n samples of its prompt."""
    prompt_index: int
    """Which prompt of the call."""
    sampling_params: SamplingParams
    routing: RolloutRouting | None = None
    """What the routers chose, as far as `EngineConfig.return_routing` asks for it; None also if it never ran."""
    logprobs_definition: LogprobsDefinition = "processed_logprobs"
    """What `logprobs` are: log-softmax of the logits after bias, penalties, temperature, top-k, top-p and min-p."""

    loss_mask: NDArray[np.bool_] | None = None
    """[N], of a rollout made of a whole conversation (`Session.to_rollout`): False where a token is not the policy's
    but a user's, a tool's or the environment's. Its entries in the other arrays are NaN; version, step and rank are -1.
    None: the policy sampled all."""

    inexact: bool = False
    """Whether a version that sampled its tokens was published rounded, but not as in the trainer's forward.

    That forward then does not give the same bits.
    """

    @property
    def generated(self) -> NDArray[np.bool_]:
        """[N], which of token_ids the policy sampled: `loss_mask`, or all."""
        return np.ones(len(self.token_ids), bool) if self.loss_mask is None else self.loss_mask

    @property
    def version_spans(self) -> list[tuple[int, int, int]]:
        """(start, end, version) of each run of tokens that one version of the weights sampled, in order; with version
        -1 the runs between, that nobody sampled.
        """
        versions = self.policy_versions
        starts = [0, *(np.flatnonzero(np.diff(versions)) + 1).tolist()] if len(versions) else []
        ends = [*starts[1:], len(versions)]
        return [(start, end, int(versions[start])) for start, end in zip(starts, ends, strict=False)]

    @classmethod
    def from_request(
        cls, request: Request, text: str | None = None, inexact_versions: Set[int] = frozenset()
    ) -> Rollout:
        """The record of a finished generate request; arrays are copies of exact length."""
        assert request.finish_reason is not None, request.request_id
        raw = request.raw_logprobs
        return cls(
            prompt_token_ids=request.prompt_token_ids.copy(),
            token_ids=request.output_token_ids.copy(),
            text=text,
            logprobs=request.logprobs.copy(),
            policy_logprobs=request.policy_logprobs.copy(),
            entropy=request.entropy.copy(),
            raw_logprobs=None if raw is None else raw.copy(),
            policy_versions=request.policy_versions.copy(),
            steps=request.steps.copy(),
            phases=request.phases.copy(),
            cached_lens=request.cached_lens.copy(),
            ranks=request.ranks.copy(),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            num_cached_tokens=request.num_cached_tokens,
            num_preemptions=request.num_preemptions,
            num_restarts=request.num_restarts,
            num_kept_updates=request.num_kept_updates,
            seed=request.seed,
            sample_index=request.sample_index,
            prompt_index=request.prompt_index,
            sampling_params=request.sampling_params,
            routing=request.routing,
            inexact=not inexact_versions.isdisjoint(request.policy_versions.tolist()),
        )
