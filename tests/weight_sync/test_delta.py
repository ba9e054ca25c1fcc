"""Deltas and rounded publications from a publisher to a session."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from zerokl.weight_sync import ManifestError, PublishedWeights, WeightPublisher
from zerokl.weight_sync.live_weights import LiveWeights
from zerokl.weight_sync.receiver import lease_published
from zerokl.weight_sync.session import UpdateSession
from zerokl.weight_sync.views import narrow, widen

Tensors = dict[str, Any]


def some(seed: int) -> Tensors:
    random = np.random.default_rng(seed)
    return {f"layer.{i}": random.standard_normal((40, 3 + i)).astype(np.float32) for i in range(6)}


def received(published: PublishedWeights, live: LiveWeights | None = None) -> tuple[Tensors, dict[str, int]]:
    session = UpdateSession({name: array.shape for name, array in some(0).items()}, live)
    with lease_published(published) as lease:
        session.begin(published.version, lease.manifest)
        for bucket in lease.buckets():
            session.stage(bucket)
            del bucket
        tensors = session.verify()
        whole = {} if live is None else dict(live.tensors)
        whole.update({name: np.array(tensors[name]) for name in tensors})
        del tensors
        session.release()
    return whole, session.checksums


def as_received(weights: Tensors, dtype: str | None) -> Tensors:
    if dtype is None:
        return weights
    made = {}
    for name, array in weights.items():
        patterns = np.empty(array.size, np.uint16)
        narrow(array.reshape(-1), patterns)
        made[name] = widen(patterns, dtype).reshape(array.shape)
    return made


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_chain_of_deltas_gives_what_a_full_publication_gives(dtype: Any) -> None:
    random = np.random.default_rng(3)
    weights = some(0)
    with WeightPublisher() as publisher:
        whole, checksums = received(publisher.publish(weights, 0, dtype=dtype))
        for version in range(1, 21):
            name = f"layer.{random.integers(6)}"
            weights[name] = weights[name].copy()
            spans: dict[str, Any] = {}
            if version % 3:
                ends = np.sort(random.choice(weights[name].size, 2 * int(random.integers(1, 4)), replace=False))
                ranges = [(int(start), int(stop)) for start, stop in ends.reshape(-1, 2)]
                for start, stop in ranges:
                    weights[name].reshape(-1)[start:stop] += np.float32(0.5)
                spans = {name: ranges[0] if len(ranges) == 1 else ranges}
            else:
                weights[name] *= np.float32(1.1)
            published = publisher.publish_delta({name: weights[name]}, version, spans=spans)
            assert published.manifest.inexact == (dtype is not None)
            known = dict(checksums) if version % 2 else {}  # where they are not, they are computed
            live = LiveWeights(version=version - 1, tensors=whole, checksums=known, dtype=dtype or "float32")
            whole, checksums = received(published, live)
            for key, array in as_received(weights, dtype).items():
                np.testing.assert_array_equal(whole[key], array)
        assert received(publisher.publish(weights, 21, dtype=dtype))[1] == checksums


def test_a_rounded_delta_to_weights_that_were_not_rounded_is_refused() -> None:
    weights = some(0)
    with WeightPublisher() as publisher:
        publisher.publish(weights, 0, dtype="bfloat16")
        published = publisher.publish_delta({"layer.1": weights["layer.1"]}, 1)
        with pytest.raises(ValueError, match=r"'layer.0' is not rounded to bfloat16 here"):
            received(published, LiveWeights(version=0, tensors=weights))
        rounded = as_received(weights, "bfloat16")
        whole, _ = received(published, LiveWeights(version=0, tensors=rounded))
        np.testing.assert_array_equal(whole["layer.1"], rounded["layer.1"])


def test_a_span_that_leaves_out_a_change_is_found() -> None:
    weights = some(0)
    with WeightPublisher() as publisher:
        whole, checksums = received(publisher.publish(weights, 0))
        changed = weights["layer.2"].copy()
        changed[0, 0] += 1
        changed[1, 1] += 1
        published = publisher.publish_delta({"layer.2": changed}, 1, spans={"layer.2": (0, 1)})
        with pytest.raises(ValueError, match="its publisher has"):
            received(published, LiveWeights(version=0, tensors=whole, checksums=checksums))


def test_what_cannot_be_a_delta_is_refused() -> None:
    with WeightPublisher() as publisher:
        with pytest.raises(ManifestError, match="complete float32 or rounded publication"):
            publisher.publish_delta({"layer.0": some(0)["layer.0"]}, 1)
        publisher.publish(some(0), 0)
        for changed, spans, text in [
            ({"other": np.zeros(3, np.float32)}, {}, "'other'"),
            ({"layer.0": np.zeros((40, 3))}, {}, "got float64"),
            ({}, {"layer.1": (0, 1)}, "'layer.1' is not among the changed"),
            ({"layer.0": some(0)["layer.0"]}, {"layer.0": (3, 3)}, "is not a range of its 120 elements"),
            ({"layer.0": some(0)["layer.0"]}, {"layer.0": [(3, 5), (4, 6)]}, "begins before the end of the one before"),
            ({"layer.0": some(0)["layer.0"]}, {"layer.0": []}, "are not a tuple of ranges"),
        ]:
            with pytest.raises(ManifestError, match=text):
                publisher.publish_delta(changed, 1, spans=spans)


def test_rounding_to_bfloat16_is_to_nearest_even_and_says_so() -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 2**32, 300_000, np.uint64).astype(np.uint32).view(np.float32)
    out = np.empty(values.size, np.uint16)
    assert narrow(values, out)
    with np.errstate(over="ignore", invalid="ignore"):
        wide = widen(out, "bfloat16")
        finite = np.isfinite(values) & np.isfinite(wide)
        below = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        above = ((values.view(np.uint32) & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32)
        distance = np.abs(values.astype(np.float64) - wide)[finite]
        assert (distance <= np.abs(values.astype(np.float64) - below)[finite]).all()
        assert (distance <= np.abs(values.astype(np.float64) - above)[finite]).all()
    assert (np.isnan(wide) == np.isnan(values)).all()
    assert not narrow(wide[np.isfinite(wide)], np.empty(np.isfinite(wide).sum(), np.uint16))
    halves = np.array([0x3F808000, 0x3F818000], np.uint32).view(np.float32)  # ties
    narrow(halves, out[:2])
    assert out[:2].tolist() == [0x3F80, 0x3F82]


def test_a_rounded_publication_is_marked_and_arrives_widened() -> None:
    weights = some(1)
    with WeightPublisher() as publisher:
        published = publisher.publish(weights, 3, dtype="bfloat16")
        vouched = publisher.publish(weights, 4, dtype="bfloat16", inexact=False)
        assert published.manifest.inexact and not vouched.manifest.inexact
        whole, checksums = received(published)
        assert checksums == {spec.name: spec.checksum for spec in published.manifest.tensors}
        for name, array in weights.items():
            rounded = np.empty(array.size, np.uint16)
            narrow(array.reshape(-1), rounded)
            np.testing.assert_array_equal(whole[name].reshape(-1), widen(rounded, "bfloat16"))
        with pytest.raises(ManifestError, match="dtype='bfloat16' rounds float32"):
            publisher.publish({"x": np.zeros(3)}, 5, dtype="bfloat16")
