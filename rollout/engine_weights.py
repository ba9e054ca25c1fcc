"""The engine's methods about weights: updates, hooks, pinned sets."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerokl.rollout.control import POLICY, Exclusive, WeightSets
from zerokl.rollout.engine_loop import EngineLoop
from zerokl.rollout.expert_balance import ExpertBalance, ExpertLoad
from zerokl.rollout.hooks import Hook, HookName, OnHookError
from zerokl.rollout.hot_swap import HotSwapping
from zerokl.rollout.in_flight import InFlightOptions, KVMode, OnStale, UpdateMode
from zerokl.rollout.sleep import Sleep, SleepTag, sleep_level, sleep_tags
from zerokl.rollout.weight_source import check_source, weight_source
from zerokl.rollout.weight_updates import WeightUpdate, WeightUpdates

if TYPE_CHECKING:
    from concurrent.futures import Future

    from zerokl.rollout.config import EngineConfig
    from zerokl.weight_sync import PublishedDeviceWeights, PublishedWeights

    Source = Mapping[str, Any] | Iterable[tuple[str, Any]] | str | Path | PublishedWeights | PublishedDeviceWeights


class WeightMethods(HotSwapping):
    """The part of `RolloutEngine` that changes weights; the engine makes the collaborators."""

    _loop: EngineLoop
    _weights: WeightSets
    _updates: WeightUpdates
    _sleep: Sleep
    _balance: ExpertBalance
    _config: EngineConfig

    def update_weights(
        self,
        source: Source,
        version: int | None = None,
        *,
        mode: UpdateMode = "wait",
        kv: KVMode | None = None,
        max_staleness: int | None = None,
        on_stale: OnStale = "requeue",
        allow_rewind: bool = False,
        bucket_bytes: int | None = None,
    ) -> int:
        """Replace the policy's weights; returns their version.

        `source`: arrays by Hugging Face name (a mapping or its items), a folder of safetensors, or what
        `WeightPublisher.publish` or, on a GPU, `DevicePublisher.publish` returned. `version`: by default that of the
        publication, else the live one + 1; any other than the live one + 1 needs `allow_rewind`. The new weights are
        read, checked and packed, then become live between two steps. What that means for the policy's requests
        submitted earlier is `mode`'s:

        - "wait": they finish first, under the old version; later ones wait. No request sees two versions.
        - "keep": they go on. With kv="recompute" (the default; the mode is also called "retract") their keys and
          values are computed again: later tokens are those of a fresh engine with the new weights and the same prefix,
          bit for bit. With kv="keep" ("in_place") old keys and values stay in use, by these requests alone; such
          rollouts say so in `num_kept_updates`. `max_staleness` bounds how many versions a request's oldest token may
          lie behind: beyond it the request begins anew, or with on_stale="refuse" its call raises StaleRequestError.
        - "abort": they end with finish_reason "abort" and the tokens so far.

        Where it does not wait, a score call in flight begins anew: its result is of one version.

        `bucket_bytes`: of a published file, bytes that are in memory at a time (64 MiB by default), of weights in a
        GPU's memory bytes that are copied at a time (256 MiB); other sources are read where they are.

        Raises ValueError for wrong options, tensors (a NaN or an infinity in one too) or version, HookError; the old
        version then goes on serving, as it does where Ctrl-C comes before the commit has begun.
        """
        return self.prepare_update(
            source,
            version,
            mode=mode,
            kv=kv,
            max_staleness=max_staleness,
            on_stale=on_stale,
            allow_rewind=allow_rewind,
            bucket_bytes=bucket_bytes,
        ).run()

    def prepare_update(
        self,
        source: Source,
        version: int | None = None,
        *,
        allow_rewind: bool = False,
        bucket_bytes: int | None = None,
        **options: Any,
    ) -> WeightUpdate:
        """An update that nobody knows of until it is run; arguments are those of `update_weights`."""
        in_flight = InFlightOptions(**options)
        weights, version = weight_source(source, version, bucket_bytes)
        check_source(weights, self._config.device)
        return self._updates.make(weights, version, in_flight, allow_rewind=allow_rewind)

    async def aupdate_weights(self, source: Source, version: int | None = None, **options: Any) -> int:
        """`update_weights` for coroutines, with its options. Cancelling the task gives up an update that waits."""
        update = self.prepare_update(source, version, **options)
        running = asyncio.ensure_future(asyncio.to_thread(update.run))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            update.give_up()
            running.add_done_callback(_forget)
            raise

    def add_update_hook(self, name: HookName, hook: Hook, *, on_error: OnHookError | None = None) -> Callable[[], None]:
        """Have `hook(UpdateEvent)` called "before_update", "after_commit" or "on_failure"; returns what removes it.

        Hooks run in the thread that asked for the update and may call the engine. `before_update` comes before anything
        is read; what it raises calls the update off with HookError, or with on_error="report" is logged. What the
        others raise is always logged, and counted in `health()["hook_errors"]`: the update's own outcome stands.
        """
        return self._updates.hooks.add(name, hook, on_error)

    # -- sets ---------------------------------------------------------------------------------------------------------
    def pin_weights(self, name: str = "reference") -> int:
        """Keep the live weights under `name` for `score(policy=name)`, without a copy; returns their version.

        Waits for the requests submitted before. An earlier pin of that name is replaced.
        """
        if not isinstance(name, str) or not name or name == POLICY:
            raise ValueError(f"name must be a non-empty string other than {POLICY!r}, got {name!r}")
        version: int = self._change(Exclusive(lambda: self._weights.pin(name), self._sleep.check_weights))
        return version

    def drop_weights(self, name: str) -> None:
        """Forget a pinned set, after the requests submitted before. Raises ValueError for an unknown name."""
        self._change(Exclusive(lambda: self._weights.drop(name), self._sleep.check_weights))

    def get_weight_version(self, name: str = POLICY) -> int:
        """Version of the live weights, or of a pinned set. ValueError for an unknown name."""
        self._weights.check_known(name)
        return self._weights.versions[name]

    # -- experts ------------------------------------------------------------------------------------------------------
    def expert_load(self, *, reset: bool = False) -> ExpertLoad:
        """How often tokens chose each expert, in the last step and since the start or the last `reset`, all ranks
        together. Without mixtures of experts the arrays are [0, 0].
        """
        return self._loop.at_boundary(partial(self._balance.load, reset=reset)).result()

    def rebalance_experts(self) -> int:
        """Move experts between ranks by their load since the last move; returns how many came to another rank.

        Live weights are copied between two steps, of all sets, and no output changes a bit. Waits for weights that are
        being staged. Nothing moves where a rank has all experts, or none has been used since.
        """

        def begin() -> Future[int]:
            self._sleep.check_weights()
            return self._loop.at_boundary(self._balance.rebalance)

        num_moves: int = self._while_nobody_stages(begin)
        return num_moves

    # -- memory -------------------------------------------------------------------------------------------------------
    def sleep(
        self,
        tags: SleepTag | Collection[SleepTag] | None = None,
        level: int = 1,
        *,
        spill_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        """Free the worker's memory of "weights" (all sets) and "kv_cache" (the pool), by default both.

        Waits for the requests submitted before. Until `wake_up`, `generate` and `score` raise EngineAsleepError. What
        `level` means is said of the weights; keys and values are dropped at either, and cached prefixes with them.

        - Level 1: the packed weights are written to an unlinked file in `spill_dir` (by default the system's folder for
          temporary files, which must not be in memory, or nothing is gained). `wake_up` reads them back, byte for byte.
        - Level 2: they are dropped, pinned sets and all. `update_weights` brings new ones and ends the sleep of
          "weights"; until then `wake_up` leaves it as it is.

        With `max_rank_restarts` level 1 keeps the engine's own copies in shared memory: one of each set that came by an
        update, in the type that it came in, and of the model's folder none. They are what a rank that is lost
        asleep is started anew from, when its file is gone with it. Level 2 frees them.

        Raises ValueError for a tag or level that there is not, and where the file cannot be written: nothing is freed
        then.
        """
        chosen, level = sleep_tags(tags), sleep_level(level)
        folder = None if spill_dir is None else os.fspath(spill_dir)
        self._change(Exclusive(lambda: self._sleep.put_away(chosen, level, folder)))

    def wake_up(self, tags: SleepTag | Collection[SleepTag] | None = None) -> list[str]:
        """Bring parts back, by default all; returns those that are still away. What is awake is passed over."""
        chosen = sleep_tags(tags)
        away: list[str] = self._change(
            Exclusive(lambda: list(self._sleep.parts), lambda: self._sleep.bring_back(chosen))
        )
        return away

    # -- inside -------------------------------------------------------------------------------------------------------
    def _change(self, change: Exclusive) -> Any:
        def begin() -> Future[Any]:
            self._loop.submit(change)
            return change.future

        return self._while_nobody_stages(begin)

    def _while_nobody_stages(self, begin: Callable[[], Future[Any]]) -> Any:
        """The result of what `begin` has the loop do. Where Ctrl-C ends the wait, staging is still kept from what has
        begun, or cannot be called off."""
        lock = self._updates.lock
        lock.acquire()
        try:
            future = begin()
        except BaseException:
            lock.release()
            raise
        future.add_done_callback(lambda _: lock.release())
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise


def _forget(future: asyncio.Future[Any]) -> None:
    """Look at the outcome that nobody waits for any more, or asyncio complains that nobody did."""
    if not future.cancelled():
        future.exception()
