"""Part `exact` of run_all.py: the logprobs of a decode against everything that may not change them, bit for bit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from policy_rows import policy_rows

from models import model_folder, smollm2_folder
from zerokl.kernels.gpu import paged_attention
from zerokl.kernels.gpu.ops import GpuOps
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.worker import LocalWorker

Row = dict[str, Any]
MakeEngine = Callable[..., RolloutEngine]

SAMPLES, TOKENS = 8, 64
PLAIN = SamplingParams(n=SAMPLES, max_tokens=TOKENS, ignore_eos=True, seed=21)
TRUNCATED = SamplingParams(n=SAMPLES, max_tokens=24, ignore_eos=True, seed=22, temperature=0.7, top_p=0.95)

OWN_PREFIXES = "each sequence reads the shared prompt for itself"
VARIANTS: dict[str, dict[str, Any]] = {
    "graphs off": {"record_graphs": False},
    "chunks of 100 tokens": {"max_num_batched_tokens": 100, "max_num_seqs": 64},
    "no prefix cache": {"enable_prefix_caching": False},
    "preemption": {"num_blocks": 150},
    OWN_PREFIXES: {},
}
GROUPS = {"A": 32, "M": 32, "SmolLM2": 32, "B": 8, "C": 16}
"""Prompts of the rollouts that all others are compared with."""


def exact_rows(folder: Path, make_engine: MakeEngine, models: Sequence[str]) -> list[Row]:
    """Values compared and values that differ, per model and comparison; models of GROUPS."""
    rows: list[Row] = []
    for model in models:
        if model != "SmolLM2":
            rows += _rows_of(model, partial(make_engine, model_folder(model, folder / model)))
        elif (path := smollm2_folder(folder)) is not None:
            rows += _rows_of(model, partial(make_engine, path, make_worker=LocalWorker))
    return rows


def policy_exact_rows(folder: Path, make_engine: MakeEngine, models: Sequence[str]) -> list[Row]:
    """The rows of the trainer's forward alone."""
    rows = []
    for row in policy_rows(folder, make_engine, models):
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def _rows_of(model: str, make_engine: MakeEngine) -> Iterator[Row]:
    def row(check: str, counts: tuple[int, int]) -> Row:
        made = {"model": model, "check": check, "exact_values": counts[0], "differing_values": counts[1]}
        print(json.dumps(made), flush=True)
        return made

    with make_engine() as engine:
        vocab = engine.model_config.vocab_size
        prompts = list(np.random.default_rng(20).integers(10, vocab, (64, 256)).astype(np.int32))
        base = engine.generate(prompts[: GROUPS[model]], PLAIN)
        truncated = engine.generate(prompts[:1], TRUNCATED)
        yield row("score() of all", _against_score(engine, base, "policy_logprobs"))
        yield row("score() at top_p 0.95, temperature 0.7", _against_score(engine, truncated, "logprobs"))
        alone = engine.generate(prompts[:1], SamplingParams(n=1, max_tokens=TOKENS, ignore_eos=True, seed=21))
        yield row("batch of 1", compare(base[:1], alone))
        yield row("batch of 8", compare(base[:SAMPLES], engine.generate(prompts[:1], PLAIN)))
        yield row("batch of 512", compare(base, engine.generate(prompts, PLAIN)[: len(base)]))
    for name, options in VARIANTS.items():
        with _own_prefixes(name == OWN_PREFIXES), make_engine(**options) as engine:
            got = engine.generate(prompts[:4], PLAIN)
            preempted = sum(rollout.num_preemptions for rollout in got)
            check = f"{name} ({preempted} preemptions)" if preempted else name
            yield row(check, compare(base[: len(got)], got))
            yield row(f"{name}, top_p 0.95", compare(truncated, engine.generate(prompts[:1], TRUNCATED)))
    with _other_splits(), make_engine() as engine:
        got = engine.generate(prompts[:4], PLAIN)
        yield row("control: splits of 32 keys, must differ", compare(base[: len(got)], got))


def compare(one: list[Rollout], other: list[Rollout]) -> tuple[int, int]:
    """Values, and those of them that differ: tokens, logprobs, policy logprobs and entropies."""
    pairs = [
        (getattr(a, name), getattr(b, name))
        for a, b in zip(one, other, strict=True)
        for name in ("token_ids", "logprobs", "policy_logprobs", "entropy")
    ]
    return sum(len(a) for a, _ in pairs), sum(_differing(a, b) for a, b in pairs)


def _against_score(engine: RolloutEngine, rollouts: list[Rollout], definition: Any) -> tuple[int, int]:
    scores = engine.score(rollouts, definition=definition)
    pairs = [(getattr(rollout, definition), score) for rollout, score in zip(rollouts, scores, strict=True)]
    return sum(len(a) for a, _ in pairs), sum(_differing(a, b) for a, b in pairs)


def _differing(a: NDArray[Any], b: NDArray[Any]) -> int:
    assert not np.isnan(a).any() and not np.isnan(b).any()
    return int((a != b).sum()) if len(a) == len(b) else max(len(a), len(b))


@contextlib.contextmanager
def _other_splits() -> Iterator[None]:
    with mock.patch.dict(paged_attention.attention.__kwdefaults__, {"split": 32}):
        yield


@contextlib.contextmanager
def _own_prefixes(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    with mock.patch.object(GpuOps, "shares_prefixes", False):
        yield
