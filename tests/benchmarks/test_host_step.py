"""What the host's benchmark measures: every stage of every engine, and a floor below all of it."""

from __future__ import annotations

import host_step
import pytest


@pytest.mark.parametrize("engine", host_step.ENGINES)
def test_every_stage_is_measured(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_step.worker_child, "_BOOT", host_step.worker_child._BOOT)
    found = host_step.microseconds(engine, 16, windows=1)
    assert found.keys() - {"packing", "rank"} == {*host_step.STAGES, "rest", "host", "period"}
    assert ("rank" in found) == (host_step.ENGINES[engine] > 0)
    assert all(found[stage] > 0 for stage in host_step.STAGES)
    assert found["host"] == pytest.approx(sum(found[stage] for stage in (*host_step.STAGES, "rest")), abs=1)
    assert host_step.floor_us(16) < found["host"]
