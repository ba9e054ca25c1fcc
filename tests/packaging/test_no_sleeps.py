"""Nothing waits by the clock alone: every wait is for an event, with a bound at most."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLEEP = re.compile(r"\b(time|asyncio)\.sleep\(|from (time|asyncio) import .*\bsleep\b")


@pytest.mark.parametrize("room", ["rollout", "weight_sync", "kernels", "integrations"])
def test_no_room_sleeps(room: str) -> None:
    found = [str(path) for path in (ROOT / room).rglob("*.py") if SLEEP.search(path.read_text())]
    assert found == []


def test_a_sleep_would_be_found() -> None:
    assert SLEEP.search("    time.sleep(1)") and SLEEP.search("from time import perf_counter, sleep")
