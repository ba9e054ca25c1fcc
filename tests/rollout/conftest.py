"""Fixtures of the rollout room's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks_engine import write_moe_model
from tiny_engine import tiny_options, write_byte_tokenizer, write_tiny_model

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.text import Tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token per byte, and <|end|> (256)."""
    folder = tmp_path_factory.mktemp("byte_tokenizer")
    write_byte_tokenizer(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny random model."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model with two mixtures of experts."""
    return write_moe_model(tmp_path_factory.mktemp("moe_model"))


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[RolloutEngine]:
    """An engine on the tiny model."""
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        yield engine
