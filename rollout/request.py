"""One sequence on its way through the engine: its tokens, its results and how far it has been computed."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zerokl.rollout.growing_tokens import GrowingTokens, RequestKind
from zerokl.rollout.routing import RolloutRouting
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.sampling_state import SamplingState
from zerokl.rollout.token_ids import as_token_ids

FinishReason = Literal["stop", "length", "abort"]


class RequestStatus(enum.Enum):
    """Where a request stands. Preemption leads from RUNNING back to WAITING."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request(GrowingTokens):
    """A sequence to continue (generate) or whose given tokens are to be rated (score).

    Both are one thing to the scheduler: `num_computed_tokens` catches up with `compute_target`, and from position
    `next_row` on each computed token yields one row of results. Index ranges over the tokens of a request:

        generate  |-- prompt --|-- output --|          the row at the last token gives the next output token
        score     |-- prompt --|-- forced tokens --|   the row at p rates token p + 1; the last token is not computed
                  0            num_prompt_tokens       num_tokens

    `num_output_tokens` counts results collected so far: for a score request they cover a prefix of the forced tokens.
    Results outlive a preemption; only keys and values are computed again, to the same bits.

    Who writes: the scheduler progress and status, the KV cache manager the block fields, a `ResultIntake` the results,
    a `RoutingStore` the routing of what was computed until the request last let go of its blocks.
    """

    __slots__ = (
        "admission",
        "arrival",
        "arrival_time",
        "block_keys",
        "block_table",
        "finish_reason",
        "gathers",
        "group_id",
        "has_older_kv",
        "key_root",
        "num_blocks",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_kept_updates",
        "num_matched_tokens",
        "num_overtaken",
        "num_preemptions",
        "num_published_blocks",
        "num_restarts",
        "policy",
        "prompt_index",
        "rank",
        "routing",
        "sample_index",
        "seed",
        "status",
        "stop_reason",
    )

    def __init__(
        self,
        request_id: str,
        kind: RequestKind,
        tokens: NDArray[np.int32],
        num_prompt_tokens: int,
        sampling_params: SamplingParams,
        *,
        seed: int = 0,
        sample_index: int = 0,
        prompt_index: int = 0,
        group_id: str | None = None,
        policy: str,
        eos_token_ids: Iterable[int],
    ) -> None:
        """Use `Request.generate` or `Request.score`."""
        self.request_id = request_id
        self.kind: RequestKind = kind
        self.sampling_params = sampling_params
        self.seed = seed
        self.sample_index = sample_index
        self.prompt_index = prompt_index
        self.group_id = group_id
        self.policy = policy
        self.sampling = SamplingState(
            sampling_params,
            tokens[:num_prompt_tokens],
            seed=seed,
            sample_index=sample_index,
            eos_token_ids=eos_token_ids,
        )
        self._begin_tokens(tokens, num_prompt_tokens)
        self.routing: RolloutRouting | None = None
        self._begin_progress()
        self._begin_blocks()

    def _begin_progress(self) -> None:
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_matched_tokens = 0
        """Tokens whose keys and values came from the prefix cache of the rank it runs on; `num_cached_tokens` is the
        first admission's."""
        self.num_preemptions = 0
        self.num_restarts = 0
        self.num_kept_updates = 0
        self.has_older_kv = False
        self.arrival = -1
        self.arrival_time = 0.0
        self.gathers = True
        """Whether a collection window may hold it: it is new, not preempted or freed by the leader of its group."""
        self.rank = -1
        """Rank it runs on; -1 while it waits."""
        self.admission = -1
        self.num_overtaken = 0

    def _begin_blocks(self) -> None:
        self.block_table: NDArray[np.int32] = np.zeros(0, np.int32)
        self.num_blocks = 0
        self.num_published_blocks = 0
        self.block_keys: list[bytes] = []
        self.key_root: bytes | None = None

    @classmethod
    def generate(
        cls,
        request_id: str,
        prompt_token_ids: ArrayLike,
        sampling_params: SamplingParams,
        *,
        seed: int,
        sample_index: int = 0,
        prompt_index: int = 0,
        group_id: str | None = None,
        policy: str = "policy",
        eos_token_ids: Iterable[int] = (),
    ) -> Request:
        """A request to sample up to `sampling_params.max_tokens` tokens after a prompt of P >= 1 token ids.

        Requests with one `group_id` must have one and the same prompt and policy; they share its KV blocks.
        Raises ValueError for a prompt that is empty or not a sequence of integers.
        """
        prompt = as_token_ids("prompt_token_ids", prompt_token_ids)
        return cls(
            request_id,
            "generate",
            prompt,
            len(prompt),
            sampling_params,
            seed=seed,
            sample_index=sample_index,
            prompt_index=prompt_index,
            group_id=group_id,
            policy=policy,
            eos_token_ids=eos_token_ids,
        )

    @classmethod
    def score(
        cls,
        request_id: str,
        token_ids: ArrayLike,
        *,
        score_start: int = 1,
        sampling_params: SamplingParams | None = None,
        policy: str = "policy",
        eos_token_ids: Iterable[int] = (),
    ) -> Request:
        """A request for the logprobs of tokens score_start .. len - 1, each given the tokens before it.

        Tokens before `score_start` count as the prompt for penalties and min_tokens. Raises ValueError unless
        1 <= score_start < len(token_ids).
        """
        tokens = as_token_ids("token_ids", token_ids)
        if not 1 <= score_start < len(tokens):
            raise ValueError(
                f"score_start must be in [1, {len(tokens) - 1}] for {len(tokens)} token_ids, got {score_start}"
            )
        return cls(
            request_id,
            "score",
            tokens,
            score_start,
            sampling_params or SamplingParams(),
            policy=policy,
            eos_token_ids=eos_token_ids,
        )

    # -- tokens and results ------------------------------------------------------------------------
    @property
    def next_row(self) -> int:
        """Position of the first token whose row of results is still wanted; keys before it may come from the cache."""
        return self.num_prompt_tokens + self.num_output_tokens - 1

    @property
    def is_finished(self) -> bool:
        """Whether it has left the scheduler."""
        return self.status is RequestStatus.FINISHED

    def restart(self) -> None:
        """Forget all results, of a request that holds no blocks: it is computed again from its first wanted row."""
        assert self.num_blocks == 0, f"{self.request_id} holds blocks"
        if self.kind == "generate":
            self.num_tokens = self.compute_target = self.num_prompt_tokens
        self.num_output_tokens = 0
        self.routing = None
        self.sampling.restart(self.prompt_token_ids)
        self.block_keys.clear()
        self.num_restarts += 1

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Mark as finished; tokens and results so far stay readable."""
        assert self.status is not RequestStatus.FINISHED, self.request_id
        self.status = RequestStatus.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason
