"""Trainers killed at every step, damaged and false publications: the old version serves on, the next update succeeds.

Each injection ends with the same four checks: the rollouts of the old version bit for bit, an error of the right type
that names the cause, no segment left, and a good update after it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from leftovers import segments_of, wait_for_end

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.layout import expected_tensors
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_config
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.weight_sync import (
    ChecksumError,
    ManifestError,
    PublishedWeights,
    SegmentMissingError,
    SegmentTruncatedError,
    UpdateSession,
    WeightPublisher,
    reap_dead_segments,
)
from zerokl.weight_sync.segments import SHM_FOLDER

CONTENT = tiny_config("LlamaForCausalLM")
MODEL = ModelConfig.from_json(CONTENT)
SHAPES = expected_tensors(MODEL)
PARAMS = SamplingParams(max_tokens=4, seed=3, ignore_eos=True)


class Host:
    """The process that forks trainers."""

    def __init__(self) -> None:
        script = str(Path(__file__).with_name("trainer_host.py"))
        self.process = subprocess.Popen(
            [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def order(self, order: dict[str, Any] | None) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def train(self, seed: int, version: int, die: str | None = None, **changes: Any) -> Any:
        return self.order({"seed": seed, "version": version, "shapes": SHAPES, "die": die, "limit": 0} | changes)

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.close()
    assert made.process.returncode == 0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutEngine]:
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(folder, CONTENT, random_tensors(MODEL, 0))
    config = EngineConfig(model=str(folder), num_blocks=16, max_model_len=64, num_threads=1)
    with RolloutEngine(config) as made:
        yield made


def bits(engine: RolloutEngine) -> bytes:
    engine.reset_prefix_cache()
    (rollout,) = engine.generate([[1, 2, 3, 4, 5]], PARAMS)
    return np.asarray(rollout.token_ids).tobytes() + np.asarray(rollout.logprobs).tobytes()


def published_of(answer: Any) -> PublishedWeights:
    assert answer["published"], answer
    return PublishedWeights.from_bytes(bytes.fromhex(answer["published"]))


# -- injections: each returns once the engine has refused, or has nothing to refuse ------------------------------------
Injection = Callable[[RolloutEngine, Host, np.random.Generator], None]


def killed(engine: RolloutEngine, host: Host, random: np.random.Generator) -> None:
    """SIGKILL before the publication was announced: there is nothing that could be taken for one."""
    steps = ["reserve", f"copy:{random.integers(1, len(SHAPES) + 1)}", f"hash:{random.integers(1, len(SHAPES) + 1)}"]
    die = str(random.choice([*steps, "publish"]))
    answer = host.train(int(random.integers(1 << 30)), engine.get_weight_version() + 1, die)
    assert answer["status"] == signal.SIGKILL and answer["published"] is None
    assert len(segments_of(answer["pid"])) <= 1  # any process of this user that starts to publish may remove it
    reap_dead_segments()
    assert segments_of(answer["pid"]) == []


def killed_after_it_said_so(engine: RolloutEngine, host: Host, random: np.random.Generator) -> None:
    """The segment is whole, so it may be used; whoever opens it removes it."""
    answer = host.train(int(random.integers(1 << 30)), engine.get_weight_version() + 1, "sent")
    assert answer["status"] == signal.SIGKILL
    try:
        engine.update_weights(published_of(answer))
    except SegmentMissingError:  # another process removed it first
        assert segments_of(answer["pid"]) == []
    assert segments_of(answer["pid"]) == []


def swept_before_it_was_read(engine: RolloutEngine, host: Host, random: np.random.Generator) -> None:
    answer = host.train(1, engine.get_weight_version() + 1, "sent")
    reap_dead_segments()
    with pytest.raises(SegmentMissingError, match="its publisher closed or died"):
        engine.update_weights(published_of(answer))


def truncated(engine: RolloutEngine, host: Host, random: np.random.Generator) -> None:
    published = published_of(host.train(2, engine.get_weight_version() + 1))
    size = int(random.integers(published.manifest.total_bytes))
    os.truncate(SHM_FOLDER / published.segment[1:], size)
    with pytest.raises(SegmentTruncatedError, match=f"has {size} bytes"):
        engine.update_weights(published)


def flipped(engine: RolloutEngine, host: Host, random: np.random.Generator) -> None:
    published = published_of(host.train(3, engine.get_weight_version() + 1))
    spec = published.manifest.tensors[int(random.integers(len(published.manifest.tensors)))]
    with (SHM_FOLDER / published.segment[1:]).open("r+b") as stream:
        place = spec.offset + int(random.integers(spec.nbytes))
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1 << int(random.integers(8))]))
    with pytest.raises(ChecksumError, match=spec.name):
        engine.update_weights(published)


def false_names_or_shapes(engine: RolloutEngine, host: Host, random: np.random.Generator) -> None:
    name = str(random.choice(list(SHAPES)))
    shapes: dict[str, Any] = dict(SHAPES)
    kind = int(random.integers(3))
    if kind == 0:
        del shapes[name]
    elif kind == 1:
        shapes[name + ".ü\n"] = (2, 0)
    else:
        shapes[name] = (*shapes[name], 1)
    published = published_of(host.train(4, engine.get_weight_version() + 1, shapes=shapes))
    with pytest.raises(ManifestError, match=("missing: ", "extra: ", "misshapen: ")[kind] + f".*{name}"):
        engine.update_weights(published)


def memory_is_full(engine: RolloutEngine, host: Host, random: np.random.Generator) -> None:
    answer = host.train(5, engine.get_weight_version() + 1, limit=int(random.integers(1, 50_000)))
    kind, text = answer["error"]
    assert kind == "SharedMemoryFullError" and "cannot reserve" in text
    assert segments_of(answer["pid"]) == []


def two_trainers(engine: RolloutEngine, host: Host, random: np.random.Generator) -> None:
    """Both publish the next version: the second is a repetition, by whatever it was announced."""
    version = engine.get_weight_version() + 1
    with WeightPublisher("rival") as rival:
        mine = rival.publish(random_tensors(MODEL, 77), version)
        theirs = published_of(host.train(6, version))
        engine.update_weights(theirs)
        before = bits(engine)
        with pytest.raises(ValueError, match="a repetition"):
            engine.update_weights(mine)
        assert bits(engine) == before


def false_checksum_of_another_version(engine: RolloutEngine, host: Host, random: np.random.Generator) -> None:
    version = engine.get_weight_version() + 1
    with WeightPublisher("slow", buffers=1) as publisher:
        first = publisher.publish(random_tensors(MODEL, 8), version)
        publisher.publish(random_tensors(MODEL, 9), version + 1)
        with pytest.raises(ChecksumError, match="overwritten by a later publication"):
            engine.update_weights(first)


def killed_while_it_is_read(engine: RolloutEngine, host: Host, random: np.random.Generator) -> None:
    """What is mapped stays whole without its owner, and goes with its last reader."""
    answer = host.train(7, engine.get_weight_version() + 1)
    published = published_of(answer)
    session = UpdateSession(SHAPES)
    with published.open() as lease:
        session.begin(published.version, lease.manifest)
        for count, bucket in enumerate(lease.buckets()):
            if count == len(SHAPES) // 2:
                os.kill(answer["pid"], signal.SIGKILL)
                assert wait_for_end(answer["pid"])
            session.stage(bucket)
            del bucket
        session.verify()
        session.release()
    assert segments_of(answer["pid"]) == []
    with pytest.raises(SegmentMissingError, match="its publisher closed or died"):
        engine.update_weights(published)


INJECTIONS: list[Injection] = [
    killed,
    killed,
    killed,
    killed_after_it_said_so,
    swept_before_it_was_read,
    truncated,
    flipped,
    false_names_or_shapes,
    memory_is_full,
    two_trainers,
    false_checksum_of_another_version,
    killed_while_it_is_read,
]


def inject(engine: RolloutEngine, host: Host, seed: int) -> None:
    random = np.random.default_rng(seed)
    injection = INJECTIONS[seed % len(INJECTIONS)]
    version, before = engine.get_weight_version(), bits(engine)
    injection(engine, host, random)
    if engine.get_weight_version() == version:
        assert bits(engine) == before, injection.__name__
    host.order(None)
    assert list(SHM_FOLDER.glob("zerokl-crash-*")) == [], injection.__name__
    good = published_of(host.train(1000 + seed, engine.get_weight_version() + 1))
    assert engine.update_weights(good) == good.version
    after = bits(engine)
    assert after != before
    fresh = random_of(1000 + seed)
    engine.update_weights(fresh)
    assert bits(engine) == after
    host.order(None)


def random_of(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {name: (random.standard_normal(shape) * 0.1).astype(np.float32) for name, shape in SHAPES.items()}


def test_randomised_injections(engine: RolloutEngine, host: Host) -> None:
    for seed in range(48):
        inject(engine, host, seed)


@pytest.mark.long
def test_many_randomised_injections(engine: RolloutEngine, host: Host) -> None:
    for seed in range(100, 605):
        inject(engine, host, seed)


def test_a_worker_killed_while_it_stages_names_the_cause(tmp_path: Path) -> None:
    save_pretrained(tmp_path, CONTENT, random_tensors(MODEL, 0))
    config = EngineConfig(model=str(tmp_path), num_blocks=16, max_model_len=64, num_threads=1, worker="process")
    with WeightPublisher() as publisher:
        published = publisher.publish(random_tensors(MODEL, 1), 1)
        with RolloutEngine(config) as engine:
            before = bits(engine)
            os.kill(engine.describe_worker()["pid"], signal.SIGKILL)
            with pytest.raises(Exception, match="killed by SIGKILL"):
                engine.update_weights(published)
            assert engine.health()["weight_versions"] == {"policy": 0}
        with RolloutEngine(config) as engine:  # the publication is as it was
            assert bits(engine) == before
            assert engine.update_weights(published) == 1
            assert bits(engine) != before


def test_a_manifest_that_names_another_segment_is_refused(engine: RolloutEngine) -> None:
    with WeightPublisher() as publisher:
        published = publisher.publish(random_tensors(MODEL, 1), engine.get_weight_version() + 1)
        for name in ("/etc/passwd", "/zerokl", published.segment[:-1] + "g"):
            with pytest.raises(SegmentMissingError, match="is not a name"):
                engine.update_weights(replace(published, segment=name))
