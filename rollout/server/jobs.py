"""What clients ask for, done on the engine: the server's own thread never waits for it.

intake    one thread: reads calls, submits them in order of arrival, aborts
results   one thread: makes records (texts!) of calls that are finished
commands  a few threads: what blocks until a step boundary, or until requests have finished
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from zerokl.rollout.control import Call
from zerokl.rollout.errors import EngineClosedError, EngineFailedError
from zerokl.rollout.protocol.codec import Message
from zerokl.rollout.protocol.failures import CallCancelledError, failure_of
from zerokl.rollout.protocol.records import params_of_message, prompts_of_arrays, rollouts_from_wire, split
from zerokl.rollout.server.answers import (
    describe_engine,
    expert_load,
    result_cost,
    rollout_messages,
    score_messages,
    take_report,
    telemetry,
)
from zerokl.rollout.server.ledger import Ledger
from zerokl.rollout.server.limits import ServerLimits
from zerokl.rollout.server.served_call import Outcome, ServedCall
from zerokl.rollout.server.streams import TokenFeed
from zerokl.rollout.server.uploads import Uploads
from zerokl.rollout.submission import Submission

if TYPE_CHECKING:
    from zerokl.rollout.engine import RolloutEngine

_NUM_COMMAND_THREADS = 4
_QUICK_BYTES = 8192
"""Message and longest result of a call that is too small to be worth another thread's while."""
_QUICK_PROMPTS = 4


class EngineJobs:
    """Starts calls and posts their outcomes. Methods are the server's thread's."""

    def __init__(
        self,
        engine: RolloutEngine,
        limits: ServerLimits,
        ledger: Ledger,
        post: Callable[[ServedCall, Outcome], None],
        server_facts: Callable[[], dict[str, float]],
    ) -> None:
        """`post` takes a call that is done, in any thread; `server_facts` are added to the metrics."""
        self._engine = engine
        self._ledger = ledger
        self._post = post
        self._server_facts = server_facts
        self._uploads = Uploads(limits.max_upload_bytes)
        self._feeds: tuple[TokenFeed, ...] = ()
        self._intake = ThreadPoolExecutor(1, "zerokl-intake")
        self._last_taken_in: Future[None] | None = None
        self._results = ThreadPoolExecutor(1, "zerokl-results")
        self._commands = ThreadPoolExecutor(_NUM_COMMAND_THREADS, "zerokl-command")
        self._begin: dict[str, Callable[[ServedCall, Message], None]] = {
            "generate": self._generate,
            "resume": self._generate,
            "score": self._score,
            "upload": self._upload,
            "update_weights": self._update,
            "abort": lambda call, message: self._answer_later(call, engine.submit_abort(message.body["ids"])),
            "abort_all": lambda call, _: self._answer_later(call, engine.submit_abort(None)),
            "pause_generation": lambda call, message: self._answer_later(
                call, engine.submit_pause(message.body["mode"])
            ),
            "resume_generation": lambda call, _: self._answer_later(call, engine.submit_resume()),
            "new_session_seed": lambda call, _: self._answer(call, engine.new_session_seed()),
            "get_weight_version": lambda call, message: self._answer(
                call, engine.get_weight_version(message.body["name"])
            ),
            "health": lambda call, _: self._answer(call, engine.health()),
            "metrics": lambda call, _: self._answer(call, {**engine.metrics(), **self._server_facts()}),
            "telemetry": lambda call, _: self._answer(call, telemetry(engine, self._server_facts())),
            "report_trainer_logprobs": lambda call, message: self._in_background(call, take_report, engine, message),
            "pin_weights": lambda call, message: self._in_background(call, engine.pin_weights, message.body["name"]),
            "drop_weights": lambda call, message: self._in_background(call, engine.drop_weights, message.body["name"]),
            "sleep": lambda call, message: self._in_background(call, _sleep, engine, message.body),
            "wake_up": lambda call, message: self._in_background(call, engine.wake_up, message.body.get("tags")),
            "reset_prefix_cache": lambda call, _: self._in_background(call, engine.reset_prefix_cache),
            "describe_ranks": lambda call, _: self._in_background(call, engine.describe_ranks),
            "expert_load": lambda call, message: self._in_background(call, expert_load, engine, message.body["reset"]),
            "rebalance_experts": lambda call, _: self._in_background(call, engine.rebalance_experts),
            "describe_engine": lambda call, _: self._describe_engine(call),
        }
        self._unwatch = engine.watch_steps(self._collect)

    def start(self, call: ServedCall, message: Message) -> None:
        """Begin a call, after all that were begun before; one that is soon begun before this returns."""
        begin = partial(self._begin[message.kind], call, message)
        is_idle = self._last_taken_in is None or self._last_taken_in.done()
        if is_idle and call.nbytes <= _QUICK_BYTES and _is_soon_begun(message):
            self._guard(call, begin)
        else:
            self._last_taken_in = self._intake.submit(self._guard, call, begin)

    def call_off(self, call: ServedCall) -> None:
        """Have a call end soon; its outcome is posted as ever."""
        if call.is_called_off:
            return
        call.is_called_off = True
        self._intake.submit(self._call_off, call)

    def add_feed(self, feed: TokenFeed) -> None:
        """Collect for a further client."""
        self._feeds = (*self._feeds, feed)

    def drop_client(self, client: bytes, feed: TokenFeed) -> None:
        """Forget what is kept for a client."""
        self._feeds = tuple(other for other in self._feeds if other is not feed)
        self._intake.submit(self._uploads.drop_client, client)

    def close(self) -> None:
        """End the threads, after what they are about. The engine must have been closed, or have nothing in flight."""
        self._unwatch()
        for threads in (self._intake, self._commands, self._results):
            threads.shutdown(cancel_futures=True)

    # -- in other threads ---------------------------------------------------------------------------------------------
    def _guard(self, call: ServedCall, action: Callable[[], None]) -> None:
        if call.is_answered:
            self._post(call, CallCancelledError("the call was given up before it began"))
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever it is, the client must hear of it
            self._post(call, error)

    def _collect(self) -> None:
        for feed in self._feeds:
            feed.collect()

    def _generate(self, call: ServedCall, message: Message) -> None:
        ids = message.body.get("request_ids")
        if message.kind == "resume":
            rollouts = rollouts_from_wire(message.body, message.arrays)
            params = [rollout.sampling_params for rollout in rollouts]
            lens = np.array([len(rollout.prompt_token_ids) for rollout in rollouts])
            self._promise(call, len(rollouts), result_cost(lens, np.ones(len(lens), int), params))
            self._submitted(call, message, self._engine.submit(resume_from=rollouts, request_ids=ids))
            return
        prompts = prompts_of_arrays(message.arrays)
        given = params_of_message(message.body, message.arrays, len(prompts))
        samples = np.ones(len(prompts), np.int64) if given is None else np.array([one.n for one in given], np.int64)
        cost = result_cost(np.abs(message.arrays["prompt_lens"].astype(np.int64)), samples, given)
        self._promise(call, int(samples.sum()), cost)
        self._submitted(call, message, self._engine.submit(prompts, given, request_ids=ids))

    def _promise(self, call: ServedCall, num_requests: int, nbytes: int) -> None:
        self._ledger.take(call.client, nbytes, num_requests)
        call.nbytes += nbytes
        call.num_requests += num_requests

    def _submitted(self, call: ServedCall, message: Message, submission: Submission[Any]) -> None:
        call.submission = submission
        call.request_ids = submission.request_ids
        if "stream" in message.body and isinstance(submission.call, Call):
            call.feed.add(call.number, submission.call.requests, message.body["stream"])
        if call.nbytes <= _QUICK_BYTES:  # read by the server's thread when the message is made
            submission.future.add_done_callback(lambda _: self._conclude(call, partial(_read_rollouts, call)))
        else:
            submission.future.add_done_callback(
                lambda _: self._results.submit(
                    self._conclude, call, lambda done: rollout_messages(call.number, done.read())
                )
            )

    def _score(self, call: ServedCall, message: Message) -> None:
        body, arrays = message.body, message.arrays
        sequences = split("token_ids", arrays["token_ids"], arrays["lens"].tolist())
        given = params_of_message(body, arrays, len(sequences))
        lens = arrays.get("prompt_lens")
        self._promise(call, len(sequences), 8 * len(arrays["token_ids"]))
        submission = self._engine.submit_score(
            sequences, given, body["definition"], body["policy"], None if lens is None else lens.tolist()
        )
        call.submission = submission
        call.request_ids = submission.request_ids
        submission.future.add_done_callback(
            lambda _: self._results.submit(self._conclude, call, lambda done: score_messages(call.number, done.read()))
        )

    def _conclude(self, call: ServedCall, messages: Callable[[Submission[Any]], Iterator[Message]]) -> None:
        # The future keeps its callbacks and these the call: a circle, which only the garbage collector would free.
        submission, call.submission = call.submission, None
        assert submission is not None, "concluded twice"
        error = submission.future.exception()
        if error is None and not call.is_answered:
            self._guard(call, lambda: self._post(call, messages(submission)))
        else:
            self._post(call, error or CallCancelledError("the call was given up"))

    def _upload(self, call: ServedCall, message: Message) -> None:
        body = message.body
        self._uploads.add(call.client, body["upload"], body["pieces"], message.arrays["data"])
        self._answer(call, None)

    def _update(self, call: ServedCall, message: Message) -> None:
        body = message.body
        options = {name: body[name] for name in ("kv", "max_staleness", "bucket_bytes") if name in body}
        call.update = self._engine.prepare_update(
            self._source(call, body),
            body.get("version"),
            mode=body["mode"],
            on_stale=body["on_stale"],
            allow_rewind=body["allow_rewind"],
            **options,
        )
        self._in_background(call, call.update.run)

    def _source(self, call: ServedCall, body: Any) -> Any:
        from zerokl.weight_sync import PublishedDeviceWeights, PublishedFile, PublishedShards, PublishedWeights

        kind = body["source"]
        needed = {"folder": "path", "file": "path", "upload": "upload"}.get(kind, "published")
        if needed not in body or (kind == "file" and "version" not in body):
            raise ValueError(f"update_weights: source {kind!r} needs {needed}{' and version' * (kind == 'file')}")
        if kind == "folder":
            return body["path"]
        if kind == "file":
            return PublishedFile(path=body["path"], version=body["version"])
        if kind == "upload":
            return self._uploads.take(call.client, body["upload"])
        publications: dict[str, Any] = {
            "shared": PublishedWeights,
            "shards": PublishedShards,
            "device": PublishedDeviceWeights,
        }
        return publications[kind].from_bytes(body["published"])

    def _describe_engine(self, call: ServedCall) -> None:
        self._commands.submit(
            self._guard, call, lambda: self._post(call, iter([describe_engine(self._engine, call.number)]))
        )

    def _in_background(self, call: ServedCall, function: Callable[..., Any], *arguments: Any) -> None:
        self._commands.submit(self._guard, call, lambda: self._answer(call, function(*arguments)))

    def _answer(self, call: ServedCall, value: Any) -> None:
        self._post(call, iter([Message(kind="result", call=call.number, body={"value": value})]))

    def _answer_later(self, call: ServedCall, future: Future[Any]) -> None:
        call.future = future

        def answer(done: Future[Any]) -> None:
            call.future = None  # as in `_conclude`
            if done.cancelled():
                self._post(call, CallCancelledError("the call was given up"))
            elif (error := done.exception()) is not None:
                self._post(call, error)
            else:
                self._answer(call, done.result())

        future.add_done_callback(answer)

    def _call_off(self, call: ServedCall) -> None:
        with contextlib.suppress(EngineClosedError, EngineFailedError, CancelledError):  # then it ends by itself
            submission, future = call.submission, call.future  # another thread takes them away once they are done
            if submission is not None:
                self._engine.submit_abort(submission.request_ids)
            elif call.update is not None:
                call.update.give_up()
            elif future is not None:
                future.cancel()


def _is_soon_begun(message: Message) -> bool:
    """Whether a call of few bytes is of few requests, too, and has no text to be tokenized."""
    return (
        message.kind == "generate"
        and len(message.arrays["prompt_lens"]) <= _QUICK_PROMPTS
        and not len(message.arrays["prompt_text"])
        and all(fields.get("n", 1) == 1 for fields in message.body.get("sampling_params", ()))
    )


def _read_rollouts(call: ServedCall, submission: Submission[Any]) -> Iterator[Message]:
    """The messages of a call's rollouts, which are read with the first of them."""
    try:
        yield from rollout_messages(call.number, submission.read())
    except Exception as error:  # noqa: BLE001 - whatever it is, the client must hear of it and the server go on
        yield Message(kind="error", call=call.number, body=failure_of(error))


def _sleep(engine: RolloutEngine, body: Any) -> None:
    engine.sleep(body.get("tags"), body["level"], spill_dir=body.get("spill_dir"))
