"""Weights of a model that is spread over ranks: each reads, verifies and holds its own experts alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks_rig import communicators, each
from spread_rig import FAMILIES, alone, assert_same, moe_config, order, run, runners

from zerokl.kernels.row_stream import ArrayRows
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.expert_parallel.rank_place import RankPlace
from zerokl.rollout.held_sets import LIVE
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_moe_config
from zerokl.rollout.weight_source import SharedWeights
from zerokl.rollout.worker import LocalWorker
from zerokl.weight_sync import WeightPublisher
from zerokl.weight_sync.errors import ChecksumError, ParentMismatchError


class OnceReadable(dict[str, ArrayRows]):
    """Tensors as they arrive from a publication: streams that have an end."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: rows.shape for name, rows in self.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_that_a_rank_holds_twice_is_read_once(family: str) -> None:
    config, tensors = moe_config(family), random_tensors(moe_config(family), 1)
    assert config.moe is not None
    orders = [order(0, 12), order(1, 5)]
    expected = alone(config, tensors, orders)
    count = config.moe.num_experts
    twice = np.sort([*range(count), *range(4)])  # replicas side by side, on one rank
    placement = np.repeat(twice.reshape(1, 2, -1), len(config.moe.layers), axis=0).astype(np.int32)
    with runners(config, 2, 2, random_tensors(config, 2), 4) as made:
        each(2, lambda rank: made[rank].rearrange_experts(placement))

        def restage(rank: int) -> None:
            made[rank].stage(OnceReadable({name: ArrayRows(array, name) for name, array in tensors.items()}))
            made[rank].commit()

        each(2, restage)
        for got, want in zip(run(made, orders), expected, strict=True):
            assert_same(got.sampled, want.sampled)


def nbytes(tree: Any) -> int:
    """Of all arrays in a tree of dataclasses and tuples."""
    if isinstance(tree, tuple):
        return sum(map(nbytes, tree))
    if is_dataclass(tree):
        return sum(nbytes(getattr(tree, field.name)) for field in fields(tree))
    return tree.nbytes if isinstance(tree, np.ndarray) else 0


class ReadNames(dict[str, Any]):
    """Tensors that note which of them are looked at, their shapes aside."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_reads_and_holds_its_own_experts_alone(family: str) -> None:
    config = moe_config(family)
    tensors, moe = random_tensors(config, 1), config.moe
    assert moe is not None
    with runners(config, 1, 1, tensors) as (runner,):
        params = runner.weight_sets[LIVE].params
        whole = nbytes(params)
        experts = sum(nbytes(params.layers[layer].moe.experts) for layer in moe.layers)
    maps = len(moe.layers) * moe.num_experts * 8
    with runners(config, 4, 4, None) as made:
        for rank, runner in enumerate(made):
            source = ReadNames(tensors)
            runner.stage(source)
            runner.commit()
            assert source.read == set(runner.held_tensors())
            own = {n for n in tensors if ".experts." not in n or int(n.split(".")[5]) // 2 == rank}
            assert source.read == own
            assert nbytes(runner.weight_sets[LIVE].params) == whole - experts * 3 // 4 + maps
            live = runner.live_tensors()
            assert set(live) == own
            for name in own:
                np.testing.assert_array_equal(live[name], tensors[name])
        missing = dict(tensors)
        del missing["model.layers.1.mlp.experts.7.up_proj.weight"]
        with pytest.raises(ValueError, match=r"missing: model.layers.1.mlp.experts.7.up_proj.weight"):
            made[0].stage(missing)  # not rank 0's, and yet it must be there


def test_a_delta_of_experts_on_every_rank() -> None:
    config = moe_config()
    old, new = random_tensors(config, 1), random_tensors(config, 2)
    delta = {name: new[name] for name in old if ".experts.1." in name or "q_proj" in name}
    orders = [order(0, 12), order(1, 7)]
    with runners(config, 2, 2, old) as made:
        for runner in made:
            runner.stage(delta, 1, delta=True)
            runner.commit()
        for got, want in zip(run(made, orders), alone(config, {**old, **delta}, orders), strict=True):
            assert_same(got.sampled, want.sampled)


def test_published_weights_are_verified_by_the_ranks_that_read_them(tmp_path: Path) -> None:
    """A complete set: each rank its own part. A delta: all that changed, and the checksum of the whole result."""
    content = tiny_moe_config(FAMILIES[0])
    config = ModelConfig.from_json(content)
    tensors, new = random_tensors(config, 1), random_tensors(config, 2)
    save_pretrained(tmp_path, content, tensors)
    options = EngineConfig(model=str(tmp_path), num_blocks=8, max_model_len=64, num_threads=1)
    theirs = "model.layers.1.mlp.experts.7.up_proj.weight"
    with communicators(2) as ends, WeightPublisher() as publisher:
        workers = [LocalWorker(options, RankPlace(rank, 2, 2, ends[rank])) for rank in range(2)]
        whole = publisher.publish(tensors, 1)
        wrong = [replace(spec, checksum=spec.checksum ^ (spec.name == theirs)) for spec in whole.manifest.tensors]
        damaged = replace(whole, manifest=replace(whole.manifest, tensors=tuple(wrong)))
        workers[0].stage_weights(SharedWeights(published=damaged), 1)
        with pytest.raises(ChecksumError, match=theirs):
            workers[1].stage_weights(SharedWeights(published=damaged), 1)
        for worker in workers:
            worker.stage_weights(SharedWeights(published=whole), 1)
            worker.commit_weights()
        delta = {name: new[name] for name in (theirs, "model.norm.weight")}
        changed = publisher.publish_delta(delta, 2)
        for worker in workers:
            worker.stage_weights(SharedWeights(published=changed), 2)
            worker.commit_weights()
        orders = [order(0, 12), order(1, 9)]
        got = each(2, lambda rank: workers[rank].execute(orders[rank]))
        for one, want in zip(got, alone(config, {**tensors, **delta}, orders), strict=True):
            assert_same(one.sampled, want.sampled)
        part = {theirs: np.array(delta[theirs])}
        part[theirs].reshape(-1)[:3] = 1.0
        spanned = publisher.publish_delta(part, 3, spans={theirs: (0, 3)})
        false = [replace(spec, whole=spec.whole ^ 1) for spec in spanned.manifest.tensors]
        broken = replace(spanned, manifest=replace(spanned.manifest, tensors=tuple(false)))
        with pytest.raises(ParentMismatchError, match="gives a set of checksum"):
            workers[0].stage_weights(SharedWeights(published=broken), 3)
        for worker in workers:
            worker.stage_weights(SharedWeights(published=spanned), 3)
            worker.commit_weights()
        got = each(2, lambda rank: workers[rank].execute(orders[rank]))
        for one, want in zip(got, alone(config, {**tensors, **delta, **part}, orders), strict=True):
            assert_same(one.sampled, want.sampled)
