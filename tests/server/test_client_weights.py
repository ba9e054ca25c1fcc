"""Weights over a socket, in every form; and a trainer that changes one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeGpu
from tiny_engine import in_thread, tiny_options, tiny_tensors, wait_until, write_tiny_model

from zerokl.rollout.client import RolloutClient
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import HookError
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.server.uploads import Uploads
from zerokl.weight_sync.device_publisher import DevicePublisher
from zerokl.weight_sync.disk import publish_file
from zerokl.weight_sync.publisher import WeightPublisher

LONG = SamplingParams(max_tokens=30, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> list[Any]:
    """What the weights of seed 1 sample."""
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        engine.update_weights(tiny_tensors(1))
        return engine.generate(["a", "bc"], LONG)


@pytest.fixture(params=["arrays", "items", "shared", "file", "folder"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    tensors = tiny_tensors(1)
    if request.param == "arrays":
        yield tensors
    elif request.param == "items":
        yield iter(tensors.items())
    elif request.param == "file":
        yield publish_file(tmp_path / "weights.safetensors", tensors.items(), 1)
    elif request.param == "folder":
        yield write_tiny_model(tmp_path, seed=1)
    else:
        with WeightPublisher() as publisher:
            yield publisher.publish(tensors.items(), 1)


def test_weights_arrive_in_every_form(client: RolloutClient, source: Any, expected: list[Any]) -> None:
    before = client.generate(["a", "bc"], LONG)
    assert client.update_weights(source) == 1 == client.get_weight_version()
    for one, other, old in zip(client.generate(["a", "bc"], LONG), expected, before, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
        assert one.logprobs.tolist() != old.logprobs.tolist()


def test_hooks_and_hot_swap(client: RolloutClient) -> None:
    heard: list[Any] = []
    remove = [
        client.add_update_hook(name, lambda event, name=name: heard.append((name, event.live_version, event.version)))
        for name in ("before_update", "after_commit", "on_failure")
    ]
    with client.hot_swap(lambda: tiny_tensors(1), mode="keep") as swap:
        pass
    assert swap.version == 1
    with pytest.raises(ValueError, match="version must be 2"):
        client.update_weights(tiny_tensors(1), 9)
    assert [(name, live) for name, live, _ in heard] == [
        ("before_update", 0),
        ("after_commit", 1),
        ("before_update", 1),
        ("on_failure", 1),
    ]
    for undo in remove:
        undo()
    client.add_update_hook("before_update", lambda event: 1 / 0)
    with pytest.raises(HookError):
        client.update_weights(tiny_tensors(2))
    assert client.get_weight_version() == 1


def test_an_update_that_waits_can_be_given_up_by_its_deadline(gated: Any) -> None:
    _, worker, _, client = gated
    call = in_thread(lambda: client.generate("a", LONG))
    worker.began.acquire()
    with pytest.raises(TimeoutError, match="update_weights"):
        client.within(0.2).update_weights(tiny_tensors(1))
    worker.open()
    assert call()[0].policy_versions.tolist() == [0] * 30
    wait_until(lambda: client.metrics()["server_calls"] == 1)
    assert client.get_weight_version() == 0
    assert client.update_weights(tiny_tensors(1), mode="abort") == 1


def test_uploads_are_bounded_and_checked() -> None:
    uploads = Uploads(10_000)
    data = np.zeros(16, np.uint8)
    wrong = [
        ([], "must not be empty"),
        ([5], "a piece is"),
        ([["a", "float32", [4], 0, True]], "a piece is"),
        ([["a", "object", [4], 0, 16]], "dtype"),
        ([["a", "float32", [-4], 0, 16]], "no part"),
        ([["a", "float32", [2**63], 0, 16]], "no part"),
        ([["a", "float32", [4], 4, 12]], "next byte of 'a' is 0"),
        ([["a", "float32", [4], 0, 17]], "next byte"),
        ([["a", "float32", [4], 0, 12]], "take 12 of the 16"),
        ([["b", "float32", [9999], 0, 16]], "max_upload_bytes"),
        ([["b", "float32", [4], 0, 16], ["b", "float64", [2], 0, 0]], "another tensor"),
    ]
    for number, (pieces, message) in enumerate(wrong):
        with pytest.raises(ValueError, match=message):
            uploads.add(b"me", number, pieces, data)
    with pytest.raises(ValueError, match="number of one that was sent"):
        uploads.take(b"me", 0)
    uploads.add(b"me", 77, [["c", "float32", [8], 0, 16]], data)
    with pytest.raises(ValueError, match="incomplete: 16 of 32"):
        uploads.take(b"me", 77)
    uploads.add(b"me", 77, [["c", "float32", [8], 16, 16]], data)
    assert uploads.take(b"me", 77)["c"].shape == (8,)
    for number in range(99):
        uploads.drop_client(b"me")
        uploads.add(b"me", number, [["e", "float32", [0], 0, 0]], data[:0])
    uploads.drop_client(b"me")
    assert uploads.nbytes == 0


def test_a_trainer_changes_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Any) -> None:
    """The tiny GRPO example against a server: the same reports, to the bit, and a mismatch KL of 0."""
    pytest.importorskip("paddle")
    examples = Path(__file__).resolve().parents[2] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    import demo_tiny

    from zerokl.integrations.policy_model import PolicyModel
    from zerokl.rollout.config import EngineConfig

    demo_tiny.make_model(tmp_path, 0)
    config = EngineConfig(model=str(tmp_path), kv_cache_bytes=1 << 20, num_threads=1)

    def run(engine: Any) -> list[Any]:
        with WeightPublisher() as publisher:
            trainer = demo_tiny.make_trainer("grpo", PolicyModel.from_pretrained(tmp_path), engine, publisher, 4)
            return [trainer.step([[1, 2, 3], [4, 5, 6]]) for _ in range(3)]

    with RolloutEngine(config) as engine:
        local = run(engine)
    remote = run(serve(RolloutEngine(config))[1])
    for one, other in zip(local, remote, strict=True):
        assert other.mismatch.k3_mean == 0.0 if hasattr(other.mismatch, "k3_mean") else other.mismatch.k3_kl_mean == 0.0
        assert (one.loss, one.reward_mean, one.entropy) == (other.loss, other.reward_mean, other.entropy)


def test_weights_in_a_gpus_memory_reach_the_server_which_says_that_it_has_none(
    tiny_model: Path, serve: Any, tmp_path: Path
) -> None:
    gpu = FakeGpu(tmp_path)
    with DevicePublisher(gpu) as publisher:
        published = publisher.publish({"a": gpu.put(np.zeros((2, 2), np.uint16), "bfloat16")}, 1)
        _, client = serve(RolloutEngine(tiny_options(tiny_model)))
        with pytest.raises(ValueError, match="the engine's device must be 'gpu', got 'cpu'"):
            client.update_weights(published)
