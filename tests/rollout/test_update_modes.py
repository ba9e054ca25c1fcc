"""Requests in flight at an update: what goes on, with which keys and values, and what the rollouts say of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_engine import GatedWorker, gated_engine, in_thread, tiny_options, tiny_tensors, update_after, write_tiny_model

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import StaleRequestError
from zerokl.rollout.kv_cache import KVCacheManager, manager
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams

LENGTH = 24
PROMPTS = [list(range(20)), list(range(50, 53))]
PARAMS = SamplingParams(n=2, max_tokens=LENGTH, seed=5, ignore_eos=True, presence_penalty=0.5)
Gated = tuple[RolloutEngine, GatedWorker]


@pytest.fixture
def gated(tiny_model: Path) -> Iterator[Gated]:
    engine, worker = gated_engine(tiny_model, max_num_batched_tokens=16)
    with engine:
        yield engine, worker
        worker.open()


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutEngine]:
    """An engine that was started with the new weights."""
    folder = write_tiny_model(tmp_path_factory.mktemp("new"), seed=1)
    with RolloutEngine(tiny_options(folder)) as engine:
        yield engine


def generate_across(gated: Gated, num_steps: int = 9, **options: Any) -> list[Rollout]:
    """Rollouts of PROMPTS under which the weights change after some steps."""
    engine, worker = gated
    call = in_thread(lambda: engine.generate(PROMPTS, PARAMS))
    update = update_after(engine, worker, num_steps, tiny_tensors(1), **options)
    worker.open()
    assert update() == 1
    rollouts: list[Rollout] = call()
    return rollouts


@pytest.mark.parametrize("mode", [{"mode": "keep"}, {"mode": "keep", "kv": "recompute"}, {"mode": "retract"}])
def test_kept_requests_go_on_as_the_new_weights_alone_would(
    gated: Gated, fresh: RolloutEngine, mode: dict[str, Any]
) -> None:
    for rollout in generate_across(gated, **mode):
        (start, switch, old), (again, end, new) = rollout.version_spans
        assert (start, switch, end, old, new) == (0, again, LENGTH, 0, 1) and switch > 0
        assert rollout.num_preemptions == 1 and rollout.num_kept_updates == 0
        scores = fresh.score(rollout, definition="logprobs")[0]
        np.testing.assert_array_equal(rollout.logprobs[switch:], scores[switch:])
        assert not np.array_equal(rollout.logprobs[:switch], scores[:switch]), "the weights differ"


def test_tokens_after_the_switch_are_those_that_a_fresh_engine_draws(gated: Gated, fresh: RolloutEngine) -> None:
    engine, worker = gated
    params = SamplingParams(max_tokens=LENGTH, seed=5, ignore_eos=True)
    call = in_thread(lambda: engine.generate(PROMPTS, params))
    update = update_after(engine, worker, 9, tiny_tensors(1), mode="keep")
    worker.open()
    update()
    for rollout in call():
        (_, switch, _), _ = rollout.version_spans
        prefix = [*rollout.prompt_token_ids.tolist(), *rollout.token_ids[:switch].tolist()]
        rest = SamplingParams(max_tokens=LENGTH - switch, seed=5, ignore_eos=True)
        (expected,) = fresh.generate([prefix], rest)
        np.testing.assert_array_equal(rollout.token_ids[switch:], expected.token_ids)
        np.testing.assert_array_equal(rollout.logprobs[switch:], expected.logprobs)
        np.testing.assert_array_equal(rollout.entropy[switch:], expected.entropy)


@pytest.mark.parametrize("mode", [{"mode": "keep", "kv": "keep"}, {"mode": "in_place"}])
def test_kept_keys_and_values_are_declared_and_show(gated: Gated, fresh: RolloutEngine, mode: dict[str, Any]) -> None:
    for rollout in generate_across(gated, **mode):
        assert rollout.num_kept_updates == 1 and rollout.num_preemptions == 0
        switch = rollout.version_spans[1][0]
        scores = fresh.score(rollout, definition="logprobs")[0]
        assert not np.array_equal(rollout.logprobs[switch:], scores[switch:]), "the comparison above sees old keys"


def reference_after_a_kept_update(gated: Gated) -> tuple[list[Rollout], list[Any]]:
    """Rollouts whose blocks are of two versions, and their scores under the old one, pinned."""
    engine, _ = gated
    engine.pin_weights("reference")
    rollouts = generate_across(gated, mode="keep", kv="keep")
    return rollouts, score_ends(engine, rollouts, "reference")


def score_ends(engine: RolloutEngine, rollouts: list[Rollout], policy: str = "policy") -> list[Any]:
    """Logprobs of the last tokens: keys and values of all those before them may come from the prefix cache."""
    sequences = [[*rollout.prompt_token_ids.tolist(), *rollout.token_ids.tolist()] for rollout in rollouts]
    return engine.score(sequences, policy=policy, prompt_lens=[len(sequence) - 1 for sequence in sequences])


def check_old_scores(folder: Path, rollouts: list[Rollout], scores: list[Any]) -> None:
    with RolloutEngine(tiny_options(folder)) as old:
        for score, expected in zip(scores, score_ends(old, rollouts), strict=True):
            np.testing.assert_array_equal(score, expected)


def test_blocks_of_two_versions_are_never_shared(gated: Gated, tiny_model: Path, fresh: RolloutEngine) -> None:
    rollouts, scores = reference_after_a_kept_update(gated)
    check_old_scores(tiny_model, rollouts, scores)
    for score, expected in zip(score_ends(gated[0], rollouts), score_ends(fresh, rollouts), strict=True):
        np.testing.assert_array_equal(score, expected)


def test_blocks_of_two_versions_would_be_seen(gated: Gated, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCacheManager, "keep_older", lambda *_: None)
    rollouts, scores = reference_after_a_kept_update(gated)
    with pytest.raises(AssertionError):
        check_old_scores(tiny_model, rollouts, scores)


def score_twice(engine: RolloutEngine) -> Any:
    sequence = [list(range(40))]
    engine.score(sequence, prompt_lens=[36])
    engine.update_weights(tiny_tensors(1))
    return engine.score(sequence, prompt_lens=[36])[0], engine.metrics()["cached_tokens"]


def test_no_block_is_read_under_other_weights(tiny_model: Path, fresh: RolloutEngine) -> None:
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        scores, num_cached = score_twice(engine)
    np.testing.assert_array_equal(scores, fresh.score([list(range(40))], prompt_lens=[36])[0])
    assert num_cached == 0


def test_a_block_read_under_other_weights_would_be_seen(
    tiny_model: Path, fresh: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    root_key = manager.root_key
    monkeypatch.setattr(manager, "root_key", lambda _, salt: root_key(1, salt))
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        scores, num_cached = score_twice(engine)
    assert num_cached > 0
    assert not np.array_equal(scores, fresh.score([list(range(40))], prompt_lens=[36])[0])


def test_a_rewind_reads_no_block_of_the_version_it_repeats(engine: RolloutEngine) -> None:
    before = engine.generate(PROMPTS[:1], PARAMS)[0]
    engine.update_weights(tiny_tensors(1))
    engine.update_weights(tiny_tensors(0), version=0, allow_rewind=True)
    after = engine.generate(PROMPTS[:1], PARAMS)[0]
    assert after.num_cached_tokens == 0
    np.testing.assert_array_equal(after.logprobs, before.logprobs)


def test_aborted_requests_return_what_they_have(gated: Gated) -> None:
    for rollout in generate_across(gated, mode="abort"):
        assert rollout.finish_reason == "abort"
        assert 0 < len(rollout.token_ids) == len(rollout.logprobs) < LENGTH
        assert rollout.version_spans == [(0, len(rollout.token_ids), 0)]
    assert gated[0].get_weight_version() == 1


@pytest.mark.parametrize("options", [{"mode": "keep"}, {"mode": "in_place"}, {"mode": "abort"}])
def test_a_score_is_of_one_version(gated: Gated, fresh: RolloutEngine, options: dict[str, Any]) -> None:
    engine, worker = gated
    sequence = [list(range(60))]
    call = in_thread(lambda: engine.score(sequence))
    update = update_after(engine, worker, 2, tiny_tensors(1), **options)  # 32 of 59 rows are there
    worker.open()
    update()
    np.testing.assert_array_equal(call()[0], fresh.score(sequence)[0])


def test_stale_requests_begin_anew(gated: Gated, fresh: RolloutEngine) -> None:
    expected = fresh.generate(PROMPTS, PARAMS)
    for rollout, alone in zip(generate_across(gated, mode="keep", max_staleness=0), expected, strict=True):
        assert rollout.num_restarts == 1
        assert rollout.version_spans == [(0, LENGTH, 1)]
        np.testing.assert_array_equal(rollout.token_ids, alone.token_ids)
        np.testing.assert_array_equal(rollout.logprobs, alone.logprobs)


def test_requests_within_the_bound_go_on(gated: Gated) -> None:
    for rollout in generate_across(gated, mode="keep", max_staleness=1):
        assert rollout.num_restarts == 0 and len(rollout.version_spans) == 2


def test_a_restarted_request_looks_for_stop_strings_from_the_beginning(gated: Gated, fresh: RolloutEngine) -> None:
    engine, worker = gated
    params = SamplingParams(max_tokens=60, seed=3, ignore_eos=True, stop=("e", "5"), min_tokens=6)
    (expected,) = fresh.generate(["q"], params)
    call = in_thread(lambda: engine.generate(["q"], params))
    update = update_after(engine, worker, 7, tiny_tensors(1), mode="keep", kv="keep", max_staleness=0)
    worker.open()
    update()
    (rollout,) = call()
    np.testing.assert_array_equal(rollout.token_ids, expected.token_ids)
    assert (rollout.text, rollout.stop_reason) == (expected.text, expected.stop_reason)


def test_stale_calls_can_be_refused(gated: Gated) -> None:
    with pytest.raises(StaleRequestError, match=r"0/0: holds tokens of version 0, 1 behind .* max_staleness is 0"):
        generate_across(gated, mode="keep", max_staleness=0, on_stale="refuse")
    engine = gated[0]
    assert engine.get_weight_version() == 1
    assert len(engine.generate(PROMPTS, PARAMS)) == 4
    assert engine.metrics()["free_blocks"] == engine.metrics()["total_blocks"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "drain"}, "mode must be one of"),
        ({"mode": "keep", "kv": "drop"}, "kv must be one of"),
        ({"mode": "wait", "kv": "keep"}, "kv must be left out"),
        ({"mode": "in_place", "kv": "recompute"}, "kv must be left out"),
        ({"mode": "keep", "max_staleness": -1}, "max_staleness must be an integer >= 0"),
        ({"mode": "abort", "max_staleness": 1}, "max_staleness must be None unless"),
        ({"mode": "keep", "on_stale": "drop"}, "on_stale must be one of"),
    ],
)
def test_bad_options_change_nothing(engine: RolloutEngine, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        engine.update_weights(tiny_tensors(1), **options)
    assert engine.get_weight_version() == 0
