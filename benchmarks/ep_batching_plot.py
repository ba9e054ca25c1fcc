"""The picture of `ep_batching.py`: what each window does at each rate of arrival."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

COLOURS = ("#6b7280", "#0f766e", "#c2410c", "#6d28d9")
MARKERS = ("o", "s", "^", "D")
Rows = list[dict[str, float]]


def plot(rows: Rows, path: Path, machine: str) -> None:
    """Three panels over the rate of arrival: tokens/s and prefill steps against no window, time to first token."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (speed, steps, wait) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    rates = sorted({row["arrival_per_s"] for row in rows})
    for index, timeout in enumerate(sorted({row["timeout_s"] for row in rows})):
        some = sorted((row for row in rows if row["timeout_s"] == timeout), key=lambda row: row["arrival_per_s"])
        style: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 5, "linewidth": 1.6}
        label = f"window {1e3 * timeout:g} ms" if timeout else "no window"
        _line(wait, some, "ttft_p50_ms", style, label)
        _line(wait, some, "ttft_p99_ms", style | {"linestyle": "--", "markerfacecolor": "white"}, None)
        if timeout:
            _line(speed, some, "tok_s_ratio", style, label)
            _line(steps, some, "prefill_ratio", style, label)
    speed.axhspan(0.95, 1.05, color="#e5e7eb", zorder=0)
    speed.set_ylim(min(0.9, *speed.get_ylim()), max(1.1, *speed.get_ylim()))
    speed.set_title("Tokens per second (grey: within 5 %)")
    steps.set_ylim(0, max(1.05, *steps.get_ylim()))
    steps.set_title("Steps with a prompt in them")
    for axes in (speed, steps):
        axes.axhline(1, color=COLOURS[0], linewidth=1)
        axes.set_ylabel("relative to no window")
    wait.set_ylabel("ms")
    wait.set_yscale("log")
    wait.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    wait.yaxis.set_major_formatter(ScalarFormatter())
    wait.yaxis.set_minor_locator(NullLocator())
    wait.set_title("Time to first token (solid p50, dashed p99)")
    for axes in (speed, steps, wait):
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("requests arriving per second")
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.legend(*wait.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    figure.suptitle(f"Collection window over ranks that share experts ({machine})", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(axes: Axes, rows: Rows, key: str, style: dict[str, Any], label: str | None) -> None:
    axes.plot([row["arrival_per_s"] for row in rows], [row[key] for row in rows], label=label, **style)
