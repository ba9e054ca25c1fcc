"""Every test of this room must leave shared memory as it found it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from leftovers import segments_of


@pytest.fixture(autouse=True)
def no_segment_left() -> Iterator[None]:
    assert segments_of(os.getpid()) == []
    yield
    assert segments_of(os.getpid()) == []
