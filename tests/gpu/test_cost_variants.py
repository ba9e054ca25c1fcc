"""What the engine is measured against computes what the engine computes: products with K in parts, tokens alone."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_rig as rig
import numpy as np
import pytest
from numpy.typing import NDArray

rig.require_device()
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))

import split_k  # noqa: E402
import tokens_only  # noqa: E402

from zerokl.kernels.gpu import lm_head, matmul, sampling  # noqa: E402
from zerokl.kernels.gpu.step_arrays import sampling_options  # noqa: E402
from zerokl.kernels.gpu.tiles import Tile  # noqa: E402
from zerokl.kernels.ops import neutral_sampling  # noqa: E402

pytestmark = pytest.mark.gpu

ROWS, OUTPUTS, WIDTH = (7, 40, 96) if rig.INTERPRETED else (100, 1600, 1024)
TILE = Tile(16, 32, 32, 4, 2) if rig.INTERPRETED else Tile(64, 64, 128, 4, 4, tma=True)
ROUNDING = 1e-6 if rig.INTERPRETED else 3e-3


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_products_in_parts(parts: int, swiglu: bool) -> None:
    x, w = rig.put(rig.normal(1, ROWS, WIDTH)), rig.put(rig.normal(2, OUTPUTS, WIDTH, scale=0.1))
    partial = rig.empty(parts, ROWS, OUTPUTS, dtype="float32")
    out, expected = (rig.empty(ROWS, OUTPUTS // 2 if swiglu else OUTPUTS) for _ in range(2))
    split_k.split(x, w, partial, parts, TILE)
    split_k.join(partial, out, ROWS * OUTPUTS, parts, swiglu=swiglu)
    if swiglu:
        matmul.swiglu(x, w, expected, tile=TILE)
    else:
        matmul.linear(x, w, None, expected, tile=TILE)
    assert rig.relative_error(rig.get(out), rig.get(expected)) < ROUNDING


def test_parts_change_bits() -> None:
    """The control: where they changed none, nothing would be compared."""
    if rig.INTERPRETED:
        pytest.skip("claims about bits are claims about a GPU")
    x, w = rig.put(rig.normal(1, ROWS, WIDTH)), rig.put(rig.normal(2, OUTPUTS, WIDTH))
    whole, partial = rig.empty(ROWS, OUTPUTS, dtype="float32"), rig.empty(2, ROWS, OUTPUTS, dtype="float32")
    matmul.linear(x, w, None, whole, tile=TILE)
    split_k.split(x, w, partial, 2, TILE)
    halves = rig.get(partial)
    assert (halves[0] + halves[1] != rig.get(whole)).mean() > 0.1


def test_largest_entries_of_tiles() -> None:
    x = rig.normal(3, ROWS, OUTPUTS)
    out = rig.empty(ROWS, -(-OUTPUTS // 128), dtype="float32")
    split_k.tile_max(rig.put(x, "float32"), out, 128)
    padded = np.pad(x, ((0, 0), (0, -OUTPUTS % 128)), constant_values=-np.inf)
    np.testing.assert_array_equal(rig.get(out), padded.reshape(ROWS, -1, 128).max(-1))


def drawn(temperature: float, tokens_alone: bool, hidden: NDArray[np.float32]) -> NDArray[np.int32]:
    rows, vocab = len(hidden), 1500 if rig.INTERPRETED else 20_000
    batch = replace(
        neutral_sampling(rows, temperature=temperature),
        seed=np.full(rows, 2**40 + 17, np.uint64),
        position=np.arange(rows, dtype=np.uint32),
    )
    head, options = rig.put(rig.normal(2, vocab, 64, scale=0.3)), rig.put(sampling_options(batch, rows))
    logits, chunks = rig.empty(rows, vocab, dtype="float32"), lm_head.num_chunks(vocab)
    maxima = rig.empty(rows, lm_head.num_tiles(rows, vocab, rig.FLOAT), dtype="float32")
    sums, masses = rig.empty(rows, chunks, 2, dtype="float32"), rig.empty(rows, chunks, dtype="int64")
    out: Any = rig.empty(rows, int(sampling.NUM_RESULTS), dtype="int32")
    if tokens_alone:
        tokens_only.settle(rig.put(hidden), head, options, logits, maxima, masses, out)
    else:
        lm_head.settle(rig.put(hidden), head, options, logits, maxima, sums, masses, out)
    return rig.get(out)[:, int(sampling.TOKEN)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_without_logprobs_are_the_same(temperature: float) -> None:
    hidden = rig.normal(1, ROWS, 64)
    hidden[1, 5] = np.inf
    expected = drawn(temperature, False, hidden)
    assert expected[1] == -1 and len(set(expected.tolist())) > 3
    np.testing.assert_array_equal(drawn(temperature, True, hidden), expected)
