"""Random arrivals, lengths, groups, aborts, preemptions, updates, pools and budgets against the output's definition.

The negative controls run the same comparison on a manager with one planted fault; each must be caught.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_rig import VOCAB, Rig, assert_as_expected, generate
from scheduling_workloads import DISTURBANCES, EXAMPLES, RIGS, WEIGHTS, disturb, workloads

from zerokl.rollout.admission import AdmissionLimits
from zerokl.rollout.kv_cache import KVCacheManager
from zerokl.rollout.kv_cache.prefix_cache import PrefixKeys
from zerokl.rollout.request import Request
from zerokl.rollout.running_set import RunningSet
from zerokl.rollout.sampling_params import SamplingParams


@EXAMPLES
@given(RIGS, workloads(), DISTURBANCES)
def test_every_request_finishes_once_with_its_own_output(rig, workload, disturbances):
    limits = AdmissionLimits(max_model_len=1000, num_blocks=rig.num_blocks, block_size=rig.block_size, vocab_size=VOCAB)
    added: list[Request] = []
    events = sorted(disturbances)
    for wait, requests in workload:
        for request in requests:
            limits.check(request)
            rig.add(request)
            added.append(request)
        for _ in range(wait):
            while events and events[0][0] <= len(rig.plans):
                disturb(rig, *events.pop(0)[1:])
            rig.step()
    for _, action, choice in events:
        rig.step()
        disturb(rig, action, choice)
    rig.run(max_steps=len(rig.plans) + bound(rig, added))
    assert set(rig.finished) == {request.request_id for request in added}
    assert_as_expected(rig.finished.values(), WEIGHTS)
    assert rig.kv_cache.num_free_blocks == rig.num_blocks


def bound(rig: Rig, requests: list[Request]) -> int:
    """Steps that suffice: the oldest running request of a weight set moves in every second step."""
    longest = [request.num_tokens + request.sampling_params.max_tokens for request in requests]
    return 2 * sum(-(-length // rig.max_num_batched_tokens) + length for length in longest) + 2


@settings(EXAMPLES, max_examples=25)
@given(RIGS, st.integers(0, 2**32))
def test_nobody_is_overtaken_more_often_than_the_limit(rig, seed):
    """A stream of small requests never keeps a large one out, and is not held up without need either."""
    rng = np.random.default_rng(seed)
    overtaken: Counter[int] = Counter()
    refused: set[int] = set()
    everyone: list[Request] = []
    for number in range(40):
        tokens = rng.integers(0, VOCAB, rng.choice([4, 60], p=[0.8, 0.2]))
        params = SamplingParams(max_tokens=int(rng.integers(1, 9)))
        everyone.append(Request.generate(str(number), tokens, params, seed=0))
        rig.add(everyone[-1])
        num_admitted = rig.scheduler.metrics()["admissions"]
        rig.step()
        joins = sorted(
            (request.admission, request.arrival) for request in everyone if request.admission >= num_admitted
        )
        for _, joined in joins:
            refused.discard(joined)
            overtaken.pop(joined, None)
            overtaken.update(other for other in refused if other < joined)
        assert max(overtaken.values(), default=0) <= rig.max_overtakes
        # From the first refusal on, each younger request that joins counts.
        refused |= {int(name) for name in rig.scheduler._queue._blocked}
    rig.run()
    assert len(rig.finished) == 40


# -- equal output under every setting, and the faults that must show ---------------------------------------------------
def standard_requests() -> list[Request]:
    rng = np.random.default_rng(5)
    shared = rng.integers(0, VOCAB, 20).tolist()
    params = SamplingParams(max_tokens=20, min_tokens=2, presence_penalty=0.3)
    requests = []
    for number in range(5):
        tokens = shared + rng.integers(0, VOCAB, 3 + 4 * number).tolist()
        requests += [
            Request.generate(f"g{number}.{i}", tokens, params, seed=number, sample_index=i, group_id=f"g{number}")
            for i in range(3)
        ]
        requests.append(Request.score(f"s{number}", tokens, score_start=18, sampling_params=params))
    return requests


def run_standard(manager: type[KVCacheManager] = KVCacheManager, *, check: bool = True, **options) -> Rig:
    """Two rounds of one workload with a weight update between them, preempting now and then."""
    rig = Rig(manager=manager, check=check, weights={"policy": 1}, **options)
    for epoch in (1, 2):
        rig.weights["policy"] = epoch
        rig.scheduler.set_weights("policy", epoch=epoch, version=epoch)
        rig.finished.clear()
        for request in standard_requests():
            rig.add(request)
        for step in itertools.count():
            if rig.step() is None:
                break
            if step % 9 == 5:
                rig.scheduler.preempt_all()
        assert_as_expected(rig.finished.values(), rig.weights)
    assert len(rig.finished) == 20
    return rig


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 1, "max_num_seqs": 1},
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 4096},
        {"block_size": 16, "num_blocks": 32},
        {"block_size": 64, "num_blocks": 8},
        {"num_blocks": 10},
        {"enable_prefix_caching": False},
        {"enable_prefix_caching": False, "num_blocks": 10, "max_num_batched_tokens": 13},
    ],
)
def test_output_is_the_same_under_every_setting(options):
    rig = run_standard(**options)
    metrics = rig.scheduler.metrics()
    assert metrics["preemptions"] > 0
    assert (metrics["cached_tokens"] > 0) == (rig.block_size < 64)  # the prompts are shorter than that


class DropsAnExtension(KVCacheManager):
    """The table claims a block that was never put into it."""

    def grow(self, request: Request) -> None:
        super().grow(request)
        request.block_table[request.num_blocks - 1] = request.block_table[0]


class MatchesAnyEpoch(KVCacheManager):
    """Old weights' keys are taken for new ones."""

    def prefix_keys(self, request: Request, weight_epoch: int) -> PrefixKeys:
        return super().prefix_keys(request, 0)


class PublishesUncomputedBlocks(KVCacheManager):
    """Blocks are offered to others as soon as they are allocated."""

    def admit(self, request: Request, matched: list[int]) -> None:
        super().admit(request, matched)
        start, request.num_computed_tokens = request.num_computed_tokens, request.compute_target
        self.publish(request)
        request.num_computed_tokens = start


class KeysWithoutParents(KVCacheManager):
    """A block is known by its own tokens, whatever came before them."""

    def _next_key(self, parent: bytes, tokens: bytes) -> bytes:
        return b"key" + tokens


class FreesSharedBlocks(KVCacheManager):
    """A sibling's blocks are given away with the first one that finishes."""

    def admit(self, request: Request, matched: list[int]) -> None:
        super().admit(request, matched)
        for block in matched:
            self._pool._references[block] = 1


@pytest.mark.parametrize(
    "manager", [DropsAnExtension, MatchesAnyEpoch, PublishesUncomputedBlocks, KeysWithoutParents, FreesSharedBlocks]
)
def test_negative_control_a_planted_fault_is_caught(manager):
    with pytest.raises((AssertionError, KeyError)):
        run_standard(manager, check=False, max_num_batched_tokens=7, num_blocks=24)


@pytest.mark.parametrize("manager", [DropsAnExtension, FreesSharedBlocks])
def test_negative_control_the_integrity_check_alone_catches_lost_blocks(manager):
    with pytest.raises(AssertionError, match=r"holds a block twice|references"):
        run_standard(manager, check=True)


def test_negative_control_progress_that_is_not_noted_is_caught(monkeypatch):
    noted = RunningSet.advance

    def only_once(self, request):
        if request.num_output_tokens < 2:
            noted(self, request)

    monkeypatch.setattr(RunningSet, "advance", only_once)
    with pytest.raises(AssertionError):
        Rig().run([generate("a", 9, 8)])
