"""A caller's arguments made into calls for the engine's loop, and finished calls into results. Nothing is queued here.

Everything about a call is checked before its first request is made: it runs as a whole or is refused as a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.admission import AdmissionLimits
from zerokl.rollout.control import Call
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.prompts import check_ids, params_list, prompt_list, token_ids_of
from zerokl.rollout.request import Request
from zerokl.rollout.resumption import RoutingForm, resumed_request, rollout_list
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.scoring import Definition, ScoreRequests, make_score_requests
from zerokl.rollout.seeds import derive_seed
from zerokl.rollout.stop import whole_text
from zerokl.rollout.text import Tokenizer

CheckedPrompt = tuple[NDArray[np.int32], SamplingParams]


class CallMaker:
    """Knows what the model takes, numbers the calls and derives their seeds. Safe to use from several threads."""

    def __init__(
        self,
        limits: AdmissionLimits,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
        engine_seed: int,
        routing: RoutingForm | None = None,
    ) -> None:
        """`routing`: what the engine returns with rollouts, if anything."""
        self._limits = limits
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._engine_seed = engine_seed
        self._routing = routing
        self._generate_numbers = itertools.count()
        self._resume_numbers = itertools.count()
        self._score_numbers = itertools.count()
        self._session_numbers = itertools.count()

    def generate_call(self, prompts: Any, sampling_params: Any, request_ids: Sequence[str] | None) -> Call:
        """The requests of one generate call. Raises ValueError naming prompt index, field, value and bound.

        A call refused here takes no number and leaves the seeds of later calls as they were; one refused later, for an
        id that is in flight, has taken its own.
        """
        checked = self._check(prompts, sampling_params)
        if request_ids is not None:
            request_ids = check_ids(request_ids, len(checked))
        number = next(self._generate_numbers)
        names = request_ids or [f"generate-{number}-{index}" for index in range(len(checked))]
        groups: dict[str, list[Request]] = {}
        for index, ((tokens, params), name) in enumerate(zip(checked, names, strict=True)):
            seed = derive_seed(self._engine_seed, number, index) if params.seed is None else params.seed
            groups[name] = [self._request(name, tokens, params, seed, sample, index) for sample in range(params.n)]
        return Call(groups)

    def resume_call(self, resume_from: Any, request_ids: Sequence[str] | None) -> Call:
        """The requests that continue rollouts which were aborted. Raises ValueError naming index, value and bound.

        It takes no number among the generate calls: seeds are the rollouts' own.
        """
        rollouts = rollout_list(resume_from)
        if request_ids is not None:
            request_ids = check_ids(request_ids, len(rollouts))
        prefix = f"resume-{next(self._resume_numbers)}"
        names = request_ids or [f"{prefix}-{index}" for index in range(len(rollouts))]
        return Call(
            {
                name: [
                    resumed_request(
                        f"{name}/0",
                        f"resume_from[{index}]",
                        rollout,
                        self._limits,
                        self._eos_token_ids,
                        self._routing,
                    )
                ]
                for index, (rollout, name) in enumerate(zip(rollouts, names, strict=True))
            }
        )

    def score_call(
        self, sequences: Any, sampling_params: Any, definition: Definition, policy: str, prompt_lens: Any
    ) -> tuple[ScoreRequests, Call | None]:
        """The requests of one score call; no Call where no token is to be rated. Raises ValueError as above."""
        prefix = f"score-{next(self._score_numbers)}"
        scores = make_score_requests(
            sequences,
            sampling_params,
            definition,
            policy,
            prompt_lens,
            prefix=prefix,
            limits=self._limits,
            eos_token_ids=self._eos_token_ids,
        )
        groups = scores.groups(prefix)
        return scores, Call(groups) if groups else None

    def session_seed(self) -> int:
        """A seed for a session: of the engine's, and of how many were asked for before."""
        return derive_seed(self._engine_seed, next(self._session_numbers), 0, "session")

    def rollouts(self, call: Call, inexact_versions: Set[int]) -> list[Rollout]:
        """The records of a finished generate call, with their texts."""

        def text(request: Request) -> str | None:
            if self._tokenizer is None:
                return None
            stopped = call.texts.get(request.request_id)
            return whole_text(self._tokenizer, request) if stopped is None else stopped

        return [Rollout.from_request(request, text(request), inexact_versions) for request in call.requests]

    def _check(self, prompts: Any, sampling_params: Any) -> list[CheckedPrompt]:
        listed = prompt_list(prompts, "prompts")
        params = params_list(sampling_params, len(listed))
        checked = []
        for index, (prompt, one) in enumerate(zip(listed, params, strict=True)):
            name = f"prompts[{index}]"
            if one.stop and self._tokenizer is None:
                raise ValueError(f"{name}: stop={one.stop!r} needs a tokenizer: set EngineConfig.tokenizer")
            tokens = token_ids_of(prompt, name, self._tokenizer)
            try:
                self._limits.check(self._request(name, tokens, one, 0, 0, 0))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            checked.append((tokens, one))
        return checked

    def _request(
        self, name: str, tokens: NDArray[np.int32], params: SamplingParams, seed: int, sample: int, index: int
    ) -> Request:
        return Request.generate(
            f"{name}/{sample}",
            tokens,
            params,
            seed=seed,
            sample_index=sample,
            prompt_index=index,
            group_id=name if params.n > 1 else None,
            eos_token_ids=self._eos_token_ids,
        )
