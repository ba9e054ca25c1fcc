"""The public engine: prompts in, rollouts out; scores; weights; and nothing of how steps are run."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.admission import AdmissionLimits
from zerokl.rollout.calls import CallMaker
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.control import POLICY, WeightSets
from zerokl.rollout.engine_loop import EngineLoop
from zerokl.rollout.engine_observation import ObservationMethods
from zerokl.rollout.engine_pause import PauseMethods
from zerokl.rollout.engine_weights import WeightMethods
from zerokl.rollout.errors import EngineClosedError, EngineFailedError
from zerokl.rollout.expert_balance import ExpertBalance
from zerokl.rollout.in_flight import InFlightRequests
from zerokl.rollout.kv_cache import KVCacheManager
from zerokl.rollout.mismatch import MismatchMonitor
from zerokl.rollout.model_folder import find_tokenizer, resolve_config
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.prompts import Prompt
from zerokl.rollout.ranks import Ranks, make_ranks, overlapping_worker
from zerokl.rollout.resumption import RoutingForm
from zerokl.rollout.routing_store import RankRouting
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.scheduler_config import SchedulerConfig
from zerokl.rollout.scoring import Definition
from zerokl.rollout.session import Session
from zerokl.rollout.session_host import SessionHost
from zerokl.rollout.sleep import Sleep
from zerokl.rollout.stop import StopStrings
from zerokl.rollout.submission import Result, Submission
from zerokl.rollout.text import Tokenizer
from zerokl.rollout.weight_source import FolderWeights
from zerokl.rollout.weight_updates import WeightUpdates
from zerokl.rollout.worker import Worker


class RolloutEngine(WeightMethods, PauseMethods, ObservationMethods, SessionHost[Session]):
    """Samples from a policy, and rates tokens under it, with logprobs that do not depend on what else is running.

        with RolloutEngine(EngineConfig(model="models/SmolLM2")) as engine:
            rollouts = engine.generate(["Hello"], SamplingParams(n=4, max_tokens=32))
            engine.update_weights(policy.named_arrays())

    Any thread may call any method; concurrent calls share the batch. A ValueError is about an argument and leaves
    everything as it was. When a step fails, the calls in flight and all later ones raise EngineFailedError; after
    `close` they raise EngineClosedError. An engine that is forgotten closes itself when collected, or at exit.
    """

    _session_kind = Session

    def __init__(self, config: EngineConfig, *, make_worker: Callable[[EngineConfig], Worker] | None = None) -> None:
        """Load model and tokenizer (version 0 of the weights) and start the engine's thread.

        `make_worker` gets the completed config and makes the worker of an engine of one rank, in place of the kind that
        `config.worker` names. Several ranks are processes, started together.
        Raises ValueError for a folder that is not a usable model, or options that do not suit it.
        """
        if not isinstance(config, EngineConfig):
            raise ValueError(f"config must be an EngineConfig, got {config!r}")
        self._model_config = ModelConfig.from_json(config.model)
        self._config = resolve_config(config, self._model_config)
        self._tokenizer = find_tokenizer(self._config)
        ranks = make_ranks(self._config, make_worker)
        try:
            self._start(ranks)
        except BaseException:
            ranks.close()
            raise

    def _start(self, ranks: Ranks) -> None:
        config = self._config
        assert config.max_model_len is not None and config.num_blocks is not None, "an unresolved config"
        routing = RankRouting.of_engine(config, self._model_config.moe, config.num_ranks)
        kv_caches = [
            KVCacheManager(
                config.num_blocks, config.block_size, config.enable_prefix_caching, partial(routing.keep, rank)
            )
            for rank in range(config.num_ranks)
        ]
        stop_strings = StopStrings(self._tokenizer)
        self._scheduler = Scheduler(_budgets(config), kv_caches, stop_strings)
        self._weights = WeightSets(ranks, self._scheduler)
        self._sleep = Sleep(ranks, self._weights, self._scheduler, routing)
        self._weights.load_first(FolderWeights(path=config.model))
        self._ranks = ranks
        overlapping = overlapping_worker(ranks, config)
        if overlapping is not None:
            overlapping.warm_up()
        self._facts = [{key: facts[key] for key in ("kind", "pid", "num_threads")} for facts in ranks.describe()]
        assert config.rank_roles is not None, "an unresolved config"
        self._roles = config.rank_roles
        self._mismatch = MismatchMonitor(config.k3_alarm)
        self._limits = AdmissionLimits(
            max_model_len=config.max_model_len,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            vocab_size=self._model_config.vocab_size,
        )
        self._calls = CallMaker(
            self._limits, self._tokenizer, self._model_config.eos_token_ids, config.seed, self._routing_form()
        )
        staging = threading.Lock()
        self._balance = ExpertBalance(config, self._model_config, ranks, staging)
        self._loop = EngineLoop(
            self._scheduler,
            ranks,
            self._weights,
            stop_strings,
            config.block_size,
            self._sleep.check_awake,
            after_step=self._balance.count_step,
            routing=routing,
            begin_step=None if overlapping is None else overlapping.begin,
        )
        in_flight = InFlightRequests(
            self._scheduler, kv_caches, stop_strings, deliver=self._loop.deliver, refuse=self._loop.refuse
        )
        self._updates = WeightUpdates(self._loop, self._weights, in_flight, self._sleep, staging)
        self._loop.start()
        ranks.watch(self._loop, self._scheduler.lose_ranks)
        self._finalizer = weakref.finalize(self, _forget, self._loop)

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
        self._check_policy(policy)
        scores, call = self._calls.score_call(token_ids, sampling_params, definition, policy, prompt_lens)
        if call is not None:
            self._loop.submit(call)
        return Submission(call, scores.logprobs)

    # -- control ------------------------------------------------------------------------------------------------------
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

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, on all ranks. Requests in flight keep their blocks."""
        self._loop.at_boundary(self._scheduler.reset_prefix_cache).result()

    def metrics(self) -> dict[str, float]:
        """Counters since the start, and sizes of now, all ranks together; `health` has what each rank holds.

        They are read without stopping the loop, so they may be a step apart.
        """
        failures = {"weight_update_failures": self._updates.num_failures}
        return {**self._loop.metrics(), **self._balance.metrics(), **self._ranks.metrics(), **failures}

    @property
    def rank_pids(self) -> list[int]:
        """The process of each rank now; one that is started anew has another."""
        return self._ranks.pids

    def health(self) -> dict[str, Any]:
        """State, cause of a failure, load, weight versions, errors of hooks, parts asleep, facts of the first worker.

        `ranks` holds of each rank its role, the worker's kind, pid and num_threads, the requests running there, its KV
        blocks and its tokens since the start.

        `inexact_weights` are the sets published as rounded otherwise than in the trainer's forward: the mismatch KL is
        not 0 under them. States are "running", "draining", "paused", "asleep", "failed" and "closed".
        """
        cause, state = self._loop.cause, self._loop.state
        return {
            "state": "asleep" if state == "running" and self._sleep.parts else state,
            "cause": None if cause is None else repr(cause),
            "num_running": self._scheduler.num_running,
            "num_waiting": self._scheduler.num_waiting,
            "num_held": self._loop.num_held,
            "weight_versions": dict(self._weights.versions),
            "inexact_weights": sorted(self._weights.inexact),
            "hook_errors": self._updates.hooks.num_errors,
            "asleep": dict(self._sleep.parts),
            "worker": {**self._facts[0], "pid": self._ranks.pids[0]},
            "ranks": [
                {"rank": rank, "role": role, **facts, "pid": pid, **load}
                for rank, (role, facts, pid, load) in enumerate(
                    zip(self._roles, self._facts, self._ranks.pids, self._scheduler.rank_metrics(), strict=True)
                )
            ],
        }

    def describe_worker(self) -> dict[str, Any]:
        """Facts of the first rank's worker now: see `describe_ranks`."""
        return self.describe_ranks()[0]

    def describe_ranks(self) -> list[dict[str, Any]]:
        """Facts of each rank's worker now: kind, pid, num_threads, peak_rss_bytes of its process, weight versions by
        name."""
        return self._loop.at_boundary(self._ranks.describe).result()

    def close(self) -> None:
        """Stop after the current step, for which ranks that are processes have 5 seconds; free everything; idempotent.

        Calls in flight raise EngineClosedError.
        """
        self._loop.close()
        self._finalizer.detach()

    def __enter__(self) -> RolloutEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def config(self) -> EngineConfig:
        """The engine's options with those that follow from the model filled in."""
        return self._config

    @property
    def limits(self) -> AdmissionLimits:
        """What a request may hold at most."""
        return self._limits

    @property
    def model_config(self) -> ModelConfig:
        """The model's configuration."""
        return self._model_config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, if the model folder or `config.tokenizer` has one."""
        return self._tokenizer

    # -- inside -------------------------------------------------------------------------------------------------------
    def _routing_form(self) -> RoutingForm | None:
        returned, moe = self._config.return_routing, self._model_config.moe
        if returned == "none" or moe is None:
            return None
        return RoutingForm(returned=returned, num_mixtures=len(moe.layers), top_k=moe.top_k)

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


def _budgets(config: EngineConfig) -> SchedulerConfig:
    assert config.batched_token_timeout is not None and config.rank_roles is not None, "an unresolved config"
    return SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        batched_token_timeout=config.batched_token_timeout,
        roles=tuple(config.rank_roles),
    )


def _forget(loop: EngineLoop) -> None:
    """End the loop of an engine that was collected, or at exit, which is the main thread's and waits for it.

    Any other thread may be one that the loop waits for to end, such as the one that watches the ranks.
    """
    loop.close(wait=threading.current_thread() is threading.main_thread())
