"""Part `exact` of run_all.py: the logprobs of a decode against everything that may not change them, bit for bit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from policy_rows import policy_rows

from models import model_folder
from zerokl.kernels.gpu import paged_attention
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams

Row = dict[str, Any]
MakeEngine = Callable[..., RolloutEngine]

SAMPLES, TOKENS = 8, 64
PLAIN = SamplingParams(n=SAMPLES, max_tokens=TOKENS, ignore_eos=True, seed=21)
TRUNCATED = SamplingParams(n=SAMPLES, max_tokens=24, ignore_eos=True, seed=22, temperature=0.7, top_p=0.95)

VARIANTS: dict[str, dict[str, Any]] = {
    "graphs off": {"record_graphs": False},
    "chunks of 100 tokens": {"max_num_batched_tokens": 100, "max_num_seqs": 64},
    "no prefix cache": {"enable_prefix_caching": False},
    "preemption": {"num_blocks": 150},
}


def exact_rows(folder: Path, make_engine: MakeEngine) -> list[Row]:
    """Values compared and values that differ, per model and comparison."""
    return [
        *_rows_of("A", 32, folder, make_engine),
        *_rows_of("B", 8, folder, make_engine, variants=()),
        *policy_exact_rows(folder, make_engine, ("A",)),
    ]


def policy_exact_rows(folder: Path, make_engine: MakeEngine, models: Sequence[str]) -> list[Row]:
    """The rows of the trainer's forward alone."""
    rows = []
    for row in policy_rows(folder, make_engine, models):
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def _rows_of(
    model: str, groups: int, folder: Path, make_engine: MakeEngine, variants: tuple[str, ...] = tuple(VARIANTS)
) -> Iterator[Row]:
    path = model_folder(model, folder / model)

    def row(check: str, counts: tuple[int, int]) -> Row:
        made = {"model": model, "check": check, "exact_values": counts[0], "differing_values": counts[1]}
        print(json.dumps(made), flush=True)
        return made

    with make_engine(path) as engine:
        vocab = engine.model_config.vocab_size
        prompts = list(np.random.default_rng(20).integers(10, vocab, (64, 256)).astype(np.int32))
        base = engine.generate(prompts[:groups], PLAIN)
        truncated = engine.generate(prompts[:1], TRUNCATED)
        yield row("score() of all", _against_score(engine, base, "policy_logprobs"))
        yield row("score() at top_p 0.95, temperature 0.7", _against_score(engine, truncated, "logprobs"))
        alone = engine.generate(prompts[:1], SamplingParams(n=1, max_tokens=TOKENS, ignore_eos=True, seed=21))
        yield row("batch of 1", compare(base[:1], alone))
        yield row("batch of 8", compare(base[:SAMPLES], engine.generate(prompts[:1], PLAIN)))
        yield row("batch of 512", compare(base, engine.generate(prompts, PLAIN)[: len(base)]))
    for name in variants:
        with make_engine(path, **VARIANTS[name]) as engine:
            got = engine.generate(prompts[:4], PLAIN)
            preempted = sum(rollout.num_preemptions for rollout in got)
            check = f"{name} ({preempted} preemptions)" if preempted else name
            yield row(check, compare(base[: len(got)], got))
            yield row(f"{name}, top_p 0.95", compare(truncated, engine.generate(prompts[:1], TRUNCATED)))
    if variants:
        with _other_splits(), make_engine(path) as engine:
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
