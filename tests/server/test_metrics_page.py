"""docs/observability.md and the Grafana dashboard name what a scrape has, and nothing else."""

from __future__ import annotations

import json
import re
import urllib.request
from typing import Any

import metrics_page
import pytest
from prometheus_client.parser import text_string_to_metric_families

from zerokl.rollout.client import RolloutClient
from zerokl.rollout.observe.prometheus import MetricsServer
from zerokl.rollout.observe.series import SERIES
from zerokl.rollout.sampling_params import SamplingParams

RANK_FAULTS = ("rank_restarts", "rank_deaths", "rank_stalls", "rank_step_timeouts", "rank_faults_in_step")


@pytest.fixture
def scraped(client: RolloutClient) -> set[str]:
    """Names of a scrape of an engine that counts faults of ranks and was told of a trainer's forward."""
    rollouts = client.generate("a", SamplingParams(max_tokens=4))
    client.report_trainer_logprobs(rollouts, [one.policy_logprobs for one in rollouts])
    seen = client.telemetry()
    counted = dict.fromkeys((*RANK_FAULTS, "rank_restart_seconds"), 0)
    with MetricsServer("127.0.0.1:0") as server:
        server.start(lambda: {**seen, "metrics": {**counted, **seen["metrics"]}})
        with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    return {sample.name for family in families for sample in family.samples}


def test_the_page_is_what_the_code_does() -> None:
    """Run `python tests/metrics_page.py` after a change of the series."""
    _, marker, generated = metrics_page.PAGE.read_text().partition(metrics_page.MARKER)
    assert marker and generated == metrics_page.table()


def test_the_table_is_what_a_scrape_has(scraped: set[str]) -> None:
    assert scraped == {name for series in SERIES for name in metrics_page.exported_names(series)}


def test_the_pages_prose_names_only_what_is_there(scraped: set[str]) -> None:
    prose = metrics_page.PAGE.read_text().partition(metrics_page.MARKER)[0]
    names = set(re.findall(r"zerokl_\w+", prose))
    histograms = {series.name for series in SERIES if series.kind == "histogram"}
    assert names and names <= scraped | histograms


def expressions(node: Any) -> list[str]:
    """All queries of a dashboard."""
    if isinstance(node, dict):
        own = [value for key, value in node.items() if key in ("expr", "query") and isinstance(value, str)]
        return own + [found for value in node.values() for found in expressions(value)]
    return [found for item in node for found in expressions(item)] if isinstance(node, list) else []


def unknown(expression: str, scraped: set[str]) -> set[str]:
    return set(re.findall(r"zerokl_\w+", expression)) - scraped


def test_every_query_of_the_dashboard_names_a_series(scraped: set[str]) -> None:
    dashboard = json.loads(metrics_page.DASHBOARD.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len(panels) > 15 and all(panel["targets"] for panel in panels)
    for panel in panels:
        for expression in expressions(panel):
            assert "zerokl_" in expression and not unknown(expression, scraped), panel["title"]
            assert unknown(expression.replace("zerokl_", "zerokl_x_", 1), scraped), "the negative control"
            labels = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
            known = {label for series in SERIES for label in series.labels} | {"le"}
            assert labels <= known, f"{panel['title']}: {labels - known}"
            assert expression.count("(") == expression.count(")")
    squares = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(square["x"] + square["w"] <= 24 for square in squares)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
