"""Batches of sampling options for tests, and one call that runs the C++ kernel on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.cpu import _cpu
from zerokl.kernels.ops import SampleResult, SamplingBatch, neutral_sampling

Singles = NDArray[np.float32]
RAGGED = {"history": ("history_token", "history_count"), "bias": ("bias_token", "bias_value")}


def make_batch(
    rows: int,
    *,
    history: Sequence[Mapping[int, int]] = (),
    bias: Sequence[Mapping[int, float]] = (),
    want_raw: bool = False,
    **options: Any,
) -> SamplingBatch:
    """`options` are scalars or arrays [rows] for fields of SamplingBatch; history and bias are one mapping per row."""
    batch = neutral_sampling(rows)
    given = {
        name: np.ascontiguousarray(np.broadcast_to(np.asarray(value).astype(getattr(batch, name).dtype), rows))
        for name, value in options.items()
    }
    for name, rows_of in (("history", history), ("bias", bias)):
        if rows_of:
            token, value = RAGGED[name]
            given[f"{name}_start"] = np.cumsum([0, *map(len, rows_of)]).astype(np.int32)
            given[token] = np.array([t for row in rows_of for t in row], np.int32)
            given[value] = np.array([v for row in rows_of for v in row.values()], getattr(batch, value).dtype)
    return replace(batch, want_raw=want_raw, **given)


def take_rows(batch: SamplingBatch, rows: Sequence[int]) -> SamplingBatch:
    """Some rows of a batch, in the order given."""
    parts: dict[str, Any] = {}
    for name, columns in RAGGED.items():
        start = getattr(batch, f"{name}_start")
        slices = [slice(start[r], start[r + 1]) for r in rows]
        parts[f"{name}_start"] = np.cumsum([0, *(s.stop - s.start for s in slices)]).astype(np.int32)
        for column in columns:
            values = getattr(batch, column)
            parts[column] = np.concatenate([values[:0], *(values[s] for s in slices)])
    index = np.asarray(rows, int)
    for field in fields(batch):
        if field.name not in parts and field.name != "want_raw":
            parts[field.name] = getattr(batch, field.name)[index]
    return replace(batch, **parts)


def sample(logits: Singles, batch: SamplingBatch) -> SampleResult:
    """The C++ kernel on logits [R, V]."""
    rows = len(logits)
    result = SampleResult(
        tokens=np.empty(rows, np.int32),
        logprobs=np.empty(rows, np.float32),
        policy_logprobs=np.empty(rows, np.float32),
        entropy=np.empty(rows, np.float32),
        raw_logprobs=np.empty(rows, np.float32) if batch.want_raw else None,
    )
    inputs = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "want_raw"}
    outputs = {field.name: getattr(result, field.name) for field in fields(result)}
    _cpu.sample(logits=logits, **inputs, **outputs)
    return result


def assert_same_bits(a: SampleResult, b: SampleResult) -> None:
    for field in fields(SampleResult):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if x is None or y is None:
            assert x is y, field.name
        else:
            np.testing.assert_array_equal(x.view(np.uint32), y.view(np.uint32), err_msg=field.name)


def logprobs_of_all(logits: Singles, **options: Any) -> SampleResult:
    """Every token of one row of logits [V] in turn as the forced token."""
    size = len(logits)
    batch = make_batch(size, forced=np.arange(size), **options)
    return sample(np.ascontiguousarray(np.broadcast_to(logits, (size, size))), batch)


def support(logits: Sequence[float] | Singles, **options: Any) -> list[int]:
    """Tokens that can be drawn from one row of logits."""
    result = logprobs_of_all(np.asarray(logits, np.float32), **options)
    return np.flatnonzero(result.logprobs > -np.inf).tolist()


def random_batch(rows: int, vocab: int, rng: np.random.Generator) -> SamplingBatch:
    """Every option on in some rows and off in others, forced tokens in a few."""

    def sometimes(values: NDArray[Any], off: float) -> NDArray[Any]:
        return np.where(rng.random(rows) < 0.5, values, off)

    def some_tokens() -> list[int]:
        return rng.choice(vocab, rng.integers(0, min(vocab, 9)), replace=False).tolist()

    return make_batch(
        rows,
        temperature=rng.choice([1.0, 0.7, 1.9, 0.05, 0.0], rows, p=[0.4, 0.2, 0.2, 0.1, 0.1]),
        top_k=sometimes(rng.integers(1, vocab + 2, rows), 0),
        top_p=sometimes(1 - rng.random(rows), 1),
        min_p=sometimes(rng.random(rows) ** 4, 0),
        repetition_penalty=sometimes(rng.uniform(0.5, 2, rows), 1),
        presence_penalty=sometimes(rng.normal(size=rows), 0),
        frequency_penalty=sometimes(rng.normal(size=rows), 0),
        seed=rng.integers(0, 2**64, rows, dtype=np.uint64),
        sample_index=rng.integers(0, 2**32, rows),
        position=rng.integers(0, 2**32, rows),
        forced=np.where(rng.random(rows) < 0.2, rng.integers(0, vocab, rows), -1),
        history=[{t: int(rng.integers(0, 4)) for t in some_tokens()} for _ in range(rows)],
        bias=[{t: float(rng.choice([-3, 2.5, -np.inf])) for t in some_tokens()[:3]} for _ in range(rows)],
        want_raw=True,
    )
