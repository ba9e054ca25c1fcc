"""Conversations of many turns: the policy's tokens, those of tools and environments, and everything a trainer needs.

A session is plain data on the caller's side. An engine or a server knows nothing of it: each turn is a request of its
own whose prompt are all tokens so far, and whose keys and values the prefix cache gives back as far as they are still
there. So an open session costs the engine nothing, and no bit depends on what the cache has kept.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zerokl.rollout.admission import AdmissionLimits
from zerokl.rollout.control import POLICY
from zerokl.rollout.errors import SessionBusyError, SessionClosedError
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.scoring import Definition
from zerokl.rollout.seeds import derive_seed
from zerokl.rollout.transcript import Transcript, Turn
from zerokl.rollout.validation import UINT64_LIMIT, check_int

if TYPE_CHECKING:
    from zerokl.rollout.session_host import SessionHost

Own = TypeVar("Own", bound="Session")


class Session:
    """One conversation, made by `open_session`.

        session = engine.open_session(prompt_ids)
        while not done(rollout := session.generate(SamplingParams(max_tokens=64, stop_token_ids=(END_OF_CALL,)))):
            session.append(tool(rollout.token_ids))
        batch = pack_rollouts([session.to_rollout()])

    The arrays are read-only and have an entry for each of the L tokens so far. Where a method raises, nothing has
    changed: a turn that failed can be asked for again, and gives the same tokens. One thread or task at a time uses a
    session (another one gets SessionBusyError); different sessions share the batch.
    """

    __slots__ = ("_before", "_busy", "_cut", "_host", "_is_closed", "_limits", "_num_forks", "_seed", "_transcript")

    def __init__(self, host: SessionHost[Any], limits: AdmissionLimits, transcript: Transcript, seed: int) -> None:
        """Use `open_session` or `fork`."""
        self._host = host
        self._limits = limits
        self._transcript = transcript
        self._seed = seed
        self._num_forks = 0
        self._is_closed = False
        self._busy = threading.Lock()
        # Of the last turn, if an abort cut it off: what to go on from.
        self._before = transcript
        self._cut: Rollout | None = None

    # -- turns --------------------------------------------------------------------------------------------------------
    def generate(self, sampling_params: SamplingParams | None = None, *, request_id: str | None = None) -> Rollout:
        """Sample the next turn and keep it; a turn that is aborted is kept as far as it came.

        Turn t without a seed of its own draws by one derived from the session's and t. `request_id`: name for `abort`.
        Raises ValueError for n other than 1, or for max_tokens above `num_free_tokens`; and what `generate` raises.
        """
        with self._turn():
            params = self._params_of_turn(sampling_params)
            (rollout,) = self._host.generate(self.tokens, params, request_ids=id_list(request_id))
            return self._keep(self._transcript, rollout)

    async def agenerate(
        self, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> Rollout:
        """`generate` for coroutines. Cancelling the task aborts the turn, and the session stays as it was."""
        with self._turn():
            params = self._params_of_turn(sampling_params)
            (rollout,) = await self._host.agenerate(self.tokens, params, request_ids=id_list(request_id))
            return self._keep(self._transcript, rollout)

    def resume(self, *, request_id: str | None = None) -> Rollout:
        """Go on with a turn that an abort cut off, with the bits that it would have had; returns it as a whole.

        Raises ValueError where the last turn was not aborted, or was appended to.
        """
        with self._turn():
            (rollout,) = self._host.generate(resume_from=self._aborted(), request_ids=id_list(request_id))
            return self._keep(self._before, rollout)

    async def aresume(self, *, request_id: str | None = None) -> Rollout:
        """`resume` for coroutines."""
        with self._turn():
            (rollout,) = await self._host.agenerate(resume_from=self._aborted(), request_ids=id_list(request_id))
            return self._keep(self._before, rollout)

    def append(self, tokens: ArrayLike) -> None:
        """Add token ids [N >= 1] that the policy did not sample: a user's, a tool's, the environment's.

        Raises ValueError for what is no sequence of token ids of the model, or more than `num_free_tokens`.
        """
        with self._turn():
            if isinstance(tokens, str):
                raise ValueError(f"tokens must be token ids, got text {tokens!r:.80}: a tokenizer may not add its own")
            checked = self._limits.check_prompt(tokens, "tokens")
            if len(checked) > self.num_free_tokens:
                raise ValueError(
                    f"tokens must hold at most {self.num_free_tokens} token ids, which is max_model_len "
                    f"({self._limits.max_model_len}) less the {len(self.tokens)} of the session, got {len(checked)}"
                )
            self._transcript = self._transcript.extended(checked)
            self._cut = None

    def fork(self: Own, seed: int | None = None) -> Own:
        """A session of its own that goes on from here; the tokens so far are shared, in memory and in the prefix cache.

        Without `seed` its random numbers are derived from this session's, the turn and the number of the fork.
        """
        with self._turn():
            if seed is None:
                seed = derive_seed(self._seed, self.num_turns, self._num_forks, "fork")
            child = type(self)(self._host, self._limits, self._transcript, check_seed(seed))
            self._num_forks += 1
            return child

    def close(self) -> None:
        """Take no further turns; idempotent. What was said can still be read and scored."""
        if not self._is_closed:
            with self._turn():
                self._is_closed = True

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what was said ------------------------------------------------------------------------------------------------
    @property
    def tokens(self) -> NDArray[np.int32]:
        """[L], all token ids so far."""
        return self._transcript.tokens

    @property
    def loss_mask(self) -> NDArray[np.bool_]:
        """[L], True where the policy sampled the token."""
        return self._transcript.loss_mask

    @property
    def logprobs(self) -> NDArray[np.float32]:
        """[L], under the distribution sampled from; NaN where the policy did not sample the token."""
        return self._transcript.logprobs

    @property
    def policy_logprobs(self) -> NDArray[np.float32]:
        """[L], under softmax(logits / temperature), for the mismatch KL; NaN likewise."""
        return self._transcript.policy_logprobs

    @property
    def entropy(self) -> NDArray[np.float32]:
        """[L], nats, of the same distribution; NaN likewise."""
        return self._transcript.entropy

    @property
    def policy_versions(self) -> NDArray[np.int64]:
        """[L], version of the weights that sampled the token; -1 where the policy did not."""
        return self._transcript.policy_versions

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Where each turn lies, how it was sampled and why it ended."""
        return self._transcript.turns

    @property
    def num_turns(self) -> int:
        """Turns that were generated."""
        return len(self._transcript.turns)

    @property
    def num_free_tokens(self) -> int:
        """Tokens that still fit the model: the most that `append` and `max_tokens` may ask for."""
        return self._limits.max_model_len - len(self.tokens)

    @property
    def seed(self) -> int:
        """What the seeds of turns and forks are derived from."""
        return self._seed

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays; forks share theirs until they go on."""
        return self._transcript.nbytes

    def to_rollout(self) -> Rollout:
        """All from the first sampled token to the last, as trainers take it: `Rollout.loss_mask` says which to learn.

        Raises ValueError where nothing was sampled, or turns differ in temperature.
        """
        tokenizer, sampled = self._host.tokenizer, np.flatnonzero(self.loss_mask)
        spoken = self.tokens[sampled[0] : sampled[-1] + 1] if len(sampled) else self.tokens[:0]
        return self._transcript.to_rollout(self._seed, None if tokenizer is None else tokenizer.decode(spoken))

    # -- scoring ------------------------------------------------------------------------------------------------------
    def score(self, definition: Definition = "policy_logprobs", policy: str = POLICY) -> NDArray[np.float32]:
        """Logprobs [L] of all sampled tokens, each under its turn's parameters; NaN elsewhere. See the host's `score`.

        Where one version of the weights sampled them all and is the live one, they are `policy_logprobs`, bit for bit.
        """
        return self._scored(self._host.score(*self._score_arguments(definition, policy)), definition)

    async def ascore(self, definition: Definition = "policy_logprobs", policy: str = POLICY) -> NDArray[np.float32]:
        """`score` for coroutines."""
        return self._scored(await self._host.ascore(*self._score_arguments(definition, policy)), definition)

    # -- inside -------------------------------------------------------------------------------------------------------
    @contextmanager
    def _turn(self) -> Iterator[None]:
        if self._is_closed:
            raise SessionClosedError(f"the session was closed after {self.num_turns} turns")
        if not self._busy.acquire(blocking=False):
            raise SessionBusyError(f"turn {self.num_turns} of the session is running")
        try:
            yield
        finally:
            self._busy.release()

    def _params_of_turn(self, given: SamplingParams | None) -> SamplingParams:
        params = SamplingParams() if given is None else given
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {params!r}")
        if params.n != 1:
            raise ValueError(f"sampling_params.n must be 1, got {params.n}: fork the session for several continuations")
        if params.max_tokens > self.num_free_tokens:
            raise ValueError(
                f"sampling_params.max_tokens must be at most {self.num_free_tokens}, which is max_model_len "
                f"({self._limits.max_model_len}) less the {len(self.tokens)} tokens of the session, "
                f"got {params.max_tokens}"
            )
        return params if params.seed is not None else replace(params, seed=self._seed_of_turn())

    def _seed_of_turn(self) -> int:
        return derive_seed(self._seed, self.num_turns, 0, "turn")

    def _aborted(self) -> Rollout:
        if self._cut is None:
            raise ValueError(f"resume needs a last turn that an abort cut off, got {self._last_finish()}")
        return self._cut

    def _last_finish(self) -> str:
        if not self.turns:
            return "a session without turns"
        appended = len(self.tokens) - self.turns[-1].end
        return f"one with finish_reason={self.turns[-1].finish_reason!r} and {appended} tokens after it"

    def _keep(self, before: Transcript, rollout: Rollout) -> Rollout:
        self._transcript = before.with_turn(rollout)
        is_cut = rollout.finish_reason == "abort"
        self._before, self._cut = before, rollout if is_cut else None
        return rollout

    def _score_arguments(self, definition: Definition, policy: str) -> tuple[Any, ...]:
        # Penalties and min_tokens count from the start of a turn: with them each turn is rated by itself.
        spans = self._transcript.score_spans(joins=definition != "logprobs")
        if not spans:
            raise ValueError(f"score needs a token that the policy sampled, got {len(self.tokens)} others")
        sequences = [self.tokens[:end] for _, end, _ in spans]
        return sequences, [params for *_, params in spans], definition, policy, [start for start, *_ in spans]

    def _scored(self, parts: Sequence[NDArray[np.float32]], definition: Definition) -> NDArray[np.float32]:
        scores = np.full(len(self.tokens), np.nan, np.float32)
        for (start, end, _), part in zip(self._transcript.score_spans(definition != "logprobs"), parts, strict=True):
            scores[start:end] = part
        scores[~self.loss_mask] = np.nan
        return scores


def check_seed(seed: Any) -> int:
    """The seed a user gave. Raises ValueError unless it is an integer in [0, 2^64)."""
    return check_int("seed", seed, 0, UINT64_LIMIT - 1)


def id_list(request_id: str | None) -> list[str] | None:
    """`request_ids` of a turn."""
    return None if request_id is None else [request_id]
