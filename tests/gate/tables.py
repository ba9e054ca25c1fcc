"""The gate's reports as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from gate.controls import ControlReport
from gate.measure import VariantReport
from gate.story import Chapter


def tables(
    variants: Sequence[VariantReport], controls: Sequence[ControlReport], chapters: Sequence[Chapter]
) -> list[Table]:
    """Variants, negative controls and the story; a table without rows is left out."""
    return [table for table in (variant_table(variants), control_table(controls), story_table(chapters)) if table.rows]


def variant_table(reports: Sequence[VariantReport]) -> Table:
    """A row per variant, with the proof that it was tried."""
    table = _table("Mismatch of rollout and trainer, by variant")
    for heading in ("variant", "tokens", "k3 mean", "k3 p99", "k3 max", "logprobs\ndiffer", "tokens\ndiffer"):
        table.add_column(heading, justify="left" if heading == "variant" else "right", no_wrap=heading == "variant")
    table.add_column("what occurred", ratio=1)
    table.add_column("verdict")
    for report in reports:
        occurred = ", ".join(f"{value:g} {_words(name)}" for name, value in report.factors.items())
        table.add_row(
            report.name,
            str(report.tokens),
            *(_kl(value) for value in (report.k3_kl_mean, report.k3_kl_p99, report.k3_kl_max)),
            str(report.differing_logprobs),
            str(report.differing_tokens),
            occurred if not report.missing else "; ".join(report.missing),
            _verdict(not report.failures, "exact", "FAILED"),
        )
    return table


def control_table(reports: Sequence[ControlReport]) -> Table:
    """A row per breach."""
    table = _table("Negative controls: breaches that the gate must find")
    for heading in ("breach", "k3 max", "logprobs\ndiffer", "tokens\ndiffer"):
        table.add_column(heading, justify="left" if heading == "breach" else "right")
    table.add_column("found by", ratio=1)
    table.add_column("not seen by", ratio=1)
    table.add_column("verdict")
    for report in reports:
        table.add_row(
            report.name,
            _kl(report.k3_kl_max),
            str(report.differing_logprobs),
            str(report.differing_tokens),
            ", ".join(report.caught_by),
            ", ".join(report.passed_by),
            _verdict(report.caught, "caught", "MISSED"),
        )
    return table


def story_table(chapters: Sequence[Chapter]) -> Table:
    """A row per kind of kernels: the same arrivals under two schedules."""
    table = _table("The same arrivals: schedule coupled to the forward (FastDeploy #6680), or collected (#7791)")
    table.add_column("kernels", ratio=1)
    for heading in ("k3 mean\ncoupled", "k3 mean\ncollected", "ratio", "prefill steps\ncoupled", "collected"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for chapter in chapters:
        ratio = chapter.k3_ratio
        table.add_row(
            f"{chapter.policy}: {chapter.kernels}",
            _kl(chapter.coupled_k3_kl_mean),
            _kl(chapter.collected_k3_kl_mean),
            "-" if ratio is None else f"{ratio:.3g}",
            str(chapter.coupled_prefill_steps),
            str(chapter.collected_prefill_steps),
            _verdict(chapter.passed, "exact", "FAILED") if chapter.kernels == "ours" else "not gated",
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold")


def _verdict(good: bool, yes: str, no: str) -> str:
    return f"[green]{yes}[/]" if good else f"[bold red]{no}[/]"


def _kl(value: float) -> str:
    return "0" if value == 0 else f"{value:.2e}"


def _words(counter: str) -> str:
    words = counter.replace("_", " ")
    return words.replace("refused window", "holds of the window").replace("refused", "refusals for")
