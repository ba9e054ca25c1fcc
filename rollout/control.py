"""What callers hand to the engine's loop thread, and the versions of the weights that it keeps.

Two kinds of work travel in one ordered queue: a `Call` (requests to run) and an `Exclusive` (a change that must find
no step, or no request, in flight). What was submitted before an Exclusive is taken up before it, and finished if it
waits; what came later waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal

from zerokl.rollout.errors import EngineClosedError, EngineFailedError
from zerokl.rollout.histogram import Histogram
from zerokl.rollout.ranks import Ranks
from zerokl.rollout.request import Request
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.weight_source import SharedWeights, WeightSource
from zerokl.weight_sync.version_order import check_version

POLICY = "policy"
"""Name of the live weight set."""


class Call:
    """The requests of one generate or score call. The future resolves when all are finished.

    `groups` holds the requests of each id that `abort` knows: the n samples of a prompt, or the one scored sequence.
    """

    __slots__ = ("aborted", "arrival_time", "error", "future", "groups", "num_left", "texts")

    def __init__(self, groups: dict[str, list[Request]]) -> None:
        assert groups and all(groups.values()), "a call without requests has nothing to wait for"
        self.groups = groups
        self.num_left = sum(len(group) for group in groups.values())
        self.arrival_time = 0.0
        """When it was submitted, in seconds of the loop's clock."""
        self.aborted: set[str] = set()
        """Ids aborted before the call was taken up."""
        self.texts: dict[str, str] = {}
        """Request id -> text before the stop string, for requests that one ended."""
        self.error: Exception | None = None
        """Why the call fails once its requests have ended."""
        self.future: Future[None] = Future()
        # A waiting coroutine that is cancelled would otherwise cancel the future under the loop's hands.
        self.future.set_running_or_notify_cancel()

    @property
    def requests(self) -> list[Request]:
        """All requests, group by group."""
        return [request for group in self.groups.values() for request in group]


class Exclusive:
    """A change applied between two steps, when no request is in flight (`waits`) or without waiting for them.

    `prepare` runs as soon as the queue reaches the change, while earlier requests are still running; if it raises, the
    change is off and nothing was held up. `apply` runs after them; its result resolves the future. `discard` undoes
    `prepare` when the caller cancels the future in between.
    """

    __slots__ = ("apply", "discard", "future", "prepare", "waits")

    def __init__(
        self,
        apply: Callable[[], Any],
        prepare: Callable[[], None] = lambda: None,
        discard: Callable[[], None] = lambda: None,
        *,
        waits: bool = True,
    ) -> None:
        self.prepare = prepare
        self.apply = apply
        self.discard = discard
        self.waits = waits
        self.future: Future[Any] = Future()


def settle(future: Future[Any], action: Callable[[], Any]) -> None:
    """Run the action and resolve the future. A ValueError is the caller's; anything else also ends the loop."""
    try:
        result = action()
    except ValueError as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def gave_up(future: Future[Any]) -> bool:
    """Whether the caller gave up on it; if not, it can no longer."""
    return not (future.running() or future.set_running_or_notify_cancel())


def ending_error(state: Literal["failed", "closed"], error: BaseException | None) -> Exception:
    """What callers get whose work the end of the loop cut off."""
    if state == "closed":
        return EngineClosedError("the engine was closed while the call was in flight")
    failure = EngineFailedError(f"the engine has failed: {error!r}")
    failure.__cause__ = error
    return failure


class WeightSets:
    """Names, versions and epochs of the weight sets that workers and scheduler hold. Runs on the loop thread.

    A version is the user's number; an epoch is ours, never repeats, and stands for the weights in every KV cache key.
    A pin shares the epoch of the weights that it keeps, and with it their cached prefixes.
    """

    def __init__(self, ranks: Ranks, scheduler: Scheduler) -> None:
        self._ranks = ranks
        self._scheduler = scheduler
        self._epoch = 0
        self._staged: int | None = None
        self._staged_inexact = False
        self.versions: dict[str, int] = {}
        self.inexact: frozenset[str] = frozenset()
        """Sets whose publication says that a trainer's forward does not give the same bits."""
        self.inexact_versions: frozenset[int] = frozenset()
        """Versions of the policy that were such sets."""
        self.stage_times = Histogram()
        """Seconds of each update after the first load, as the next."""
        self.commit_times = Histogram()
        self.num_updates = 0

    def load_first(self, source: WeightSource) -> None:
        """Version 0, before the first step."""
        self._ranks.stage_weights(source, 0)
        self._staged = 0
        self.commit()
        self.num_updates, self.commit_times = 0, Histogram()

    @property
    def staged_version(self) -> int:
        """Version of the staged set, which there is."""
        assert self._staged is not None, "nothing is staged"
        return self._staged

    def stage(self, source: WeightSource, version: int | None, *, allow_rewind: bool = False) -> None:
        """Have the workers prepare the next version.

        Raises VersionOrderError, a ValueError, unless `version` follows the live one; with `allow_rewind` any will do.
        """
        live = self.versions[POLICY]
        version = live + 1 if version is None else version
        check_version(live, version, allow_rewind=allow_rewind)
        start = time.perf_counter()
        self._ranks.stage_weights(source, version)
        self._staged = version
        self._staged_inexact = _says_inexact(source)
        self.stage_times.observe(time.perf_counter() - start)

    def commit(self, *, keep_running: bool = False) -> int:
        """Make the staged version live; returns it. `keep_running`: as `Scheduler.set_weights` takes it."""
        assert self._staged is not None, "commit without a staged version"
        start = time.perf_counter()
        self._ranks.commit_weights()
        version, self._staged = self._staged, None
        self._epoch += 1
        self._scheduler.set_weights(POLICY, epoch=self._epoch, version=version, keep_running=keep_running)
        self.versions = {**self.versions, POLICY: version}
        if self._staged_inexact:
            self.inexact, self.inexact_versions = self.inexact | {POLICY}, self.inexact_versions | {version}
        else:
            self.inexact, self.inexact_versions = self.inexact - {POLICY}, self.inexact_versions - {version}
        self.commit_times.observe(time.perf_counter() - start)
        self.num_updates += 1
        return version

    def discard(self) -> None:
        """Forget the staged version."""
        self._ranks.discard_staged()
        self._staged = None

    def check_known(self, name: str) -> None:
        """Raise ValueError unless a set has that name."""
        if not isinstance(name, str) or name not in self.versions:
            raise ValueError(f"policy must be one of {sorted(self.versions)}, got {name!r}")

    def pin(self, name: str) -> int:
        """Keep the live weights as `name`; returns their version."""
        self._ranks.pin_weights(name)
        version = self.versions[POLICY]
        self._scheduler.set_weights(name, epoch=self._epoch, version=version)
        self.versions = {**self.versions, name: version}
        self.inexact = self.inexact | {name} if POLICY in self.inexact else self.inexact - {name}
        return version

    def drop_pins(self) -> None:
        """The workers have lost all pinned sets."""
        for name in set(self.versions) - {POLICY}:
            self._scheduler.drop_weights(name)
        self.versions = {POLICY: self.versions[POLICY]}
        self.inexact &= {POLICY}

    def drop(self, name: str) -> None:
        """Forget a pinned set. Raises ValueError for an unknown name and for the policy itself."""
        if not isinstance(name, str) or name == POLICY or name not in self.versions:
            pinned = sorted(set(self.versions) - {POLICY})
            raise ValueError(f"drop_weights: name must be a pinned set, one of {pinned}, got {name!r}")
        self._ranks.drop_weights(name)
        self._scheduler.drop_weights(name)
        self.versions = {key: version for key, version in self.versions.items() if key != name}
        self.inexact -= {name}


def _says_inexact(source: WeightSource) -> bool:
    from zerokl.weight_sync import PublishedShards, PublishedWeights

    if not isinstance(source, SharedWeights):
        return False
    published = source.published
    if isinstance(published, PublishedShards):
        return any(rank.manifest.inexact for rank in published.ranks)
    return isinstance(published, PublishedWeights) and published.manifest.inexact
