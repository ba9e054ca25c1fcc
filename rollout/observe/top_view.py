"""One frame of `rollout-top`: telemetry made into tables and panels. No terminal, no connection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zerokl.rollout.histogram import HistogramData
from zerokl.rollout.observe.readings import Telemetry

MAX_RANKS = 16
"""Rows of ranks in a frame; the busiest by running requests are shown."""
MAX_VERSIONS = 4
_STATE_STYLES = {"running": "green", **dict.fromkeys(("failed", "closed", "gone"), "bold red")}
_NO_VALUE = "–"

Row = tuple[str, str | Text]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Telemetry and when it was read, in seconds of any clock."""

    telemetry: Telemetry
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What is to be shown: the latest reading, the one before for rates, and what is wrong with the connection."""

    endpoint: str
    now: Reading | None = None
    before: Reading | None = None
    problem: str | None = None

    def render(self) -> RenderableType:
        """The frame, for any console."""
        if self.now is None:
            return self._title()
        seen = self.now.telemetry
        panels = [
            _panel("requests", self._requests(seen)),
            _mismatch_panel(seen["mismatch"]),  # above what a small terminal cuts off
            _panel("refused", self._refusals(seen)),
            _panel("weights", _weights(seen)),
        ]
        pairs = Table.grid(expand=True)
        pairs.add_column(ratio=1)
        pairs.add_column(ratio=1)
        for left, right in zip(panels[::2], panels[1::2], strict=True):
            pairs.add_row(left, right)
        return Group(self._title(), self._ranks(seen["health"]["ranks"]), pairs)

    # -- parts --------------------------------------------------------------------------------------------------------
    def _title(self) -> RenderableType:
        title = Text("rollout-top", "bold", no_wrap=True, overflow="ellipsis")
        lines = [title]
        if self.now is not None:
            health, metrics = self.now.telemetry["health"], self.now.telemetry["metrics"]
            state = health["state"] if self.problem is None else "gone"
            title.append(f"  {state}", _STATE_STYLES.get(state, "bold yellow"))
            title.append(f"  version {health['weight_versions'].get('policy', _NO_VALUE)}")
            title.append(f"  {self._rate(_total, 'generated_tokens')} tokens/s")
            title.append(f"  {metrics.get('server_clients', 0)} clients")
            if health["cause"] is not None:
                lines.append(Text(health["cause"], "red"))
        title.append(f"  {self.endpoint}", "not bold dim")
        if self.problem is not None:
            old = "; the figures below are old" if self.now is not None else ""
            lines.append(Text(self.problem + old, "bold red"))
        return Group(*lines)

    def _ranks(self, rows: Sequence[Mapping[str, Any]]) -> RenderableType:
        table = Table(box=None, expand=True, padding=(0, 1), header_style="dim")
        for name, right in (("rank", True), ("role", False), ("state", False), ("running", True)):
            table.add_column(name, justify="right" if right else "left", no_wrap=True)
        table.add_column("KV in use", ratio=1)
        for name in ("", "cached", "tokens/s", "pid"):
            table.add_column(name, justify="right", no_wrap=True)
        shown = sorted(sorted(rows, key=lambda row: -row["running"])[:MAX_RANKS], key=lambda row: row["rank"])
        for row in shown:
            usage = 1.0 - row["free_blocks"] / row["total_blocks"]
            style = "red" if usage > 0.95 else "yellow" if usage > 0.8 else "green"
            state = row.get("state", "busy" if row["running"] else "idle")
            table.add_row(
                str(row["rank"]),
                row["role"],
                state,
                str(row["running"]),
                ProgressBar(1.0, usage, complete_style=style, finished_style=style),
                f"{usage:.0%}",
                f"{row['cached_blocks'] / row['total_blocks']:.0%}",
                self._rate(_of_rank, row["rank"]),
                str(row["pid"]),
            )
        if len(rows) > len(shown):
            return Group(table, Text(f"and {len(rows) - len(shown)} more ranks, less busy", style="dim"))
        return table

    def _requests(self, seen: Telemetry) -> Iterable[Row]:
        metrics = seen["metrics"]
        yield "run, wait, held", f"{metrics['running']}  {metrics['waiting']}  {metrics['held']}"
        ends = [metrics[f"finished_{reason}"] for reason in ("stop", "length", "abort")]
        yield "stop, length, abort", "  ".join(_count(end) for end in ends)
        yield "preemptions", _count(metrics["preemptions"])
        hits, computed = metrics["cached_tokens"], metrics["prefill_tokens"]
        yield "cached prompt", f"{hits / (hits + computed):.0%}" if hits + computed else _NO_VALUE
        yield "queue wait p50, p99", _quantiles(seen, "queue_wait_seconds")
        yield "first token p50, p99", _quantiles(seen, "time_to_first_token_seconds")
        yield "step p50, p99", _quantiles(seen, "step_seconds")

    def _refusals(self, seen: Telemetry) -> Iterable[Row]:
        counts = {
            key.removeprefix("refused_"): count for key, count in seen["metrics"].items() if key.startswith("refused_")
        }
        for reason, count in counts.items():
            style = "" if count else "dim"
            yield reason, Text(f"{self._rate(_total, f'refused_{reason}')}/s  {_count(count)}", style)

    def _rate(self, read: Any, key: Any) -> str:
        """A counter's growth per second between the two readings; unknown after a restart of the server."""
        if self.now is None or self.before is None or self.now.seconds <= self.before.seconds:
            return _NO_VALUE
        grown = read(self.now.telemetry, key) - read(self.before.telemetry, key)
        return _NO_VALUE if grown < 0 else _count(grown / (self.now.seconds - self.before.seconds))


def _weights(seen: Telemetry) -> Iterable[Row]:
    metrics, health = seen["metrics"], seen["health"]
    yield "updates, failed", f"{metrics['weight_updates']}  {metrics['weight_update_failures']}"
    yield "staging p50, p99", _quantiles(seen, "weight_sync_seconds", part="stage")
    yield "pause p50, p99", _quantiles(seen, "pause_seconds", cause="weights")
    yield "paused in all", f"{metrics['generation_pause_seconds']:.1f} s"
    pinned = {name: version for name, version in health["weight_versions"].items() if name != "policy"}
    yield "pinned", ", ".join(f"{name} {version}" for name, version in pinned.items()) or _NO_VALUE
    if health["inexact_weights"]:
        yield "inexact", Text(", ".join(health["inexact_weights"]), "yellow")
    if "rank_restarts" in metrics:
        yield "rank restarts", Text(str(metrics["rank_restarts"]), "yellow" if metrics["rank_restarts"] else "")
    versions = [(version, count) for version, count in seen["version_tokens"].items() if version != "older"]
    for version, count in versions[-MAX_VERSIONS:]:
        yield f"tokens by version {version}", _count(count)


def _mismatch_panel(mismatch: Mapping[str, Any]) -> Panel:
    if not mismatch["reports"]:
        return _panel("mismatch KL", [("", Text("the trainer has reported nothing", "dim"))])
    style = "bold red" if mismatch["is_alarming"] else "green"
    return _panel("mismatch KL" + " ALARM" * mismatch["is_alarming"], _mismatch(mismatch, style), style)


def _mismatch(mismatch: Mapping[str, Any], style: str) -> Iterable[Row]:
    for kind, report in mismatch["last"].items():
        of = "" if kind == "exact" else f", {kind.replace('_', ' ')}"
        yield f"k3 mean{of}", Text(_kl(report["k3_kl_mean"]), style if kind == "exact" else "dim")
        yield f"k3 max{of}", Text(_kl(report["k3_kl_max"]), style if kind == "exact" else "dim")
    differing, tokens = mismatch["differing_logprobs"]["exact"], mismatch["tokens"]["exact"]
    yield "differing logprobs", f"{_count(differing)} of {_count(tokens)}"
    alarms = mismatch["alarms"]
    yield "alarms, reports", Text(f"{alarms} of {mismatch['reports']}", "red" if alarms else "")
    threshold = mismatch["k3_alarm"]
    yield "alarm above", "never" if threshold is None else _kl(threshold)


def _panel(title: str, rows: Iterable[Row], style: str = "dim") -> Panel:
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, value)
    return Panel(table, title=title, title_align="left", border_style=style, padding=(0, 1))


def _quantiles(seen: Telemetry, name: str, **labels: str) -> str:
    """Of all series of a histogram together, or of those with these labels."""
    rows = [HistogramData(**row) for row in seen["histograms"] if row["name"] == name]
    rows = [row for row in rows if labels.items() <= row.labels.items()]
    counts = [sum(column) for column in zip(*(row.counts for row in rows), strict=True)]
    both = HistogramData(name=name, labels={}, bounds=rows[0].bounds, counts=counts, sum=0.0)
    return "  ".join(_duration(both.quantile(part)) for part in (0.5, 0.99))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _NO_VALUE
    if seconds == float("inf"):
        return ">1000 s"
    return f"{1000 * seconds:g} ms" if seconds < 1 else f"{seconds:g} s"


def _kl(value: float) -> str:
    return f"{value:.3g}" if value else "0.0"


def _count(number: float) -> str:
    if number and abs(number) < 10 and number != int(number):
        return f"{number:.1f}"
    return f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:,.1f} M"


def _total(telemetry: Telemetry, key: str) -> float:
    number: float = telemetry["metrics"][key]
    return number


def _of_rank(telemetry: Telemetry, rank: int) -> float:
    number: float = telemetry["health"]["ranks"][rank]["generated_tokens"]
    return number
