"""`RolloutClient`: an engine in another process, or on another machine, with the methods of `RolloutEngine`."""

from __future__ import annotations

import asyncio
import copy
import itertools
import os
import tempfile
import weakref
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.admission import AdmissionLimits
from zerokl.rollout.client_calls import FilesCall, GenerateCall, PendingCall, RolloutStream, StreamCall
from zerokl.rollout.client_link import ClientLink
from zerokl.rollout.client_observation import ClientObservationMethods
from zerokl.rollout.client_requests import generate_call, score_call
from zerokl.rollout.client_session import ClientSession
from zerokl.rollout.client_socket import LinkOptions
from zerokl.rollout.client_weights import ClientWeightMethods
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.control import POLICY
from zerokl.rollout.hooks import UpdateHooks
from zerokl.rollout.mismatch import AlarmHooks
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.pause import PauseMode, pause_mode
from zerokl.rollout.prompts import Prompt
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.scoring import Definition
from zerokl.rollout.session_host import SessionHost
from zerokl.rollout.text import Tokenizer
from zerokl.rollout.validation import check_float, check_int

_WITH_DEADLINE = frozenset(
    {"generate", "resume", "score", "update_weights", "pin_weights", "drop_weights", "sleep", "wake_up"}
    | {"pause_generation"}
)


class RolloutClient(ClientWeightMethods, ClientObservationMethods, SessionHost[ClientSession]):
    """Speaks to a `rollout-server`; a trainer that was written for `RolloutEngine` changes one line.

        with RolloutClient("tcp://127.0.0.1:5757") as engine:
            rollouts = engine.generate(["Hello"], SamplingParams(n=4, max_tokens=32))

    Any thread may call any method. A connection that breaks is made anew, and calls go on as if nothing had happened.
    Beside the errors of the engine's methods there are ServerLostError (a ConnectionError: no server for
    `reconnect_seconds`, or it was restarted and knows nothing of the call), ServerClosingError, and DeadlineError (a
    TimeoutError) after `timeout` seconds, if any: `generate` returns its rollouts so far instead, as an abort does.
    """

    _session_kind = ClientSession

    def __init__(
        self,
        endpoint: str,
        *,
        server_key: str | os.PathLike[str] | None = None,
        client_key: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
        reconnect_seconds: float = 30.0,
        name: str | None = None,
    ) -> None:
        """Connect. `server_key`: the server's public certificate, `client_key`: this client's secret one, both as
        `rollout-server keygen` writes them. Raises ValueError for wrong options, ServerLostError where no server
        answers for `reconnect_seconds`.
        """
        if (server_key is None) != (client_key is None):
            raise ValueError("server_key and client_key must be given both, or neither")
        self._timeout = _timeout(timeout)
        self._hooks = UpdateHooks()
        self._alarm_hooks = AlarmHooks()
        self._uploads = itertools.count(1)
        keys: tuple[bytes | None, bytes, bytes] = None, b"", b""
        if server_key is not None and client_key is not None:
            from zerokl.rollout.server.keys import load_certificate

            keys = (load_certificate(server_key)[0], *load_certificate(client_key, secret=True))
        options = LinkOptions(
            endpoint=endpoint,
            name=f"pid {os.getpid()}" if name is None else name,
            server_key=keys[0],
            public_key=keys[1],
            secret_key=keys[2],
            reconnect_seconds=check_float("reconnect_seconds", reconnect_seconds, "above 0", 0.0, open_low=True),
        )
        self._link = ClientLink(options)
        self._finalizer = weakref.finalize(self, self._link.close)
        try:
            self._start(PendingCall("health", {})).future.result()
        except BaseException:
            self.close()
            raise

    def within(self, timeout: float | None) -> RolloutClient:
        """This client with another `timeout` for its calls; both share the connection, which is this one's to close."""
        twin = copy.copy(self)
        twin._timeout = _timeout(timeout)
        return twin

    # -- sampling -----------------------------------------------------------------------------------------------------
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_ids: Sequence[str] | None = None,
        resume_from: Rollout | Sequence[Rollout] | None = None,
    ) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        call = generate_call(GenerateCall, prompts, sampling_params, request_ids, resume_from, self._deadline)
        rollouts: list[Rollout] = self._wait(call)
        return rollouts

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_ids: Sequence[str] | None = None,
        resume_from: Rollout | Sequence[Rollout] | None = None,
    ) -> list[Rollout]:
        """`generate` for coroutines. Cancelling the task aborts its requests."""
        call = generate_call(GenerateCall, prompts, sampling_params, request_ids, resume_from, self._deadline)
        rollouts: list[Rollout] = await self._await(call)
        return rollouts

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chunk: int = 8,
        request_ids: Sequence[str] | None = None,
        resume_from: Rollout | Sequence[Rollout] | None = None,
    ) -> RolloutStream:
        """`generate` with its tokens as they come, for `for` or `async for`; each `TokenChunk` has `chunk` or more, the
        last one fewer. A loop that falls behind gets larger chunks.
        """
        fields = {"stream": check_int("chunk", chunk, 1, 2**20), **self._deadline}
        call = generate_call(StreamCall, prompts, sampling_params, request_ids, resume_from, fields)
        return RolloutStream(call, self._link.submit, self._link.cancel)

    def new_session_seed(self) -> int:
        """See `RolloutEngine.new_session_seed`."""
        seed: int = self._call("new_session_seed")
        return seed

    # -- scoring ------------------------------------------------------------------------------------------------------
    def score(
        self,
        token_ids: Prompt | Rollout | Sequence[Prompt | Rollout],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        definition: Definition = "policy_logprobs",
        policy: str = POLICY,
        prompt_lens: Sequence[int] | None = None,
    ) -> list[NDArray[np.float32]]:
        """See `RolloutEngine.score`."""
        call = score_call(token_ids, sampling_params, definition, policy, prompt_lens, self._deadline)
        scores: list[NDArray[np.float32]] = self._wait(call)
        return scores

    async def ascore(
        self,
        token_ids: Prompt | Rollout | Sequence[Prompt | Rollout],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        definition: Definition = "policy_logprobs",
        policy: str = POLICY,
        prompt_lens: Sequence[int] | None = None,
    ) -> list[NDArray[np.float32]]:
        """`score` for coroutines."""
        call = score_call(token_ids, sampling_params, definition, policy, prompt_lens, self._deadline)
        scores: list[NDArray[np.float32]] = await self._await(call)
        return scores

    # -- control ------------------------------------------------------------------------------------------------------
    def abort(self, ids: str | Collection[str]) -> int:
        """See `RolloutEngine.abort`; ids are the server's, not only this client's."""
        num_aborted: int = self._call("abort", ids=[ids] if isinstance(ids, str) else list(ids))
        return num_aborted

    def abort_all(self) -> int:
        """See `RolloutEngine.abort_all`: the requests of all clients."""
        num_aborted: int = self._call("abort_all")
        return num_aborted

    def pause_generation(self, mode: PauseMode = "wait") -> None:
        """See `RolloutEngine.pause_generation`."""
        self._call("pause_generation", mode=pause_mode(mode))

    def resume_generation(self) -> None:
        """See `RolloutEngine.resume_generation`."""
        self._call("resume_generation")

    def reset_prefix_cache(self) -> None:
        """See `RolloutEngine.reset_prefix_cache`."""
        self._call("reset_prefix_cache")

    def describe_worker(self) -> dict[str, Any]:
        """See `RolloutEngine.describe_worker`."""
        return self.describe_ranks()[0]

    def describe_ranks(self) -> list[dict[str, Any]]:
        """See `RolloutEngine.describe_ranks`."""
        facts: list[dict[str, Any]] = self._call("describe_ranks")
        return facts

    def close(self) -> None:
        """Leave the server, which goes on; calls in flight raise ConnectionError. Idempotent."""
        self._link.close()
        self._finalizer.detach()

    def __enter__(self) -> RolloutClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def config(self) -> EngineConfig:
        """The engine's options, as the server's engine has them."""
        return EngineConfig.from_dict(self._description[0])

    @cached_property
    def limits(self) -> AdmissionLimits:
        """What a request may hold at most."""
        config = self.config
        assert config.max_model_len is not None and config.num_blocks is not None, "an unresolved config"
        return AdmissionLimits(
            max_model_len=config.max_model_len,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            vocab_size=self.model_config.vocab_size,
        )

    @property
    def model_config(self) -> ModelConfig:
        """The model's configuration."""
        return self._description[1]

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The engine's tokenizer, if it has one."""
        return self._description[2]

    # -- inside -------------------------------------------------------------------------------------------------------
    @cached_property
    def _description(self) -> tuple[Mapping[str, Any], ModelConfig, Tokenizer | None]:
        value, files = self._start(FilesCall("describe_engine", {})).future.result()
        with tempfile.TemporaryDirectory(prefix="zerokl-client-") as scratch:
            folder = Path(scratch)
            for name in ("config.json", "generation_config.json", "tokenizer.json"):
                if name in files:
                    (folder / name).write_bytes(files[name])
            model = ModelConfig.from_json(folder)
            return value["config"], model, Tokenizer(folder) if "tokenizer.json" in files else None

    @property
    def _deadline(self) -> dict[str, float]:
        return {} if self._timeout is None else {"deadline": self._timeout}

    def _call(self, kind: str, **body: Any) -> Any:
        fields = {name: value for name, value in body.items() if value is not None}
        return self._wait(PendingCall(kind, fields | (self._deadline if kind in _WITH_DEADLINE else {})))

    def _start(self, call: PendingCall) -> PendingCall:
        self._link.submit(call)
        return call

    def _wait(self, call: PendingCall) -> Any:
        self._link.submit(call)
        try:
            return call.future.result()
        except KeyboardInterrupt:
            self._link.cancel(call)
            raise

    async def _await(self, call: PendingCall) -> Any:
        self._link.submit(call)
        try:
            return await asyncio.wrap_future(call.future)
        except asyncio.CancelledError:
            self._link.cancel(call)
            raise


def _timeout(seconds: float | None) -> float | None:
    return None if seconds is None else check_float("timeout", seconds, "None or in (0, 1e6]", 0.0, 1e6, open_low=True)
