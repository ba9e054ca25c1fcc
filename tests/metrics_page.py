"""The generated half of docs/observability.md: a table of every series.

python tests/metrics_page.py      writes it into the page
"""

from __future__ import annotations

from pathlib import Path

from zerokl.rollout.observe.readings import Series
from zerokl.rollout.observe.series import SERIES, UNLISTED

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "observability.md"
DASHBOARD = DOCS / "grafana-dashboard.json"
MARKER = "<!-- Everything below is written by tests/metrics_page.py. -->\n"


def exported_names(series: Series) -> list[str]:
    """The names of a series in a scrape."""
    if series.kind == "histogram":
        return [f"{series.name}_{part}" for part in ("bucket", "count", "sum")]
    return [f"{series.name}_total" if series.kind == "counter" else series.name]


def table() -> str:
    """Every series, in the order of a scrape."""
    rows = ["| metric | kind | labels | meaning |", "| --- | --- | --- | --- |"]
    for series in (*SERIES, UNLISTED):
        name = series.name if series.kind == "histogram" else exported_names(series)[0]
        rows.append(f"| `{name}` | {series.kind} | {', '.join(series.labels)} | {series.meaning} |")
    return "\n" + "\n".join(rows) + "\n"


def main() -> None:
    prose, _, _ = PAGE.read_text().partition(MARKER)
    PAGE.write_text(prose + MARKER + table())


if __name__ == "__main__":
    main()
