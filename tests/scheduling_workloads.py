"""Random workloads for a scheduler: arrivals, lengths, groups, aborts, preemptions, pools and budgets."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from scheduling_rig import VOCAB, Rig

from zerokl.rollout.request import Request
from zerokl.rollout.sampling_params import SamplingParams

EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
WEIGHTS = {"policy": 1, "reference": 2}

PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(4, 24),
    min_tokens=st.integers(0, 4),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    stop_token_ids=st.sampled_from([(), (3, 4, 5, 6)]),
    logit_bias=st.sampled_from([None, {7: -np.inf}]),
    raw_logprobs=st.booleans(),
)


@st.composite
def calls(draw: st.DrawFn, number: int) -> list[Request]:
    """One prompt's samples, or one score request. Prompts begin alike, so that prefixes are hit."""
    length = draw(st.integers(1, 45))
    family = draw(st.integers(0, 2))
    tokens = [*range(length // 2), *[(family * 7 + i) % VOCAB for i in range(length - length // 2)]]
    policy = draw(st.sampled_from(["policy", "policy", "policy", "reference"]))
    if length > 1 and draw(st.integers(0, 3)) == 0:
        start = draw(st.integers(1, length - 1))
        return [Request.score(f"s{number}", tokens, score_start=start, sampling_params=draw(PARAMS), policy=policy)]
    size = draw(st.sampled_from([1, 1, 2, 5]))
    params, group = draw(PARAMS), f"g{number}" if size > 1 else None
    return [
        Request.generate(
            f"g{number}.{i}",
            tokens,
            params,
            seed=number,
            sample_index=i,
            group_id=group,
            policy=policy,
            eos_token_ids=(9,),
        )
        for i in range(size)
    ]


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[int, list[Request]]]:
    """(steps to wait before, requests) in order of arrival."""
    return [(draw(st.sampled_from([0, 0, 1, 5])), draw(calls(number))) for number in range(draw(st.integers(1, 7)))]


RIGS = st.builds(
    Rig,
    num_blocks=st.sampled_from([9, 12, 20, 64]),
    block_size=st.just(8),
    max_num_seqs=st.sampled_from([1, 2, 5, 32]),
    max_num_batched_tokens=st.sampled_from([1, 3, 8, 17, 64, 512]),
    enable_prefix_caching=st.booleans(),
    look_ahead=st.sampled_from([0, 1, 8]),
    max_overtakes=st.sampled_from([1, 4]),
    weights=st.just(WEIGHTS),
)
DISTURBANCES = st.lists(
    st.tuples(st.integers(0, 60), st.sampled_from(["abort", "preempt", "preempt_all", "reset"]), st.integers(0, 20)),
    max_size=6,
)


def disturb(rig: Rig, action: str, choice: int) -> None:
    """Abort or preempt one of the requests, preempt all, forget the cached prefixes, or give a step up."""
    ids = list(rig.scheduler.requests)
    if action == "reset":
        rig.kv_cache.reset()
    elif action == "fail":
        rig.next_plan()  # a step that comes to nothing
    elif action == "preempt_all":
        rig.scheduler.preempt_all()
    elif ids and action == "preempt":
        rig.scheduler.preempt(ids[choice % len(ids)])
    elif ids:
        aborted = rig.scheduler.abort(ids[choice % len(ids)])
        assert aborted is not None
        rig.keep(aborted)
    rig.scheduler.check_integrity()
