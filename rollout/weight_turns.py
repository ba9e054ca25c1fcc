"""The weight sets that requests may name, and which of them has waited longest for a step."""

from __future__ import annotations

from collections.abc import Iterable

from zerokl.rollout.snapshot import WeightSet


class WeightTurns:
    """Steps alternate between the weight sets that have work."""

    def __init__(self) -> None:
        self.sets: dict[str, WeightSet] = {}
        """By name; read only for others."""
        self._last_turn: dict[str, int] = {}

    def declare(self, name: str, weights: WeightSet) -> None:
        """Add a weight set or replace it; its turn stays."""
        self.sets[name] = weights

    def drop(self, name: str) -> None:
        """Forget a weight set. Raises ValueError where it is unknown."""
        if name not in self.sets:
            raise ValueError(f"weight set {name!r} is unknown; known: {sorted(self.sets)}")
        del self.sets[name]
        self._last_turn.pop(name, None)

    def in_turn(self, names: Iterable[str]) -> list[str]:
        """The names, each once, the one that has waited longest first; of equals, the one named first."""
        return sorted(dict.fromkeys(names), key=lambda name: self._last_turn.get(name, 0))

    def take(self, name: str, step: int) -> WeightSet:
        """The weight set that this step runs; it comes last from here on."""
        self._last_turn[name] = step
        return self.sets[name]
