"""Where the arrays of steps lie on a device, and how much memory attention takes; on a device of NumPy arrays."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gpu_rig as rig
import numpy as np
import pytest

pytest.importorskip("triton", reason="needs Triton")

from zerokl.kernels.gpu import current_step, norms, paged_attention
from zerokl.kernels.gpu.attention_tiles import attention_tiles
from zerokl.kernels.gpu.current_step import CurrentStep
from zerokl.kernels.gpu.step_attention import StepAttention
from zerokl.kernels.ops import AttentionSpec, KVPool, StepInputs, neutral_sampling
from zerokl.rollout.models.synthetic import step_inputs

pytestmark = pytest.mark.gpu

POOL: Any = KVPool(None, None, 16)
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25, rotary_layout="half", norm_eps=1e-6)


def step_of(lengths: list[int], context: int = 0, width: int = 8) -> StepInputs:
    """Chunks of these many tokens, the last ones of `context` more than that."""
    tables = [list(range(width))] * len(lengths)
    return step_inputs([np.ones(length, np.int32) for length in lengths], [context] * len(lengths), tables, 16)


def begin(step: CurrentStep, inputs: StepInputs) -> tuple[int | None, int]:
    """The step's place, and the address of its arrays."""
    step.begin(inputs, POOL, {})
    step.restart()
    step.send()
    return step.place, step.sections["token_ids"].data_ptr()


def test_steps_of_a_layout_have_the_same_arrays() -> None:
    step = CurrentStep(rig.HostDevice(), "float32")
    first, other = begin(step, step_of([1, 1, 5])), begin(step, step_of([1] * 100))
    assert first != other and begin(step, step_of([2, 1, 4])) == first and begin(step, step_of([1] * 90)) == other
    step.forget()
    assert begin(step, step_of([1, 1, 5]))[0] not in (first[0], other[0]), "recorded steps must not take it for theirs"


def test_what_came_longest_ago_goes_and_comes_back_as_another(monkeypatch: pytest.MonkeyPatch) -> None:
    step = CurrentStep(rig.HostDevice(), "float32")
    kinds = [[1] * 10, [1] * 20, [1] * 40]
    begin(step, step_of(kinds[-1]))
    monkeypatch.setattr(current_step, "KEPT_ENTRIES", 2 * len(step.layout.flat))
    step.forget()
    places = [begin(step, step_of(kind))[0] for kind in (*kinds, kinds[1], kinds[0], kinds[2])]
    assert len(set(places[:3])) == 3 and places[3] == places[1], "kept: it came before the third"
    assert places[4] not in places[:4], "the first had to go for the third"


def test_many_narrow_tables_are_not_a_few_wide_ones() -> None:
    """Their sections are as long; launches are given the width."""
    step, made = CurrentStep(rig.HostDevice(), "float32"), []
    for sequences, length, width in ((16, 32, 32), (64, 8, 8)):
        inputs = step_of([length] * sequences, width=width)
        _, chunks = attention_tiles(inputs.seq_starts, inputs.context_lens, 8)
        inputs = replace(inputs, logit_rows=np.arange(64, dtype=np.int32), sampling=neutral_sampling(64))
        step.begin(inputs, POOL, {"chunk_tiles": chunks})
        step.restart()
        step.send()
        made.append((step.place, step.layout.max_blocks, step.layout.sections))
    assert made[0][2] == made[1][2] and made[0][1:2] != made[1][1:2]
    assert made[0][0] != made[1][0]


def test_a_step_of_many_tokens_has_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current_step, "MOST_RECORDED_TOKENS", 64)
    step = CurrentStep(rig.HostDevice(), "float32")
    places = [begin(step, step_of([tokens]))[0] for tokens in (64, 65, 60)]
    assert places[0] is not None and places == [places[0], None, places[0]]


def test_splits_of_single_tokens_take_no_memory_for_the_tokens_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(norms, "qkv_to_cache", lambda *_: None)
    monkeypatch.setattr(paged_attention, "attention", lambda *_, partial, **__: given.append(partial))
    step = CurrentStep(rig.HostDevice(), "float32")
    attention = StepAttention(step, "float32", spreads_splits=True, shares_prefixes=False)
    attention.serve(SPEC)
    inputs = step_of([600, 1, 1], context=1000, width=128)
    step.begin(inputs, POOL, attention.lists(inputs, POOL.block_size))
    step.restart()
    step.send()
    norms_of: Any = SimpleNamespace(q_norm=None, k_norm=None)
    attention.attention(step.take(1024, 8 * 16), 0, norms_of, None, SPEC)
    states, of_chunks = given
    assert of_chunks is None and [tensor.shape for tensor in states] == [(16 * 4 * 32, 16), (16 * 4 * 32, 2)]
