"""What runs the turns of sessions, and opens them: the part that engine and client have in common."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.admission import AdmissionLimits
from zerokl.rollout.control import POLICY
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.prompts import Prompt, token_ids_of
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.scoring import Definition
from zerokl.rollout.session import Session, check_seed
from zerokl.rollout.text import Tokenizer
from zerokl.rollout.transcript import Transcript

SessionKind = TypeVar("SessionKind", bound=Session)


class SessionHost(ABC, Generic[SessionKind]):
    """The part of `RolloutEngine` and `RolloutClient` that opens sessions, and what these use of it."""

    _session_kind: type[SessionKind]

    @abstractmethod
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_ids: Sequence[str] | None = None,
        resume_from: Rollout | Sequence[Rollout] | None = None,
    ) -> list[Rollout]:
        """Sample continuations."""

    @abstractmethod
    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_ids: Sequence[str] | None = None,
        resume_from: Rollout | Sequence[Rollout] | None = None,
    ) -> list[Rollout]:
        """`generate` for coroutines."""

    @abstractmethod
    def score(
        self,
        token_ids: Prompt | Rollout | Sequence[Prompt | Rollout],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        definition: Definition = "policy_logprobs",
        policy: str = POLICY,
        prompt_lens: Sequence[int] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Logprobs of given tokens."""

    @abstractmethod
    async def ascore(
        self,
        token_ids: Prompt | Rollout | Sequence[Prompt | Rollout],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        definition: Definition = "policy_logprobs",
        policy: str = POLICY,
        prompt_lens: Sequence[int] | None = None,
    ) -> list[NDArray[np.float32]]:
        """`score` for coroutines."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one."""

    @property
    @abstractmethod
    def limits(self) -> AdmissionLimits:
        """What a request may hold at most."""

    @abstractmethod
    def new_session_seed(self) -> int:
        """A seed that the engine gives to no other session: derived from its own seed and a count of sessions."""

    def open_session(self, prompt: Prompt, *, seed: int | None = None) -> SessionKind:
        """A conversation that begins with `prompt`, text or token ids [P >= 1].

        `seed` in [0, 2^64) fixes the random numbers of all its turns; None: `new_session_seed()`. A session takes no
        memory of the engine, so many thousands may be open.
        Raises ValueError for a prompt that is no text or sequence of token ids of the model, or too long for it.
        """
        tokens = token_ids_of(prompt, "prompt", self.tokenizer if isinstance(prompt, str) else None)
        tokens = self.limits.check_prompt(tokens, "prompt")
        seed = self.new_session_seed() if seed is None else check_seed(seed)
        return self._session_kind(self, self.limits, Transcript.begin(tokens), seed)

    async def aopen_session(self, prompt: Prompt, *, seed: int | None = None) -> SessionKind:
        """`open_session` for coroutines."""
        return await asyncio.to_thread(lambda: self.open_session(prompt, seed=seed))
