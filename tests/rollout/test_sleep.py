"""Sleep and wake: the memory is really gone, what comes back is the same to the bit, and nothing runs in between."""

from __future__ import annotations

import errno
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tiny_engine import gated_engine, in_thread, tiny_options, tiny_tensors, wait_until

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import EngineAsleepError
from zerokl.rollout.model_runner import ModelRunner
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_config
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.spill import SpilledSets

PARAMS = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)
PROMPT = [list(range(20))]


def test_level_1_brings_everything_back_as_it_was(engine: RolloutEngine, tmp_path: Path) -> None:
    engine.pin_weights("reference")
    engine.update_weights(tiny_tensors(1))
    before = engine.generate(PROMPT, PARAMS)[0]
    (reference,) = engine.score(before, policy="reference")
    engine.sleep(spill_dir=tmp_path)
    assert (engine.health()["state"], engine.health()["asleep"]) == ("asleep", {"weights": 1, "kv_cache": 1})
    assert list(tmp_path.iterdir()) == [], "the file has no name that could be left behind"
    assert engine.wake_up() == []
    assert engine.health()["state"] == "running"
    after = engine.generate(PROMPT, PARAMS)[0]
    assert after.num_cached_tokens == 0 and after.policy_versions.tolist() == [1] * 6
    np.testing.assert_array_equal(after.logprobs, before.logprobs)
    np.testing.assert_array_equal(engine.score(before, policy="reference")[0], reference)


def test_nothing_runs_while_a_part_is_away(engine: RolloutEngine) -> None:
    for tags in ("weights", "kv_cache"):
        engine.sleep(tags)  # type: ignore[arg-type]
        calls: list[Callable[[], Any]] = [lambda: engine.generate("a"), lambda: engine.score([[1, 2]])]
        if tags == "weights":
            calls += [lambda: engine.pin_weights(), lambda: engine.update_weights(tiny_tensors(1))]
        for call in calls:
            with pytest.raises(EngineAsleepError, match=f"asleep: {tags}; call wake_up"):
                call()
        assert engine.wake_up() == []
    assert engine.generate("a", PARAMS)[0].policy_versions.tolist() == [0] * 6


def test_parts_come_back_one_by_one_in_any_order(engine: RolloutEngine) -> None:
    before = engine.generate(PROMPT, PARAMS)[0]
    for order in (["weights", "kv_cache"], ["kv_cache", "weights"]):
        engine.sleep()
        engine.sleep()
        assert engine.wake_up(order[0]) == [order[1]]  # type: ignore[arg-type]
        with pytest.raises(EngineAsleepError, match=order[1]):
            engine.generate("a")
        assert engine.wake_up(order) == []  # type: ignore[arg-type]
        np.testing.assert_array_equal(engine.generate(PROMPT, PARAMS)[0].logprobs, before.logprobs)


def test_weights_are_updated_while_the_kv_cache_is_away(engine: RolloutEngine) -> None:
    engine.sleep(["kv_cache"])
    assert engine.update_weights(tiny_tensors(1)) == 1
    assert engine.wake_up() == []
    assert engine.generate(PROMPT, PARAMS)[0].policy_versions.tolist() == [1] * 6


@pytest.mark.parametrize("first_level", [1, 2])
def test_level_2_waits_for_new_weights(engine: RolloutEngine, first_level: int) -> None:
    engine.pin_weights("reference")
    engine.sleep(level=first_level)
    engine.sleep(["weights"], level=2)
    assert engine.wake_up() == ["weights"]
    with pytest.raises(EngineAsleepError, match="asleep: weights; call update_weights first"):
        engine.generate("a")
    assert engine.update_weights(tiny_tensors(1)) == 1
    assert engine.health()["asleep"] == {}
    assert engine.generate("a", PARAMS)[0].policy_versions.tolist() == [1] * 6
    with pytest.raises(ValueError, match="reference"):
        engine.get_weight_version("reference")


def test_sleep_waits_and_later_calls_are_refused(tiny_model: Path) -> None:
    engine, worker = gated_engine(tiny_model)
    with engine:
        early = in_thread(lambda: engine.generate("a", PARAMS))
        worker.began.acquire()
        sleeping = in_thread(engine.sleep)
        wait_until(lambda: engine.health()["num_held"] == 1)
        held = in_thread(lambda: engine.generate("a", PARAMS))
        wait_until(lambda: engine.health()["num_held"] == 2)
        worker.open()
        sleeping()
        assert len(early()[0].token_ids) == 6
        with pytest.raises(EngineAsleepError):
            held()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"tags": ["weight"]}, "tags must be one or more of"),
        ({"tags": []}, "tags must be one or more of"),
        ({"level": 3}, "level must be an integer in"),
        ({"spill_dir": "/nowhere/at/all"}, "spill_dir must be a folder with room"),
    ],
)
def test_bad_options_free_nothing(engine: RolloutEngine, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        engine.sleep(**arguments)
    assert engine.health()["state"] == "running"
    assert len(engine.generate("a", PARAMS)[0].token_ids) == 6


def test_a_full_disk_frees_nothing(engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullFile:
        def tell(self) -> int:
            return 0

        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None: ...

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: FullFile())
    with pytest.raises(ValueError, match=r"spill_dir must be a folder with room.*No space left"):
        engine.sleep()
    assert len(engine.generate("a", PARAMS)[0].token_ids) == 6


def test_arrays_in_several_places_are_one_again() -> None:
    resident = np.arange(3.0)
    shared, empty = np.arange(6, dtype=np.int16).reshape(2, 3), np.zeros((0, 4), np.float32)
    spilled = SpilledSets(
        {"a": (shared, empty, resident, 7), "b": (shared, empty.copy(), np.float32(2))}, None, resident
    )
    sets = spilled.restore(np.empty)
    spilled.close()
    assert sets["a"][0] is sets["b"][0] is not shared and sets["a"][2] is resident and sets["a"][3] == 7
    np.testing.assert_array_equal(sets["a"][0], shared)
    assert sets["a"][1].shape == sets["b"][1].shape == (0, 4)


MIB = 1 << 20


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


@pytest.mark.parametrize("level", [1, 2])
def test_the_memory_is_given_back(tmp_path: Path, level: int) -> None:
    # 49 MiB of table, packed once for embedding and head, 100 MiB of keys and values.
    shape = tiny_config(vocab_size=50_000, hidden_size=256, num_hidden_layers=1, tie_word_embeddings=True)
    config = ModelConfig.from_json(shape)
    save_pretrained(tmp_path, shape, random_tensors(config, 0))
    block_bytes = 8 * 2 * config.num_key_value_heads * config.head_dim * 4
    options = EngineConfig(model=str(tmp_path), block_size=8, num_blocks=100 * MIB // block_bytes, num_threads=1)
    runner = ModelRunner(options.resolve(max_position_embeddings=256, kv_bytes_per_token=block_bytes // 8), config)
    runner.stage(random_tensors(config, 0))
    runner.commit()
    assert runner._pool is not None
    runner._pool.keys.fill(1)
    runner._pool.values.fill(1)
    full = resident_bytes()
    runner.sleep(["weights"], level)
    without_weights = resident_bytes()
    runner.sleep(["kv_cache"], level)
    assert 42 * MIB < full - without_weights < 80 * MIB
    assert 90 * MIB < without_weights - resident_bytes() < 110 * MIB
    runner.wake_up(["weights", "kv_cache"])
    assert (runner.weight_sets == {}) == (level == 2)


def test_a_worker_process_sleeps_and_wakes(tiny_model: Path) -> None:
    with RolloutEngine(tiny_options(tiny_model, worker="process")) as engine:
        before = engine.generate(PROMPT, PARAMS)[0]
        engine.sleep()
        with pytest.raises(EngineAsleepError):
            engine.generate(PROMPT, PARAMS)
        with pytest.raises(ValueError, match="spill_dir must be"):
            engine.wake_up()
            engine.sleep(spill_dir="/nowhere/at/all")
        np.testing.assert_array_equal(engine.generate(PROMPT, PARAMS)[0].logprobs, before.logprobs)
        engine.sleep(level=2)
        engine.wake_up()
        engine.update_weights(tiny_tensors(0))
        np.testing.assert_array_equal(engine.generate(PROMPT, PARAMS)[0].logprobs, before.logprobs)
