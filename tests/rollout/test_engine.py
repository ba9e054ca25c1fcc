"""The engine's promises to a caller: order, seeds, refusals, stops. Weights and failures have files of their own."""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from leftovers import children_of
from tiny_engine import END, VOCAB_SIZE, in_thread, tiny_options, write_tiny_model

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_config
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams

PROMPTS = ["The first prompt, long enough for two blocks.", "b", "Third"]


def tokens_of(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.token_ids.tolist() for rollout in rollouts]


def assert_same(left: list[Rollout], right: list[Rollout]) -> None:
    assert tokens_of(left) == tokens_of(right)
    for a, b in zip(left, right, strict=True):
        for field in ("logprobs", "policy_logprobs", "entropy"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)


# -- what a call returns -----------------------------------------------------------------------------------------------
def test_rollouts_come_prompt_major_with_one_row_per_token(engine: RolloutEngine) -> None:
    rollouts = engine.generate(PROMPTS, SamplingParams(n=2, max_tokens=6, ignore_eos=True))
    assert [(r.prompt_index, r.sample_index) for r in rollouts] == [(p, s) for p in range(3) for s in range(2)]
    for rollout in rollouts:
        assert rollout.prompt_token_ids.tolist() == engine.tokenizer.encode(PROMPTS[rollout.prompt_index]).tolist()
        assert rollout.token_ids.dtype == np.int32 and len(rollout.token_ids) == 6
        assert rollout.text == engine.tokenizer.decode(rollout.token_ids)
        for array in (rollout.logprobs, rollout.policy_logprobs, rollout.entropy):
            assert array.dtype == np.float32 and array.shape == (6,)
        assert rollout.raw_logprobs is None
        assert rollout.policy_versions.tolist() == [0] * 6
        assert (rollout.finish_reason, rollout.stop_reason) == ("length", None)
    assert tokens_of(rollouts[0::2]) != tokens_of(rollouts[1::2]), "samples of a prompt differ"


def test_every_form_of_a_prompt_means_the_same(engine: RolloutEngine) -> None:
    params = SamplingParams(max_tokens=3, seed=11)
    ids = engine.tokenizer.encode("abc")
    forms: list[Any] = [
        "abc",
        ["abc"],
        ids,
        ids.tolist(),
        [ids.tolist()],
        tuple(ids.tolist()),
        ids[None].astype(np.uint16),
    ]
    for form in forms:
        assert_same(engine.generate(form, params), engine.generate(["abc"], params))


def test_each_prompt_may_have_its_own_parameters(engine: RolloutEngine) -> None:
    params = [SamplingParams(max_tokens=2), SamplingParams(max_tokens=3, n=2, raw_logprobs=True)]
    first, second, third = engine.generate(["a", "b"], params)
    assert [len(r.token_ids) for r in (first, second, third)] == [2, 3, 3]
    assert first.raw_logprobs is None
    # At temperature 1 without options the three definitions are one.
    np.testing.assert_array_equal(second.raw_logprobs, second.policy_logprobs)
    np.testing.assert_array_equal(second.logprobs, second.policy_logprobs)


# -- seeds -------------------------------------------------------------------------------------------------------------
def test_the_same_calls_on_an_equal_engine_give_the_same_tokens(tiny_model: Path) -> None:
    runs = []
    for seed in (3, 3, 4):
        with RolloutEngine(tiny_options(tiny_model, seed=seed)) as engine:
            runs.append([engine.generate(PROMPTS, SamplingParams(max_tokens=5)) for _ in range(2)])
    for first, second in zip(runs[0], runs[1], strict=True):
        assert_same(first, second)
    assert tokens_of(runs[0][0]) != tokens_of(runs[0][1]), "the next call draws other numbers"
    assert tokens_of(runs[0][0]) != tokens_of(runs[2][0]), "another engine seed draws other numbers"


def test_a_reported_seed_repeats_its_rollout(engine: RolloutEngine) -> None:
    derived = engine.generate(PROMPTS, SamplingParams(max_tokens=5, n=2))
    assert len({rollout.seed for rollout in derived}) == len(PROMPTS), "one seed per prompt, shared by its samples"
    params = [SamplingParams(max_tokens=5, n=2, seed=derived[2 * index].seed) for index in range(len(PROMPTS))]
    assert_same(engine.generate(PROMPTS, params), derived)


def test_a_refused_call_does_not_shift_the_seeds_of_later_ones(tiny_model: Path) -> None:
    runs = []
    for refuse in (False, True):
        with RolloutEngine(tiny_options(tiny_model)) as engine:
            if refuse:
                with pytest.raises(ValueError):
                    engine.generate([[VOCAB_SIZE]])
                engine.score([[1, 2, 3]])
            runs.append(engine.generate("a", SamplingParams(max_tokens=5)))
    assert_same(runs[0], runs[1])


def test_calls_from_threads_share_the_batch_and_change_nothing(engine: RolloutEngine) -> None:
    params = [SamplingParams(max_tokens=12, seed=seed) for seed in range(6)]
    alone = [engine.generate(PROMPTS[seed % 3], params[seed]) for seed in range(6)]
    joins = [in_thread(lambda seed=seed: engine.generate(PROMPTS[seed % 3], params[seed])) for seed in range(6)]
    for expected, join in zip(alone, joins, strict=True):
        assert_same(join(), expected)


def test_coroutines_share_the_batch(engine: RolloutEngine) -> None:
    params = [SamplingParams(max_tokens=12, seed=seed) for seed in range(6)]
    alone = [engine.generate("x", one) for one in params]
    scores = engine.score(alone[0])
    steps_before = engine.metrics()["steps"]

    async def together() -> tuple[list[list[Rollout]], list[np.ndarray]]:
        generated = asyncio.gather(*(engine.agenerate("x", one) for one in params))
        return await generated, await engine.ascore(alone[0])

    rollouts, again = asyncio.run(together())
    for expected, got in zip(alone, rollouts, strict=True):
        assert_same(got, expected)
    np.testing.assert_array_equal(again[0], scores[0])
    assert engine.metrics()["steps"] - steps_before < 6 * 12, "they ran side by side"


# -- what is refused ---------------------------------------------------------------------------------------------------
REFUSED: list[tuple[Any, Any, str]] = [
    ([], None, "prompts must be .* non-empty"),
    ("", None, r"prompts\[0\] must have at least one token"),
    (["a", []], None, r"prompts\[1\].*non-empty"),
    (["a", [5, VOCAB_SIZE]], None, rf"prompts\[1\].*below vocab_size \({VOCAB_SIZE}\), got {VOCAB_SIZE}"),
    ([[-1]], None, r"prompts\[0\].*got -1"),
    ([[1.0, 2.0]], None, r"prompts\[0\].*integers"),
    ([True, False], None, r"prompts\[0\].*integers"),
    ([[[1], [2, 3]]], None, r"prompts\[0\].*token ids"),
    ([None], None, r"prompts\[0\].*integers"),
    (["a", 5], None, r"prompts\[1\].*integers"),
    ([b"bytes"], None, r"prompts\[0\].*integers"),
    (["a", "\ud800"], None, r"prompts\[1\] must be text that UTF-8 can hold"),
    (5, None, "prompts must be"),
    (None, None, "prompts must be"),
    (np.array(5), None, "prompts must be"),
    ({"a": 1}, None, "prompts must be"),
    ([[1] * 257], None, r"prompts\[0\].*max_model_len \(256\).*257"),
    ([[1] * 250], SamplingParams(max_tokens=7), r"prompts\[0\]: max_tokens \(7\).*max_model_len \(256\)"),
    (["a", "b"], [SamplingParams()], r"sampling_params.*\(2\), got 1"),
    (["a"], [{"n": 1}], r"sampling_params\[0\] must be SamplingParams"),
    (["a"], {"n": 1}, "sampling_params must be SamplingParams"),
    (["a"], SamplingParams(stop_token_ids=[VOCAB_SIZE]), r"prompts\[0\]: stop_token_ids.*below vocab_size"),
    (["a"], SamplingParams(logit_bias={VOCAB_SIZE: 1.0}), r"prompts\[0\]: logit_bias.*below vocab_size"),
    (["a"], SamplingParams(logit_bias=dict.fromkeys(range(VOCAB_SIZE), -np.inf)), r"prompts\[0\]: .*a token to draw"),
]


@pytest.mark.parametrize(("prompts", "params", "message"), REFUSED)
def test_bad_input_is_refused_before_anything_is_queued(
    shared_engine: RolloutEngine, prompts: Any, params: Any, message: str
) -> None:
    before = shared_engine.metrics()
    with pytest.raises(ValueError, match=message):
        shared_engine.generate(prompts, params)
    assert shared_engine.metrics() == before
    assert len(shared_engine.generate("still works", SamplingParams(max_tokens=2))) == 1


@pytest.fixture(scope="module")
def shared_engine(tiny_model: Path) -> Any:
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        yield engine


def test_the_most_extreme_options_leave_the_engine_running(shared_engine: RolloutEngine) -> None:
    for bias in (1e9, -1e9):
        for penalty in (1e-6, 1e6):
            extreme = SamplingParams(
                temperature=1e-6, repetition_penalty=penalty, logit_bias=dict.fromkeys(range(VOCAB_SIZE), bias), n=2
            )
            rollouts = shared_engine.generate("ab", extreme)
            assert all(np.isfinite(rollout.logprobs).all() for rollout in rollouts)
            shared_engine.score(rollouts, definition="logprobs")
    narrow = shared_engine.generate("ab", SamplingParams(top_p=1e-300, max_tokens=3))[0]
    np.testing.assert_array_equal(narrow.logprobs, 0.0, "one token is kept")
    assert shared_engine.health()["state"] == "running"


def test_unhashable_and_other_odd_names_are_refused(shared_engine: RolloutEngine) -> None:
    name: Any
    for name in ([], None, 5, "nobody"):
        for call in (
            lambda: shared_engine.drop_weights(name),  # noqa: B023 - called in this round
            lambda: shared_engine.get_weight_version(name),  # noqa: B023
            lambda: shared_engine.score([[1, 2]], policy=name),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=re.escape(repr(name))):
                call()
    assert len(shared_engine.generate("still works", SamplingParams(max_tokens=2))) == 1


def test_more_than_the_pool_holds_is_refused(tiny_model: Path) -> None:
    with RolloutEngine(tiny_options(tiny_model, num_blocks=4)) as engine:
        with pytest.raises(ValueError, match=r"num_blocks \(4\)"):
            engine.generate([[1] * 30], SamplingParams(max_tokens=4))
        assert len(engine.generate([[1] * 29], SamplingParams(max_tokens=4))) == 1


def test_text_and_stop_strings_need_a_tokenizer(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    (folder / "tokenizer.json").unlink()
    with RolloutEngine(tiny_options(folder)) as engine:
        with pytest.raises(ValueError, match=r"prompts\[0\] is text.*tokenizer"):
            engine.generate("a")
        with pytest.raises(ValueError, match=r"prompts\[1\]: stop.*tokenizer"):
            engine.generate([[1], [2]], [SamplingParams(), SamplingParams(stop=".")])
        assert engine.generate([[1]], SamplingParams(max_tokens=2))[0].text is None


def test_an_unusable_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        RolloutEngine(tiny_options(tmp_path))
    with pytest.raises(ValueError, match="config must be an EngineConfig"):
        RolloutEngine(str(tmp_path))  # type: ignore[arg-type]
    folder = write_tiny_model(tmp_path)
    with pytest.raises(ValueError, match=r"max_model_len.*256.*got 300"):
        RolloutEngine(tiny_options(folder, max_model_len=300))
    content = json.loads((folder / "config.json").read_text())
    del content["hidden_size"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json: field 'hidden_size' is missing"):
        RolloutEngine(tiny_options(folder))


def test_heads_that_no_kernel_can_do_are_refused_before_the_first_step(tmp_path: Path) -> None:
    content = tiny_config(head_dim=264, num_attention_heads=1, num_key_value_heads=1)
    save_pretrained(tmp_path, content, random_tensors(ModelConfig.from_json(content)))
    with pytest.raises(ValueError, match="head_dim must be at most 256 on the CPU, got 264"):
        RolloutEngine(tiny_options(tmp_path))


@pytest.mark.parametrize("worker", ["inprocess", "process"])
@pytest.mark.parametrize("size", [0, 100, -4])
def test_a_broken_model_file_is_refused_and_nothing_of_the_engine_stays(tmp_path: Path, worker: str, size: int) -> None:
    file = write_tiny_model(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    children = children_of(os.getpid())
    with pytest.raises(ValueError, match=f"{file}: "):
        RolloutEngine(tiny_options(tmp_path, worker=worker))
    assert children_of(os.getpid()) == children


# -- how outputs end ---------------------------------------------------------------------------------------------------
def only(*characters: str) -> dict[int, float]:
    """A logit bias that leaves these byte tokens alone."""
    kept = {END if character == "<|end|>" else BYTE_IDS[character] for character in characters}
    return {token: -np.inf for token in range(VOCAB_SIZE) if token not in kept}


BYTE_IDS = {chr(code): code - 33 for code in range(33, 127)}
"""Ids of printable ASCII in the byte tokenizer, whose vocabulary is the sorted byte alphabet."""


def test_end_of_sequence_stops_and_stays_in_the_tokens(engine: RolloutEngine) -> None:
    (rollout,) = engine.generate("a", SamplingParams(max_tokens=9, logit_bias=only("<|end|>")))
    assert rollout.token_ids.tolist() == [END] and rollout.text == ""
    assert (rollout.finish_reason, rollout.stop_reason) == ("stop", END)
    (rollout,) = engine.generate("a", SamplingParams(max_tokens=9, logit_bias=only("<|end|>"), ignore_eos=True))
    assert rollout.token_ids.tolist() == [END] * 9 and rollout.finish_reason == "length"


def test_stop_token_ids_stop_and_min_tokens_hold_them_off(engine: RolloutEngine) -> None:
    (stop,) = engine.tokenizer.encode("x").tolist()
    params = SamplingParams(max_tokens=9, stop_token_ids=[stop], logit_bias=only("x", "y"), seed=2)
    free = engine.generate("a", params)[0]
    assert free.stop_reason == stop and free.token_ids[-1] == stop
    params = SamplingParams(max_tokens=9, min_tokens=5, stop_token_ids=[stop], logit_bias=only("x", "y"), seed=2)
    held = engine.generate("a", params)[0]
    assert held.text[:5] == "yyyyy"


def test_a_stop_string_ends_the_text_before_it_and_keeps_its_tokens(engine: RolloutEngine) -> None:
    params = SamplingParams(max_tokens=64, stop=["xy"], logit_bias=only("x", "y"), n=4, seed=0)
    for rollout in engine.generate("a", params):
        whole = engine.tokenizer.decode(rollout.token_ids)
        assert (rollout.finish_reason, rollout.stop_reason) == ("stop", "xy")
        assert whole == rollout.text + "xy" and "xy" not in rollout.text


def test_a_stop_string_waits_for_min_tokens(engine: RolloutEngine) -> None:
    params = SamplingParams(max_tokens=20, min_tokens=4, stop="x", logit_bias=only("x"))
    (rollout,) = engine.generate("a", params)
    assert rollout.text == "xxx" and len(rollout.token_ids) == 4


def test_stop_reason_is_the_string_even_at_the_last_token(engine: RolloutEngine) -> None:
    (rollout,) = engine.generate("a", SamplingParams(max_tokens=2, stop="xx", logit_bias=only("x")))
    assert (rollout.finish_reason, rollout.stop_reason, rollout.text) == ("stop", "xx", "")


# -- figures -----------------------------------------------------------------------------------------------------------
def test_the_prefix_cache_shows_and_can_be_reset(engine: RolloutEngine) -> None:
    prompt = list(range(40))
    params = SamplingParams(max_tokens=4, seed=1)
    cold, warm = engine.generate([prompt], params), engine.generate([prompt], params)
    assert (cold[0].num_cached_tokens, warm[0].num_cached_tokens) == (0, 39)
    engine.reset_prefix_cache()
    reset = engine.generate([prompt], params)
    assert reset[0].num_cached_tokens == 0
    assert_same(cold, warm)
    assert_same(cold, reset)


def test_metrics_and_health_tell_what_happened(engine: RolloutEngine) -> None:
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
    metrics = engine.metrics()
    assert (metrics["prefill_tokens"], metrics["decode_tokens"], metrics["steps"]) == (3, 3, 4)
    assert metrics["finished_length"] + metrics["finished_stop"] == 1
    assert metrics["running"] == metrics["waiting"] == metrics["held"] == 0
    assert metrics["kv_usage"] == 0.0
    assert 0 < metrics["worker_seconds"] <= metrics["step_seconds"]
    health = engine.health()
    assert (health["state"], health["cause"], health["weight_versions"]) == ("running", None, {"policy": 0})
    assert health["worker"]["num_threads"] == 1
    facts = engine.describe_worker()
    assert facts["versions"] == {"policy": 0} and facts["peak_rss_bytes"] > 1e6
