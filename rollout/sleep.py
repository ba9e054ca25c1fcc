"""Which parts of the workers' memory are put away, and what may not be asked of it meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

from zerokl.rollout.control import WeightSets
from zerokl.rollout.errors import EngineAsleepError
from zerokl.rollout.ranks import Ranks
from zerokl.rollout.routing_store import RankRouting
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.validation import check_int

SleepTag = Literal["weights", "kv_cache"]
TAGS: tuple[str, ...] = get_args(SleepTag)


class Sleep:
    """Puts parts away and brings them back, on the loop thread; any thread may ask what is missing."""

    def __init__(self, ranks: Ranks, weights: WeightSets, scheduler: Scheduler, routing: RankRouting) -> None:
        self._ranks = ranks
        self._weights = weights
        self._scheduler = scheduler
        self._routing = routing
        self.parts: dict[str, int] = {}
        """Tag -> level of the parts that are away. Replaced as a whole, never changed."""

    def put_away(self, tags: list[str], level: int, spill_dir: str | None) -> None:
        """Free the parts. No request is in flight. Raises ValueError, and frees nothing, where that cannot be done."""
        kept = {tag: self.parts[tag] for tag in tags if tag in self.parts}
        levels = {tag: max(level, kept.get(tag, 0)) for tag in tags}
        self._ranks.sleep(tags, levels.get("weights", level), spill_dir)
        if "kv_cache" in tags:
            self._scheduler.reset_prefix_cache()
            self._routing.clear()
        if levels.get("weights") == 2:
            self._weights.drop_pins()
        self.parts = {**self.parts, **levels}

    def bring_back(self, tags: list[str]) -> None:
        """Undo `put_away`, weights first. Discarded weights stay away."""
        for tag in TAGS:
            if tag in tags and tag in self.parts and not self._are_discarded(tag):
                self._ranks.wake_up([tag])
                self.parts = {key: level for key, level in self.parts.items() if key != tag}

    def weights_came(self) -> None:
        """An update has brought the policy's weights."""
        self.parts = {key: level for key, level in self.parts.items() if key != "weights"}

    def check_awake(self) -> None:
        """Raise EngineAsleepError where a forward would lack something."""
        if self.parts:
            hint = "update_weights" if self._are_discarded("weights") else f"wake_up({sorted(self.parts)})"
            raise EngineAsleepError(f"asleep: {', '.join(sorted(self.parts))}; call {hint} first")

    def check_weights(self) -> None:
        """Raise EngineAsleepError where the weights are away."""
        if "weights" in self.parts:
            raise EngineAsleepError("asleep: weights; call wake_up(['weights']) first")

    def check_update(self) -> None:
        """Raise EngineAsleepError where new weights would stand beside ones in a file. Discarded ones they replace."""
        if not self._are_discarded("weights"):
            self.check_weights()

    def _are_discarded(self, tag: str) -> bool:
        return tag == "weights" and self.parts.get(tag) == 2


def sleep_tags(tags: str | Iterable[str] | None) -> list[str]:
    """The tags that a user gave; None stands for all. Raises ValueError for an unknown one."""
    given: list[Any] = list(TAGS) if tags is None else [tags] if isinstance(tags, str) else list(tags)
    if not given or any(tag not in TAGS for tag in given):
        raise ValueError(f"tags must be one or more of {TAGS}, got {tags!r}")
    return [tag for tag in TAGS if tag in given]


def sleep_level(level: Any) -> int:
    """Level 1 or 2. Raises ValueError for anything else."""
    return check_int("level", level, 1, 2)
