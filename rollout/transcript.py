"""What was said in a conversation so far: tokens of the policy and of others, and where each came from."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.outputs import Rollout
from zerokl.rollout.request import FinishReason
from zerokl.rollout.routing import RolloutRouting
from zerokl.rollout.sampling_params import SamplingParams

_FOREIGN: dict[str, Any] = {
    "loss_mask": np.bool_(False),
    "logprobs": np.float32(np.nan),
    "policy_logprobs": np.float32(np.nan),
    "entropy": np.float32(np.nan),
    "policy_versions": np.int64(-1),
    "steps": np.int64(-1),
    "phases": np.uint8(0),
    "cached_lens": np.int32(0),
    "ranks": np.int16(-1),
}
"""Entries of tokens that the policy did not sample. NaN: whoever forgets the mask sees it at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One generation of a conversation."""

    start: int
    """Index of its first sampled token among the conversation's tokens."""
    end: int
    """Index after its last one."""
    seed: int
    """Key of its random numbers."""
    sampling_params: SamplingParams
    finish_reason: FinishReason
    stop_reason: int | str | None
    num_cached_tokens: int
    """Of the tokens before it, those whose keys and values came from the prefix cache."""
    num_preemptions: int
    num_restarts: int
    num_kept_updates: int
    inexact: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Transcript:
    """L tokens of a conversation; row i of each array belongs to token i. Immutable: arrays are read-only.

    Rows of tokens that the policy did not sample hold False, NaN, version -1, step -1 and rank -1.
    """

    tokens: NDArray[np.int32]
    """[L]"""
    loss_mask: NDArray[np.bool_]
    """[L], True where the policy sampled the token."""
    logprobs: NDArray[np.float32]
    """[L], under the distribution sampled from, as `Rollout.logprobs`."""
    policy_logprobs: NDArray[np.float32]
    """[L], under softmax(logits / temperature of the turn)."""
    entropy: NDArray[np.float32]
    """[L], nats."""
    policy_versions: NDArray[np.int64]
    """[L], version of the weights that sampled the token."""
    steps: NDArray[np.int64]
    phases: NDArray[np.uint8]
    cached_lens: NDArray[np.int32]
    ranks: NDArray[np.int16]
    turns: tuple[Turn, ...]
    routing: RolloutRouting | None
    """What the routers chose, from the first row that gave a token (or from 0) on; None where the engine returns none.
    Rows without a recorded choice hold experts -1 and weights 0."""

    @classmethod
    def begin(cls, prompt: NDArray[np.int32]) -> Transcript:
        """Of a conversation that has a prompt [P] only."""
        columns = {name: np.full(len(prompt), value) for name, value in _FOREIGN.items()}
        return cls(tokens=prompt.copy(), **columns, turns=(), routing=None)._sealed()

    def extended(self, tokens: NDArray[np.int32]) -> Transcript:
        """With tokens [N] that come from elsewhere: a user, a tool, the environment."""
        return self._joined(tokens, {name: np.full(len(tokens), value) for name, value in _FOREIGN.items()})

    def with_turn(self, rollout: Rollout) -> Transcript:
        """With a rollout whose prompt were the tokens so far."""
        assert len(rollout.prompt_token_ids) == len(self.tokens), "a rollout of another conversation"
        columns = {name: getattr(rollout, name) for name in _FOREIGN if name != "loss_mask"}
        columns["loss_mask"] = np.ones(len(rollout.token_ids), bool)
        taken = {field.name: getattr(rollout, field.name) for field in fields(Turn)[2:]}
        turn = Turn(start=len(self.tokens), end=len(self.tokens) + len(rollout.token_ids), **taken)
        joined = self._joined(rollout.token_ids, columns)
        return replace(joined, turns=(*self.turns, turn), routing=self._routing_with(rollout))

    def to_rollout(self, seed: int, text: str | None) -> Rollout:
        """Everything from the first sampled token to the last, as one rollout whose `loss_mask` tells them apart.

        Raises ValueError where no token was sampled, or turns differ in temperature.
        """
        sampled = np.flatnonzero(self.loss_mask)
        if not len(sampled):
            raise ValueError(f"a rollout needs a token that the policy sampled, got {len(self.tokens)} others")
        temperatures = sorted({turn.sampling_params.temperature for turn in self.turns})
        if len(temperatures) > 1:
            raise ValueError(f"turns of a rollout must have one temperature, which its logprobs are of: {temperatures}")
        start, end = int(sampled[0]), int(sampled[-1]) + 1
        last = self.turns[-1]
        columns = {name: getattr(self, name)[start:end].copy() for name in _FOREIGN}
        return Rollout(
            prompt_token_ids=self.tokens[:start].copy(),
            token_ids=self.tokens[start:end].copy(),
            text=text,
            raw_logprobs=None,
            **columns,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            num_cached_tokens=self.turns[0].num_cached_tokens,
            num_preemptions=sum(turn.num_preemptions for turn in self.turns),
            num_restarts=sum(turn.num_restarts for turn in self.turns),
            num_kept_updates=sum(turn.num_kept_updates for turn in self.turns),
            seed=seed,
            sample_index=0,
            prompt_index=0,
            sampling_params=last.sampling_params,
            routing=self._routing_before(end - 1),
            inexact=any(turn.inexact for turn in self.turns),
        )

    def score_spans(self, joins: bool) -> list[tuple[int, int, SamplingParams]]:
        """(start, end, parameters) of what one score request rates: a turn, or with `joins` several turns of one
        temperature and all that lies between them.
        """
        spans: list[tuple[int, int, SamplingParams]] = []
        for turn in self.turns:
            if turn.start == turn.end:
                continue
            if joins and spans and spans[-1][2].temperature == turn.sampling_params.temperature:
                spans[-1] = spans[-1][0], turn.end, spans[-1][2]
            else:
                spans.append((turn.start, turn.end, turn.sampling_params))
        return spans

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(int(getattr(self, name).nbytes) for name in ("tokens", *_FOREIGN))

    def _routing_before(self, end: int) -> RolloutRouting | None:
        if self.routing is None:
            return None
        size = end - self.routing.start
        return replace(self.routing, experts=self.routing.experts[:size], weights=self.routing.weights[:size])

    def _joined(self, tokens: NDArray[np.int32], columns: dict[str, NDArray[Any]]) -> Transcript:
        added = {"tokens": tokens, **columns}
        joined: dict[str, Any] = {name: np.concatenate([getattr(self, name), column]) for name, column in added.items()}
        return replace(self, **joined)._sealed()

    def _sealed(self) -> Transcript:
        for name in ("tokens", *_FOREIGN):
            getattr(self, name).flags.writeable = False
        return self

    def _routing_with(self, rollout: Rollout) -> RolloutRouting | None:
        """A row that gave a token keeps the routing that gave it; any other has that of its latest forward."""
        newer, older = rollout.routing, self.routing
        if newer is None or older is None:
            return newer or older
        first, known = newer.start - older.start, len(older.experts)
        shape = (max(known, first + len(newer.experts)), *newer.experts.shape[1:])
        gave = np.flatnonzero(self.loss_mask) - 1 - older.start

        def joined(old: NDArray[Any], new: NDArray[Any], unknown: int) -> NDArray[Any]:
            rows = np.full(shape, unknown, new.dtype)
            rows[:known] = old
            rows[first : first + len(new)] = new
            rows[gave] = old[gave]
            return rows

        return RolloutRouting(
            experts=joined(older.experts, newer.experts, -1),
            weights=joined(older.weights, newer.weights, 0),
            start=older.start,
        )
