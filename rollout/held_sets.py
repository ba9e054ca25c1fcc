"""The sets of weights that a runner holds: the live one, pinned ones, one that is staged beside them.

    made -> stage(params) -> commit() -> ... -> put_away(...) -> bring_back(...) -> ...

Committing and pinning only move references, so they cannot fail and a step sees one set from beginning to end. Each set
carries an epoch that never repeats, beside its publisher's version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from zerokl.kernels.ops import DecoderParams
from zerokl.rollout.spill import HostedSets, SpilledSets

if TYPE_CHECKING:
    from zerokl.kernels.gpu.weight_slots import SlotUse

LIVE = "policy"
"""Name of the set that `commit` replaces."""

_STAGED = ""
"""No set has this name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSet:
    """Packed weights, never changed after they were made."""

    version: int
    """As given by whoever staged it."""
    epoch: int
    """Counts the sets that this runner has staged; the key for anything computed from this set."""
    params: DecoderParams[Any]
    home: SlotUse | None = None
    """Memory that sets take turns in; None: it is the set's own."""

    @property
    def place(self) -> int:
        """Equal for sets that lie at the same addresses one after the other, so that recorded steps serve them all."""
        return self.epoch if self.home is None else self.home.number


class HeldSets:
    """Sets by name. One thread calls; `stage` and `discard_staged` may be called in another."""

    def __init__(self) -> None:
        self._epochs = count(1)
        self._staged: WeightSet | None = None
        self._sets: dict[str, WeightSet] = {}
        self._asleep: SpilledSets | HostedSets | None = None

    @property
    def committed(self) -> Mapping[str, WeightSet]:
        """The set "policy" once there was a commit, and the pinned ones; the mapping is the caller's."""
        return dict(self._sets)

    @property
    def live(self) -> WeightSet | None:
        """None before the first commit, and while the sets are away."""
        return self._sets.get(LIVE)

    @property
    def places(self) -> set[int]:
        """Of the committed sets."""
        return {weights.place for weights in self._sets.values()}

    @property
    def are_asleep(self) -> bool:
        """Whether `bring_back` would bring sets back."""
        return self._asleep is not None

    def named(self, name: str) -> WeightSet:
        """A committed set. Raises ValueError where there is none of that name."""
        weights = self._sets.get(name)
        if weights is None:
            raise ValueError(f"policy must be one of {sorted(self._sets)}, got {name!r}")
        return weights

    def stage(self, params: DecoderParams[Any], version: int, home: SlotUse | None = None) -> None:
        """Keep what was packed beside the live set, for `commit`."""
        self._staged = WeightSet(version=version, epoch=next(self._epochs), params=params, home=home)

    def discard_staged(self) -> None:
        """Forget the staged set, if there is one."""
        self._staged = None

    def commit(self) -> None:
        """Make the staged set the live one."""
        assert self._staged is not None, "commit without staged weights"
        self._sets[LIVE], self._staged = self._staged, None

    def pin(self, name: str) -> None:
        """Keep the live set under `name` too, without a copy; replaces an earlier pin of that name.

        Raises ValueError for the name of the live set itself, or before the first commit.
        """
        if name == LIVE or not name:
            raise ValueError(f"pin: name must be non-empty and not {LIVE!r}, got {name!r}")
        if LIVE not in self._sets:
            raise ValueError(f"pin: there are no live weights yet to keep as {name!r}")
        self._sets[name] = self._sets[LIVE]

    def drop(self, name: str) -> None:
        """Forget a pinned set. Raises ValueError if there is none of that name, and for the live set."""
        if name == LIVE or name not in self._sets:
            raise ValueError(f"drop: name must be one of {sorted(self._sets.keys() - {LIVE})}, got {name!r}")
        del self._sets[name]

    def change(self, change: Callable[[dict[str, WeightSet]], None]) -> None:
        """Have `change` replace sets of a dict by others that stand for them; the staged one is among them.

        After an error the sets are not to be used.
        """
        if self._staged is not None:
            self._sets[_STAGED] = self._staged
        change(self._sets)
        self._staged = self._sets.pop(_STAGED, None)

    def put_away(self, spill: Callable[[Mapping[str, WeightSet]], SpilledSets | HostedSets] | None) -> None:
        """Refer to no memory of any set; `spill` copies the committed ones elsewhere first, None discards them.

        Those that are away already stay so, or are discarded. An error of `spill` changes nothing.
        """
        asleep = None
        if spill is not None:
            # What comes back has memory of its own.
            moved = {name: replace(weights, home=None) for name, weights in self._sets.items()}
            asleep = spill(moved) if moved else self._asleep
        if self._asleep is not None and self._asleep is not asleep:
            self._asleep.close()
        self._asleep, self._sets, self._staged = asleep, {}, None

    def bring_back(self, take: Any) -> None:
        """Undo `put_away`, in arrays or tensors that `take` gives; see `SpilledSets.restore`, `HostedSets.restore`."""
        assert self._asleep is not None, "no set is away"
        self._sets = self._asleep.restore(take)
        self._asleep.close()
        self._asleep = None

    def clear(self) -> None:
        """Forget the sets that are in memory."""
        self._sets, self._staged = {}, None
