"""The public engine: prompts in, rollouts out; scores; weights; and nothing of how steps are run."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from types import TracebackType

from zerokl.rollout.admission import AdmissionLimits
from zerokl.rollout.calls import CallMaker
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.control import WeightSets
from zerokl.rollout.engine_calls import CallMethods
from zerokl.rollout.engine_loop import EngineLoop
from zerokl.rollout.engine_observation import ObservationMethods
from zerokl.rollout.engine_pause import PauseMethods
from zerokl.rollout.engine_weights import WeightMethods
from zerokl.rollout.expert_balance import ExpertBalance
from zerokl.rollout.in_flight import InFlightRequests
from zerokl.rollout.kv_cache import KVCacheManager
from zerokl.rollout.mismatch import MismatchMonitor
from zerokl.rollout.model_folder import find_tokenizer, resolve_config
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.ranks import Ranks, make_ranks, overlapping_ranks
from zerokl.rollout.resumption import RoutingForm
from zerokl.rollout.routing_store import RankRouting
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.scheduler_config import SchedulerConfig
from zerokl.rollout.session import Session
from zerokl.rollout.session_host import SessionHost
from zerokl.rollout.sleep import Sleep
from zerokl.rollout.stop import StopStrings
from zerokl.rollout.text import Tokenizer
from zerokl.rollout.weight_source import FolderWeights
from zerokl.rollout.weight_updates import WeightUpdates
from zerokl.rollout.worker import Worker


class RolloutEngine(CallMethods, WeightMethods, PauseMethods, ObservationMethods, SessionHost[Session]):
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
        self._limits = AdmissionLimits.of_engine(self._config, self._model_config.vocab_size)
        self._calls = CallMaker(
            self._limits, self._tokenizer, self._model_config.eos_token_ids, self._config.seed, self._routing_form()
        )
        self._mismatch = MismatchMonitor(self._config.k3_alarm)
        ranks = make_ranks(self._config, make_worker)
        try:
            self._start(ranks)
        except BaseException:
            ranks.close()
            raise

    def _start(self, ranks: Ranks) -> None:
        config = self._config
        routing = RankRouting.of_engine(config, self._model_config.moe, config.num_ranks)
        kv_caches = _kv_caches(config, routing)
        stop_strings = StopStrings(self._tokenizer)
        self._scheduler = Scheduler(_budgets(config), kv_caches, stop_strings)
        self._weights = WeightSets(ranks, self._scheduler)
        self._sleep = Sleep(ranks, self._weights, self._scheduler, routing)
        self._weights.load_first(FolderWeights(path=config.model))
        self._ranks = ranks
        overlapping = overlapping_ranks(ranks, config)
        if overlapping is not None:
            overlapping.warm_up()
        self._facts = [{key: facts[key] for key in ("kind", "pid", "num_threads")} for facts in ranks.describe()]
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

    # -- control ------------------------------------------------------------------------------------------------------
    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, on all ranks. Requests in flight keep their blocks."""
        self._loop.at_boundary(self._scheduler.reset_prefix_cache).result()

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


def _kv_caches(config: EngineConfig, routing: RankRouting) -> list[KVCacheManager]:
    """One per rank; what it frees, the routing of these tokens is copied from."""
    assert config.num_blocks is not None, "an unresolved config"
    return [
        KVCacheManager(config.num_blocks, config.block_size, config.enable_prefix_caching, partial(routing.keep, rank))
        for rank in range(config.num_ranks)
    ]


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
