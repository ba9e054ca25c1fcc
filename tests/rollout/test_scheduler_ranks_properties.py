"""Random requests at random times on random ranks, roles, budgets and windows; and faults that must show."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduling_rig import VOCAB, Rig, assert_as_expected, entries, generate
from scheduling_workloads import disturb

from zerokl.rollout.admission import AdmissionLimits
from zerokl.rollout.kv_cache import KVCacheManager
from zerokl.rollout.kv_cache.prefix_cache import PrefixKeys
from zerokl.rollout.request import Request
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.step_plan import Hold

EXAMPLES = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
ROLES = [
    (None, 1),
    (None, 2),
    (None, 4),
    (("prefill", "decode"), 2),
    (("decode", "prefill", "mixed"), 3),
    (("prefill", "prefill", "decode", "decode"), 4),
]
STEP_SECONDS = 0.004


@st.composite
def rigs(draw: st.DrawFn) -> Rig:
    roles, num_ranks = draw(st.sampled_from(ROLES))
    return Rig(
        num_ranks=num_ranks,
        roles=roles,
        batched_token_timeout=draw(st.sampled_from([0.0, 0.01, 0.1])),
        num_blocks=draw(st.sampled_from([9, 14, 40])),
        max_num_seqs=draw(st.sampled_from([1, 2, 6])),
        max_num_batched_tokens=draw(st.sampled_from([1, 5, 20, 200])),
        enable_prefix_caching=draw(st.booleans()),
        look_ahead=draw(st.sampled_from([0, 2, 8])),
        max_overtakes=draw(st.sampled_from([1, 4])),
        reserved_output_blocks=draw(st.sampled_from([0, 1, 50])),
        max_group_imbalance=draw(st.sampled_from([0.0, 0.25, 9.0])),
        weights={"policy": 1, "reference": 2},
    )


@st.composite
def arrivals(draw: st.DrawFn) -> list[tuple[float, list[Request]]]:
    """(time, samples of one prompt or a score request), in order of time."""
    times = sorted(draw(st.lists(st.sampled_from([0.0, 0.001, 0.02, 0.05, 0.3, 0.5]), min_size=1, max_size=9)))
    found = []
    for number, time in enumerate(times):
        length = draw(st.integers(2, 48))
        tokens = [*range(length // 2), *[(number % 3 * 7 + i) % VOCAB for i in range(length - length // 2)]]
        policy = draw(st.sampled_from(["policy", "policy", "reference"]))
        if draw(st.integers(0, 4)) == 0:
            found.append((time, [Request.score(f"s{number}", tokens, policy=policy)]))
            continue
        penalty = draw(st.sampled_from([0.0, 0.5]))
        params = SamplingParams(max_tokens=draw(st.integers(1, 20)), frequency_penalty=penalty)
        group = None if (size := draw(st.sampled_from([1, 1, 3]))) == 1 else f"g{number}"
        options = {"seed": number, "group_id": group, "policy": policy}
        samples = [Request.generate(f"g{number}.{i}", tokens, params, sample_index=i, **options) for i in range(size)]
        found.append((time, samples))
    return found


DISTURBANCES = st.lists(
    st.tuples(st.integers(0, 50), st.sampled_from(["abort", "preempt", "preempt_all", "fail"]), st.integers(0, 20)),
    max_size=5,
)


@EXAMPLES
@given(rigs(), arrivals(), DISTURBANCES)
def test_every_request_finishes_once_with_its_own_output_on_any_ranks(rig, stream, disturbances):
    """The rig asserts hard caps, conservation of blocks on each rank, roles, and no wait beyond the deadline."""
    limits = AdmissionLimits(max_model_len=1000, num_blocks=rig.num_blocks, block_size=8, vocab_size=VOCAB)
    everyone = [request for _, requests in stream for request in requests]
    events, todo = sorted(disturbances), list(stream)
    longest = [request.max_num_tokens for request in everyone]
    for _ in range(4 * sum(-(-size // rig.max_num_batched_tokens) + size for size in longest) + 100):
        while todo and todo[0][0] <= rig.now:
            for request in todo.pop(0)[1]:
                limits.check(request)
                rig.add(request)
        while events and events[0][0] <= len(rig.plans):
            disturb(rig, *events.pop(0)[1:])
        if rig.step() is None:
            if not todo:
                break
            rig.now = max(rig.now, todo[0][0])
        rig.now += STEP_SECONDS
    assert set(rig.finished) == {request.request_id for request in everyone}
    assert_as_expected(rig.finished.values(), rig.weights)
    assert all(kv_cache.num_free_blocks == rig.num_blocks for kv_cache in rig.kv_caches)
    assert all(request.num_output_tokens == len(request.steps) for request in everyone)


@settings(EXAMPLES, max_examples=40)
@given(rigs(), st.lists(st.integers(1, 60), min_size=1, max_size=5), st.floats(0.0, 0.2))
def test_a_request_that_could_run_waits_for_nothing_but_the_window_and_not_beyond_it(rig, lengths, pause):
    """Where nothing runs or waits, new requests start at the deadline at the latest, and at once on one rank."""
    for number, length in enumerate(lengths):
        start = rig.now
        rig.add(generate(str(number), length, 2))
        plan = rig.plan()
        if isinstance(plan, Hold):
            assert rig.num_ranks > 1 and plan.until == start + rig.batched_token_timeout > start
            rig.now = plan.until
            plan = rig.plan()
        assert str(number) in [entry.request_id for entry in entries(plan)]
        rig.run()
        rig.now += pause
    assert_as_expected(rig.finished.values(), rig.weights)


@settings(EXAMPLES, max_examples=25)
@given(rigs(), st.integers(0, 100))
def test_neither_large_nor_small_requests_starve(rig, seed):
    """Large ones start though small ones never cease to come; small ones pass a blocked head up to the limit."""
    rig.run([generate("warm", 5)])
    large = [generate(f"large{number}", 55 + number, 4) for number in range(2)]
    rig.add(*large)
    for number in range(400):
        if all(request.num_output_tokens for request in large):
            break
        rig.add(generate(f"{seed}.{number}", 4 + number % 7, 1 + number % 5))
        rig.step()
        overtaken = [request.num_overtaken for request in rig.scheduler._queue.blocked.values()]
        assert max(overtaken, default=0) <= rig.max_overtakes
        rig.now += STEP_SECONDS
    assert all(request.num_output_tokens for request in large)
    rig.run()
    assert_as_expected(rig.finished.values(), rig.weights)


# -- faults that must show -----------------------------------------------------------------------------
def run_split(manager: type[KVCacheManager] = KVCacheManager, **options) -> None:
    roles = ("prefill", "mixed", "decode")
    rig = Rig(num_ranks=3, roles=roles, num_blocks=12, max_num_seqs=4, manager=manager, **options)
    rig.run([generate(f"p{i}", 20, 20, group_id="p", sample_index=i) for i in range(4)])
    rig.run([generate(f"{number}", 9 + number, 25) for number in range(8)])
    assert rig.scheduler.metrics()["handovers"] > 3
    assert_as_expected(rig.finished.values(), rig.weights)


class DropsAnExtension(KVCacheManager):
    """The table claims a block that was never put into it."""

    def grow(self, request: Request) -> None:
        super().grow(request)
        request.block_table[request.num_blocks - 1] = request.block_table[0]


class ForgetsASourceBlock(KVCacheManager):
    """The last of a handed over request's blocks is not given back."""

    def release_blocks(self, blocks: list[int]) -> None:
        super().release_blocks(blocks[:-1] if len(blocks) > 2 else blocks)


class MatchesTooMuch(KVCacheManager):
    """A block is taken for cached that holds something else."""

    def match(self, request: Request, prefix: PrefixKeys) -> list[int]:
        matched = super().match(request, prefix)
        return matched[::-1]


def test_the_same_run_passes_without_a_fault():
    run_split()


@pytest.mark.parametrize("manager", [DropsAnExtension, MatchesTooMuch])
def test_negative_control_a_broken_manager_changes_the_output(manager):
    with pytest.raises(AssertionError):
        run_split(manager, check=False)


@pytest.mark.parametrize("manager", [DropsAnExtension, ForgetsASourceBlock])
def test_negative_control_the_integrity_check_alone_catches_lost_blocks(manager):
    with pytest.raises(AssertionError, match=r"holds a block twice|references"):
        run_split(manager)


def test_negative_control_a_handover_without_one_of_its_blocks_is_caught(monkeypatch):
    import scheduling_rig

    orders = scheduling_rig.build_step_orders

    def forgetful(plan, requests, block_size):
        moves = tuple(
            move._replace(source_blocks=move.source_blocks[1:], target_blocks=move.target_blocks[1:])
            for move in plan.handovers
        )
        return orders(replace(plan, handovers=moves), requests, block_size)

    monkeypatch.setattr(scheduling_rig, "build_step_orders", forgetful)
    with pytest.raises(AssertionError):
        run_split()


def test_negative_control_a_planner_over_its_budget_is_caught(monkeypatch):
    from zerokl.rollout.rank_draft import RankDraft

    made = RankDraft.__init__

    def generous(self, *arguments):
        made(self, *arguments)
        self.budget += 1

    monkeypatch.setattr(RankDraft, "__init__", generous)
    with pytest.raises(AssertionError):
        Rig(num_ranks=2, max_num_batched_tokens=9).run([generate("a", 30), generate("b", 30)])
