"""Sampling under any options: the bits of the definition walked step by step in one program a row.

Under TRITON_INTERPRET=1 everything runs on the CPU in float32, with fewer rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gpu_rig as rig
import numpy as np
import pytest
from numpy.typing import NDArray

rig.require_device()

import gpu_sampler  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from zerokl.kernels.gpu import general_sampling, sampling, truncation  # noqa: E402
from zerokl.kernels.gpu.elementwise import vexp, vexp_to_one  # noqa: E402
from zerokl.kernels.gpu.step_arrays import sampling_sections  # noqa: E402
from zerokl.kernels.ops import SamplingBatch, neutral_sampling  # noqa: E402

pytestmark = pytest.mark.gpu

VOCAB = 1500 if rig.INTERPRETED else 50_000
ROWS = 7 if rig.INTERPRETED else 256
WIDTH = 64
Results = NDArray[np.int32]


def options_of(rows: int, *, penalties: bool = False, want_raw: bool = False) -> SamplingBatch:
    """Temperatures, cuts and forced tokens in all combinations, by row."""
    at = np.arange(rows)
    batch = replace(
        neutral_sampling(rows),
        temperature=np.array([1.0, 0.7, 0.0, 1.3, 1.0], np.float32)[at % 5],
        top_k=np.array([0, 1, 0, 50, VOCAB - 1, 400, 0], np.int32)[at % 7],
        top_p=np.array([0.95, 1.0, 0.5, 1e-6, 0.999, 0.95], np.float32)[at % 6],
        min_p=np.array([0.0, 0.0, 0.02, 0.0], np.float32)[at % 4],
        seed=np.full(rows, 2**40 + 17, np.uint64),
        position=at.astype(np.uint32),
        forced=np.where(at % 11 == 4, at % VOCAB, -1).astype(np.int32),
        want_raw=want_raw,
    )
    if not penalties:
        return batch
    return replace(
        batch,
        repetition_penalty=np.full(rows, 1.1, np.float32),
        presence_penalty=np.full(rows, 0.2, np.float32),
        history_start=np.arange(rows + 1, dtype=np.int32) * 2,
        history_token=np.stack([at * 11 % VOCAB, (at * 11 + 1) % VOCAB], 1).reshape(-1).astype(np.int32),
        history_count=np.tile(np.array([1, 0], np.int32), rows),
        bias_start=np.arange(rows + 1, dtype=np.int32),
        bias_token=(at * 13 % VOCAB).astype(np.int32),
        bias_value=np.full(rows, 1.5, np.float32),
    )


def both(batch: SamplingBatch, spread: float = 3.0, hidden: NDArray[Any] | None = None) -> tuple[Results, Results]:
    """(results, results by the definition) of random rows whose logits spread so much."""
    rows = len(batch.forced)
    hidden = rig.normal(1, rows, WIDTH) if hidden is None else hidden
    head = rig.normal(2, VOCAB, WIDTH, scale=spread / WIDTH**0.5)
    sections = {name: rig.put(values) for name, values in sampling_sections(batch, rows).items()}
    taken: list[Any] = []

    def take(*shape: int, dtype: str) -> Any:
        taken.append(rig.empty(*shape, dtype=dtype))
        return taken[-1]

    out, expected = (rig.empty(rows, int(sampling.NUM_RESULTS), dtype="int32") for _ in range(2))
    needs = general_sampling.needs_of(batch)
    general_sampling.sample(rig.put(hidden), rig.put(head), sections, out, needs, take)
    logits, processed = taken[0], rig.put(rig.get(taken[0]), "float32")
    sampling.process(processed, sections)
    gpu_sampler.sample(logits, processed, sections["options"], expected)
    columns = slice(0, int(sampling.RAW_LOGPROB if batch.want_raw else sampling.ENTROPY) + 1)
    return rig.get(out)[:, columns], rig.get(expected)[:, columns]


@pytest.mark.parametrize("penalties", [False, True])
@pytest.mark.parametrize("spread", [3.0] if rig.INTERPRETED else [3.0, 0.3])  # slow where rows are bisected
def test_has_the_bits_of_the_definition(penalties: bool, spread: float) -> None:
    got, expected = both(options_of(ROWS, penalties=penalties, want_raw=penalties), spread)
    assert (expected[:, 0] >= 0).all()
    np.testing.assert_array_equal(got, expected)


def penalised(last_token: str) -> NDArray[Any]:
    """Random logits under penalties. The last token of a history, drawn by the row so far from the end, is "known" to
    the host, on the "device" alone, or "missing".
    """
    rng, sources = np.random.default_rng(5), np.arange(ROWS)[::-1]
    tokens = (sources * 37 % VOCAB).astype(np.int32)
    histories = []
    for row in range(ROWS):
        known = [int(tokens[row])] if row % 3 == 0 else []  # seen before by every third row
        known += [other for other in rng.permutation(VOCAB)[: 70 * (row % 2)].tolist() if other != tokens[row]]
        history = dict.fromkeys(known, row % 2)
        if last_token == "known":
            history[int(tokens[row])] = history.get(int(tokens[row]), 0) + 1
        else:
            history[-1] = -1 - int(sources[row])
        histories.append(history)
    batch = replace(
        neutral_sampling(ROWS),
        repetition_penalty=np.full(ROWS, 1.1, np.float32),
        presence_penalty=np.full(ROWS, 0.2, np.float32),
        frequency_penalty=np.full(ROWS, 0.3, np.float32),
        history_start=np.cumsum([0, *map(len, histories)], dtype=np.int32),
        history_token=np.array([token for history in histories for token in history], np.int32),
        history_count=np.array([count for history in histories for count in history.values()], np.int32),
    )
    sections = {name: rig.put(values) for name, values in sampling_sections(batch, ROWS + 2).items()}
    logits = rig.put(np.random.default_rng(6).normal(size=(ROWS + 2, VOCAB)).astype(np.float32), "float32")
    if last_token == "device":
        results = np.zeros((ROWS, int(sampling.NUM_RESULTS)), np.int32)
        results[sources, int(sampling.TOKEN)] = tokens
        sampling.count_drawn(sections, rig.put(results))
    sampling.process(logits, sections)
    return rig.get(logits)


def test_tokens_that_only_the_device_has_count_in_histories() -> None:
    np.testing.assert_array_equal(penalised("device"), penalised("known"))
    assert (penalised("missing") != penalised("known")).any(), "the control"


@pytest.mark.parametrize("rows", [1, 5])
def test_few_rows_have_the_bits_of_many(rows: int) -> None:
    """The number of programs that share a row follows the number of rows."""
    everything, _ = both(options_of(ROWS))
    batch = options_of(ROWS)
    some = {
        name: values[:rows] for name in batch.__slots__ if len(values := np.atleast_1d(getattr(batch, name))) == ROWS
    }
    starts = {name: getattr(batch, name)[: rows + 1] for name in ("history_start", "bias_start")}
    got, expected = both(replace(batch, **some, **starts), hidden=rig.normal(1, ROWS, WIDTH)[:rows])
    np.testing.assert_array_equal(got, expected)
    if not rig.INTERPRETED:  # a library's product there
        np.testing.assert_array_equal(got, everything[:rows])


@pytest.mark.skipif(rig.INTERPRETED, reason="minutes there")
def test_equal_logits_are_cut_by_their_ids() -> None:
    """More entries in the last interval than there is room for: the row is bisected as a whole."""
    got, expected = both(options_of(16), hidden=np.zeros((16, WIDTH), np.float32))
    np.testing.assert_array_equal(got, expected)
    assert VOCAB > truncation.CANDIDATES


def test_rows_without_a_distribution_are_named() -> None:
    hidden = rig.normal(1, ROWS, WIDTH)
    hidden[1, 5] = np.nan
    batch = options_of(ROWS, penalties=True)
    banned = batch.bias_value.copy()
    banned[6] = np.nan
    got, expected = both(replace(batch, bias_value=banned), hidden=hidden)
    assert got[1, 0] == got[6, 0] == -1
    np.testing.assert_array_equal(got, expected)


def test_another_cut_is_found_out() -> None:
    """The control: top-p of 0.94 in place of 0.95."""
    batch = options_of(ROWS)
    got, _ = both(batch)
    others, _ = both(replace(batch, top_p=np.where(batch.top_p == np.float32(0.95), np.float32(0.94), batch.top_p)))
    changed = (got != others).any(axis=1)
    assert changed[batch.top_p == np.float32(0.95)].any()
    assert not changed[batch.top_p == 1].any()


@triton.jit
def exps_kernel(x_ptr, a_ptr, b_ptr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(a_ptr + i, vexp(x))
    tl.store(b_ptr + i, vexp_to_one(x))


def test_the_shorter_exp_has_the_bits_of_the_stated_one() -> None:
    rng = np.random.default_rng(0)
    edges = [0.0, -0.0, -np.inf, np.nan, -87.3, np.nextafter(np.float32(-87.3), np.float32(-90)), -1e30, -1e-30]
    x = np.concatenate([-rng.uniform(0, 90, 1 << 16), -rng.exponential(1, 1 << 16), np.resize(edges, 1024)])
    x = x.astype(np.float32)
    a, b = (rig.empty(len(x), dtype="float32") for _ in range(2))
    exps_kernel[(len(x) // 1024,)](rig.put(x, "float32"), a, b, N=1024, enable_fp_fusion=False)
    np.testing.assert_array_equal(rig.get(a), rig.get(b))
