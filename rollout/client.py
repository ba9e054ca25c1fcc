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

from zerokl.rollout.client_calls import FilesCall, GenerateCall, PendingCall, RolloutStream, ScoreCall, StreamCall
from zerokl.rollout.client_link import ClientLink, LinkOptions
from zerokl.rollout.client_observation import ClientObservationMethods
from zerokl.rollout.client_weights import ClientWeightMethods
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.control import POLICY
from zerokl.rollout.hooks import UpdateHooks
from zerokl.rollout.mismatch import AlarmHooks
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.pause import PauseMode, pause_mode
from zerokl.rollout.prompts import Prompt, check_ids, params_list, prompt_list
from zerokl.rollout.protocol.records import DistinctParams, prompts_to_arrays, rollouts_to_wire
from zerokl.rollout.resumption import rollout_list
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.scoring import Definition
from zerokl.rollout.text import Tokenizer
from zerokl.rollout.token_ids import as_token_ids
from zerokl.rollout.validation import check_float, check_int

_WITH_DEADLINE = frozenset(
    {"generate", "resume", "score", "update_weights", "pin_weights", "drop_weights", "sleep", "wake_up"}
    | {"pause_generation"}
)


class RolloutClient(ClientWeightMethods, ClientObservationMethods):
    """Speaks to a `rollout-server`; a trainer that was written for `RolloutEngine` changes one line.

        with RolloutClient("tcp://127.0.0.1:5757") as engine:
            rollouts = engine.generate(["Hello"], SamplingParams(n=4, max_tokens=32))

    Any thread may call any method. A connection that breaks is made anew, and calls go on as if nothing had happened.
    Beside the errors of the engine's methods there are ServerLostError (a ConnectionError: no server for
    `reconnect_seconds`, or it was restarted and knows nothing of the call), ServerClosingError, and DeadlineError (a
    TimeoutError) after `timeout` seconds, if any: `generate` returns its rollouts so far instead, as an abort does.
    """

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
        call = self._generate_call(GenerateCall, prompts, sampling_params, request_ids, resume_from, {})
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
        call = self._generate_call(GenerateCall, prompts, sampling_params, request_ids, resume_from, {})
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
        fields = {"stream": check_int("chunk", chunk, 1, 2**20)}
        call = self._generate_call(StreamCall, prompts, sampling_params, request_ids, resume_from, fields)
        assert isinstance(call, StreamCall)
        return RolloutStream(call, self._link.submit, self._link.cancel)

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
        call = self._score_call(token_ids, sampling_params, definition, policy, prompt_lens)
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
        call = self._score_call(token_ids, sampling_params, definition, policy, prompt_lens)
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

    def _generate_call(
        self,
        kind: type[GenerateCall],
        prompts: Any,
        sampling_params: Any,
        request_ids: Sequence[str] | None,
        resume_from: Any,
        fields: Mapping[str, Any],
    ) -> GenerateCall:
        if resume_from is not None:
            if prompts is not None or sampling_params is not None:
                raise ValueError("prompts and sampling_params must be None with resume_from: a rollout has its own")
            rollouts = rollout_list(resume_from)
            ids = {} if request_ids is None else {"request_ids": check_ids(request_ids, len(rollouts))}
            body, arrays = rollouts_to_wire(rollouts)
            return kind("resume", {**body, **ids, **fields, **self._deadline}, arrays)
        listed = prompt_list(prompts, "prompts")
        params, index = _params(sampling_params, len(listed))
        ids = {} if request_ids is None else {"request_ids": check_ids(request_ids, len(listed))}
        checked = [
            prompt if isinstance(prompt, str) else _tokens(prompt, f"prompts[{number}]")
            for number, prompt in enumerate(listed)
        ]
        body = {**params, **ids, **fields, **self._deadline}
        return kind("generate", body, prompts_to_arrays(_encodable(checked)) | index)

    def _score_call(
        self, sequences: Any, sampling_params: Any, definition: Any, policy: Any, prompt_lens: Any
    ) -> ScoreCall:
        items = [sequences] if isinstance(sequences, Rollout) else prompt_list(sequences, "token_ids")
        if sampling_params is None and any(isinstance(item, Rollout) for item in items):
            default = SamplingParams()
            sampling_params = [item.sampling_params if isinstance(item, Rollout) else default for item in items]
        params, index = _params(sampling_params, len(items))
        tokens = [_tokens(item, f"token_ids[{number}]") for number, item in enumerate(items)]
        arrays: dict[str, NDArray[Any]] = {
            "token_ids": np.concatenate(tokens),
            "lens": np.array([len(one) for one in tokens], np.int32),
            **index,
        }
        lens = _prompt_lens(items, prompt_lens)
        if lens is not None:
            arrays["prompt_lens"] = lens
        body = {**params, "definition": definition, "policy": policy, **self._deadline}
        return ScoreCall("score", body, arrays)

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


def _params(given: Any, count: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """(fields, arrays) for the parameters of a call."""
    if given is None:
        return {}, {}
    params = DistinctParams()
    places = [params.place(one) for one in params_list(given, count)]
    index = {} if len(params.distinct) == 1 else {"params_index": np.array(places, np.int32)}
    return {"sampling_params": params.distinct}, index


def _tokens(item: Any, name: str) -> NDArray[np.int32]:
    if isinstance(item, Rollout):
        return np.concatenate([item.prompt_token_ids, item.token_ids])
    if isinstance(item, str):
        raise ValueError(f"{name} must be token ids or a Rollout: scoring takes no text, got {item!r}")
    return as_token_ids(name, item)


def _prompt_lens(items: list[Any], given: Any) -> NDArray[np.int32] | None:
    if given is None:
        if not any(isinstance(item, Rollout) for item in items):
            return None
        given = [len(item.prompt_token_ids) if isinstance(item, Rollout) else 1 for item in items]
    if not isinstance(given, (Sequence, np.ndarray)) or len(given) != len(items):
        raise ValueError(f"prompt_lens must have one integer per sequence ({len(items)}), got {given!r:.200}")
    checked = [check_int(f"prompt_lens[{index}]", value, 1, 2**31 - 1) for index, value in enumerate(given)]
    return np.array(checked, np.int32)


def _encodable(prompts: list[Any]) -> list[Any]:
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"prompts[{index}] must be text that UTF-8 can hold: {error}") from None
    return prompts
