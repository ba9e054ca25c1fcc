"""The demos' terminal view, log and plot: one row per training step, written as it happens."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from zerokl.integrations.report import StepReport

COLUMNS = (
    ("step", lambda r: f"{r.step}"),
    ("reward", lambda r: f"{r.reward_mean:.3f}"),
    ("rollout\ntok/s", lambda r: f"{r.tokens_per_second:,.0f}"),
    ("weight\nsync s", lambda r: f"{r.sync_seconds:.2f}"),
    ("mismatch\nk3_kl_mean", lambda r: str(r.mismatch.k3_kl_mean)),
    ("reference\nk3_kl_mean", lambda r: "0.0" if r.reference.k3_kl_mean == 0.0 else f"{r.reference.k3_kl_mean:.1e}"),
    ("entropy", lambda r: f"{r.entropy:.3f}"),
    ("version", lambda r: f"{r.policy_version}"),
    ("step s", lambda r: f"{r.sync_seconds + r.rollout_seconds + r.train_seconds:.1f}"),
)


LIVE_ROWS = 12  # of the table while the run goes on, so that it fits a small terminal
FINAL_ROWS = 25  # a longer run shows every n-th step; the log holds all


class RunDisplay:
    """Shows phases and steps while a run goes on; afterwards the folder holds `steps.jsonl` and `run.png`."""

    def __init__(self, title: str, total_steps: int, root: Path = Path("runs")) -> None:
        self.console = Console()
        self.title, self.total_steps = title, total_steps
        self.folder = root / time.strftime("%Y%m%d-%H%M%S")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.reports: list[StepReport] = []
        self.spinner = Spinner("dots", "starting")
        self.live = Live(self._view(), console=self.console, refresh_per_second=8, transient=True)

    def __enter__(self) -> RunDisplay:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def phase(self, name: str) -> None:
        """What is being done right now."""
        self.spinner.update(text=f"step {len(self.reports) + 1} of {self.total_steps}: {name}")

    def add(self, report: StepReport) -> None:
        """A finished step: a row here and a line in the log."""
        self.reports.append(report)
        with (self.folder / "steps.jsonl").open("a") as log:
            log.write(json.dumps(report.to_dict()) + "\n")
        if self.console.is_terminal:
            self.live.update(self._view())
        else:
            print("  ".join(f"{' '.join(name.split())} {show(report)}" for name, show in COLUMNS), flush=True)

    def finish(self) -> None:
        """Print the table, save the plot and say where."""
        every = -(-len(self.reports) // FINAL_ROWS)
        shown = [report for i, report in enumerate(self.reports) if i % every == 0 or i == len(self.reports) - 1]
        self.console.print(self._table(shown))
        save_plot(self.reports, self.folder / "run.png", self.title)
        print(f"log and plot: {self.folder / 'steps.jsonl'}, {self.folder / 'run.png'}")

    def _view(self) -> Group:
        return Group(self._table(self.reports[-LIVE_ROWS:]), self.spinner)

    def _table(self, reports: list[StepReport]) -> Table:
        table = Table(
            title=self.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), show_edge=False
        )
        for name, _ in COLUMNS:
            table.add_column(name, justify="right")
        for report in reports:
            table.add_row(*(show(report) for _, show in COLUMNS))
        return table


def exit_status(main: Callable[[], int]) -> int:
    """What `main` returns; 130, as shells have it, and one line where Ctrl-C ended it."""
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def print_verdict(reports: list[StepReport]) -> int:
    """The run's last line, and its exit status: 0 only if the mismatch was exactly zero in every step."""
    worst = max(report.mismatch.k3_kl_mean for report in reports)
    print(f"mismatch k3_kl_mean {worst}")
    exact = worst == 0.0 and all(report.mismatch.differing_logprobs == 0 for report in reports)
    return 0 if exact else 1


def save_plot(reports: list[StepReport], path: Path, title: str) -> None:
    """Four panels over the steps: reward, the two KLs, entropy, rollout speed and weight sync."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [report.step for report in reports]
    figure, ((reward, divergence), (entropy, speed)) = pyplot.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    figure.suptitle(title)
    reward.plot(steps, [r.reward_mean for r in reports], "o-", color="tab:green")
    reward.set(title="mean reward", ylim=(0, None))
    divergence.plot(
        steps, [r.reference.k3_kl_mean for r in reports], "s-", color="tab:orange", label="reference (policy moves)"
    )
    divergence.plot(
        steps, [r.mismatch.k3_kl_mean for r in reports], "o-", color="tab:blue", label="mismatch (must be 0)"
    )
    divergence.set(title="k3_kl_mean")
    divergence.legend()
    entropy.plot(steps, [r.entropy for r in reports], "o-", color="tab:purple")
    entropy.set(title="entropy (nats)", xlabel="step", ylim=(0, None))
    speed.plot(steps, [r.tokens_per_second for r in reports], "o-", color="tab:red", label="rollout tokens/s")
    speed.set(title="speed", xlabel="step", ylim=(0, None))
    seconds = speed.twinx()
    seconds.plot(steps, [r.sync_seconds for r in reports], "s--", color="tab:gray", label="weight sync (s)")
    seconds.set(ylim=(0, None))
    lines = speed.get_lines() + seconds.get_lines()
    speed.legend(lines, [line.get_label() for line in lines], loc="lower right")
    for axes in (reward, divergence, entropy, speed):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
