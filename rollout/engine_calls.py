"""The engine's methods that run requests: sampling, scoring, aborts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.calls import CallMaker
from zerokl.rollout.control import POLICY, WeightSets
from zerokl.rollout.engine_loop import EngineLoop
from zerokl.rollout.errors import EngineClosedError, EngineFailedError
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.prompts import Prompt
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.scoring import Definition
from zerokl.rollout.sleep import Sleep
from zerokl.rollout.submission import Result, Submission


class CallMethods:
    """The part of `RolloutEngine` that runs requests; the engine makes the collaborators."""

    _calls: CallMaker
    _loop: EngineLoop
    _sleep: Sleep
    _weights: WeightSets

    # -- sampling -----------------------------------------------------------------------------------------------------
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_ids: Sequence[str] | None = None,
        resume_from: Rollout | Sequence[Rollout] | None = None,
    ) -> list[Rollout]:
        """Sample n continuations of each prompt; the rollouts of prompt 0 first, in order of sample index.

        `prompts`: one text or sequence of token ids, or a sequence of those. `sampling_params`: one for all prompts
        (None: the defaults) or one per prompt. `request_ids`: names for `abort`, one per prompt.

        `resume_from`, in place of prompts and parameters: rollouts that an abort cut off, one or several. Each goes on
        as if it had not been: the rollout returned holds the tokens so far and those that follow, with the same bits.

        The tokens kept include those that spell a stop string; the text ends before it. The random numbers of a prompt
        without a seed come from the engine's seed, the number of this call among the engine's generate calls and the
        prompt's index, never from the order in which requests arrive. Ctrl-C aborts the call's requests.

        Raises ValueError, before anything is queued, for what can never run.
        """
        return self._wait(self.submit(prompts, sampling_params, request_ids=request_ids, resume_from=resume_from))

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_ids: Sequence[str] | None = None,
        resume_from: Rollout | Sequence[Rollout] | None = None,
    ) -> list[Rollout]:
        """`generate` for coroutines: many share the batch. Cancelling the task aborts its requests."""
        submission = self.submit(prompts, sampling_params, request_ids=request_ids, resume_from=resume_from)
        return await self._await(submission)

    def submit(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_ids: Sequence[str] | None = None,
        resume_from: Rollout | Sequence[Rollout] | None = None,
    ) -> Submission[list[Rollout]]:
        """`generate` without waiting: the call is queued and has its number."""
        if resume_from is None:
            call = self._calls.generate_call(prompts, sampling_params, request_ids)
        elif prompts is not None or sampling_params is not None:
            raise ValueError("prompts and sampling_params must be None with resume_from: a rollout has its own")
        else:
            call = self._calls.resume_call(resume_from, request_ids)
        self._loop.submit(call)
        return Submission(call, lambda: self._calls.rollouts(call, self._weights.inexact_versions))

    def new_session_seed(self) -> int:
        """A seed that no other session gets: derived from `config.seed` and the number of seeds asked for before."""
        return self._calls.session_seed()

    # -- scoring ------------------------------------------------------------------------------------------------------
    def score(
        self,
        token_ids: Prompt | Rollout | Sequence[Prompt | Rollout],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        definition: Definition = "policy_logprobs",
        policy: str = POLICY,
        prompt_lens: Sequence[int] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Logprob of each token given those before it; a float32 array per sequence.

        `token_ids`: token ids of a sequence, a Rollout (its prompt and tokens, with its own sampling parameters unless
        some are given), or several of these. Without `prompt_lens` entry i is token i + 1's (length L - 1); with it, or
        for a Rollout, entry i is that of token prompt_len + i (length L - prompt_len).

        `definition`: "policy_logprobs" under softmax(logits / temperature), "logprobs" under the distribution that
        sampling with these parameters draws from (-inf for a token it never draws; penalties and min_tokens need
        `prompt_lens`), "raw" under softmax(logits). `policy`: "policy", or a name given to `pin_weights`.

        Raises ValueError, before anything is queued, for what can never run; AbortedError where an abort cut it off.
        """
        return self._wait(self.submit_score(token_ids, sampling_params, definition, policy, prompt_lens))

    async def ascore(
        self,
        token_ids: Prompt | Rollout | Sequence[Prompt | Rollout],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        definition: Definition = "policy_logprobs",
        policy: str = POLICY,
        prompt_lens: Sequence[int] | None = None,
    ) -> list[NDArray[np.float32]]:
        """`score` for coroutines."""
        return await self._await(self.submit_score(token_ids, sampling_params, definition, policy, prompt_lens))

    def submit_score(
        self,
        token_ids: Prompt | Rollout | Sequence[Prompt | Rollout],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        definition: Definition = "policy_logprobs",
        policy: str = POLICY,
        prompt_lens: Sequence[int] | None = None,
    ) -> Submission[list[NDArray[np.float32]]]:
        """`score` without waiting."""
        self._sleep.check_awake()
        self._weights.check_known(policy)
        scores, call = self._calls.score_call(token_ids, sampling_params, definition, policy, prompt_lens)
        if call is not None:
            self._loop.submit(call)
        return Submission(call, scores.logprobs)

    # -- aborts -------------------------------------------------------------------------------------------------------
    def abort(self, ids: str | Collection[str]) -> int:
        """End the requests of these `request_ids` after the current step; returns how many samples it ended.

        Their `generate` calls return the tokens so far with finish_reason "abort", `score` calls raise AbortedError.
        Unknown and finished ids are passed over.
        """
        return self.submit_abort(ids).result()

    def abort_all(self) -> int:
        """End every request in flight, as `abort` does; returns how many samples it ended."""
        return self.submit_abort(None).result()

    def submit_abort(self, ids: str | Collection[str] | None) -> Future[int]:
        """`abort` (None: `abort_all`) without waiting."""
        return self._loop.abort({ids} if isinstance(ids, str) else ids if ids is None else set(ids))

    # -- inside -------------------------------------------------------------------------------------------------------
    def _wait(self, submission: Submission[Result]) -> Result:
        try:
            submission.future.result()
        except KeyboardInterrupt:
            self._give_up(submission)
            raise
        return submission.read()

    async def _await(self, submission: Submission[Result]) -> Result:
        try:
            await asyncio.wrap_future(submission.future)
        except asyncio.CancelledError:
            self._give_up(submission)
            raise
        return submission.read()

    def _give_up(self, submission: Submission[Any]) -> None:
        with contextlib.suppress(EngineFailedError, EngineClosedError):  # then nothing is left to abort
            self._loop.abort(submission.request_ids)
