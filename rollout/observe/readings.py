"""One series that Prometheus is told, and the ways to read its samples from the telemetry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from zerokl.rollout.histogram import HistogramData

Telemetry = Mapping[str, Any]
"""What `RolloutEngine.telemetry` returns, or `RolloutClient.telemetry`."""
Sample = tuple[tuple[str, ...], Any]
"""Values of the labels, and a number or a `HistogramData`."""
Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One metric family."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    read: Callable[[Telemetry], Iterable[Sample]]
    """The samples; none where the telemetry has nothing of it."""
    covers: tuple[str, ...] = ()
    """Keys of `metrics()` that it stands for."""


def flat(kind: Kind, name: str, key: str, meaning: str) -> Series:
    """A number of `metrics()`, left out where there is none."""

    def read(telemetry: Telemetry) -> Iterable[Sample]:
        metrics = telemetry["metrics"]
        return [((), metrics[key])] if key in metrics else []

    return Series(name=name, kind=kind, meaning=meaning, read=read, covers=(key,))


def by(label: str, name: str, keys: Mapping[str, str], meaning: str) -> Series:
    """A counter from several numbers of `metrics()`: label's value -> key."""

    def read(telemetry: Telemetry) -> Iterable[Sample]:
        return [((value,), telemetry["metrics"][key]) for value, key in keys.items()]

    return Series(name=name, kind="counter", meaning=meaning, labels=(label,), read=read, covers=tuple(keys.values()))


def of_ranks(kind: Kind, name: str, value: Callable[[Mapping[str, Any]], float], meaning: str, *covers: str) -> Series:
    """A number of each rank's row of `health()`."""

    def read(telemetry: Telemetry) -> Iterable[Sample]:
        return [((str(row["rank"]), row["role"]), value(row)) for row in telemetry["health"]["ranks"]]

    return Series(name=name, kind=kind, meaning=meaning, labels=("rank", "role"), read=read, covers=covers)


def histogram(name: str, key: str, meaning: str, *labels: str, covers: tuple[str, ...] = ()) -> Series:
    """The histograms of that name, one for each combination of labels."""

    def read(telemetry: Telemetry) -> Iterable[Sample]:
        rows = [HistogramData(**row) for row in telemetry["histograms"] if row["name"] == key]
        return [(tuple(row.labels[label] for label in labels), row) for row in rows]

    return Series(name=name, kind="histogram", meaning=meaning, labels=labels, read=read, covers=covers)


def of_token_kinds(kind: Kind, name: str, group: str, field: str | None, meaning: str) -> Series:
    """A number of the mismatch for each kind of token; `field` of a report, where the group holds reports."""

    def read(telemetry: Telemetry) -> Iterable[Sample]:
        rows = telemetry["mismatch"][group].items()
        return [((tokens,), value if field is None else value[field]) for tokens, value in rows]

    return Series(name=name, kind=kind, meaning=meaning, labels=("tokens",), read=read)


def of_mismatch(kind: Kind, name: str, key: str, meaning: str) -> Series:
    """A number of the mismatch, left out where it is None."""

    def read(telemetry: Telemetry) -> Iterable[Sample]:
        value = telemetry["mismatch"][key]
        return [] if value is None else [((), value)]

    return Series(name=name, kind=kind, meaning=meaning, read=read)
