"""Rollouts packed for a trainer's forward: variable-length sequences end to end, no padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.outputs import Rollout
from zerokl.rollout.routing import replay_arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """S sequences of prompt and output, T tokens together, R of them generated.

    A conversation (`Session.to_rollout`) is one sequence; its tokens that the policy did not sample have no row.
    """

    token_ids: NDArray[np.int32]
    """[T]"""
    cu_seqlens: NDArray[np.int32]
    """[S + 1], sequence s owns tokens cu_seqlens[s] : cu_seqlens[s + 1]."""
    rows: NDArray[np.int32]
    """[R], the token before each generated one: the row of the forward that predicts it."""
    cu_rows: NDArray[np.int32]
    """[S + 1], sequence s owns rows cu_rows[s] : cu_rows[s + 1]."""
    rollout_logprobs: NDArray[np.float32]
    """[R], `policy_logprobs` of the rollouts."""
    indices: NDArray[np.int64]
    """[S], the sequence's place in the list that was packed."""
    routing: NDArray[np.int32] | None = None
    """[M, T, k], the experts that the rollouts' tokens went through, as `replay_arrays` gives them; None unless every
    rollout has its routing."""

    @property
    def sequence_of_row(self) -> NDArray[np.int64]:
        """[R], the sequence 0..S-1 that each row belongs to."""
        return np.repeat(np.arange(len(self.indices)), np.diff(self.cu_rows))

    @property
    def targets(self) -> NDArray[np.int32]:
        """[R], the generated tokens."""
        return self.token_ids[self.rows + 1]

    def select(self, per_rollout: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Arrays held per rollout (one value per generated token each), gathered for this batch's rows."""
        return np.concatenate([per_rollout[i] for i in self.indices])


def pack_rollouts(rollouts: Sequence[Rollout], indices: Sequence[int] | None = None) -> PackedBatch:
    """Pack the rollouts (or those at `indices`) in order. ValueError if one has no generated token."""
    chosen = list(range(len(rollouts)) if indices is None else indices)
    if not chosen:
        raise ValueError("rollouts must hold at least one sequence, got 0")
    for i in chosen:
        if not rollouts[i].generated.any():
            raise ValueError(f"rollouts[{i}] has no generated token (finish_reason {rollouts[i].finish_reason!r})")
    prompts = np.array([len(rollouts[i].prompt_token_ids) for i in chosen])
    outputs = np.array([len(rollouts[i].token_ids) for i in chosen])
    sampled = [np.flatnonzero(rollouts[i].generated) for i in chosen]
    starts = np.concatenate([[0], np.cumsum(prompts + outputs)])
    parts = [part for i in chosen for part in (rollouts[i].prompt_token_ids, rollouts[i].token_ids)]
    rows = [places + start + p - 1 for start, p, places in zip(starts[:-1], prompts, sampled, strict=True)]
    return PackedBatch(
        token_ids=np.concatenate(parts).astype(np.int32),
        cu_seqlens=starts.astype(np.int32),
        rows=np.concatenate(rows).astype(np.int32),
        cu_rows=np.concatenate([[0], np.cumsum([len(places) for places in sampled])]).astype(np.int32),
        rollout_logprobs=np.concatenate([rollouts[i].policy_logprobs[rollouts[i].generated] for i in chosen]),
        indices=np.array(chosen, np.int64),
        routing=_routing([rollouts[i] for i in chosen]),
    )


def _routing(rollouts: Sequence[Rollout]) -> NDArray[np.int32] | None:
    if any(rollout.routing is None for rollout in rollouts):
        return None
    experts, _ = replay_arrays(rollouts)
    return experts


def micro_batches(rollouts: Sequence[Rollout], max_tokens: int) -> Iterator[PackedBatch]:
    """Consecutive rollouts packed up to `max_tokens` tokens each; a longer one travels alone."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    chosen: list[int] = []
    tokens = 0
    for i, rollout in enumerate(rollouts):
        length = len(rollout.prompt_token_ids) + len(rollout.token_ids)
        if chosen and tokens + length > max_tokens:
            yield pack_rollouts(rollouts, chosen)
            chosen, tokens = [], 0
        chosen.append(i)
        tokens += length
    if chosen:
        yield pack_rollouts(rollouts, chosen)
