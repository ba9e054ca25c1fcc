"""The matrix: what each variant changes, and what must have occurred for it to count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gate.arrivals import Arrival, aborted, at_once, forward_signal, paced, shuffled, trickled, twice, updated
from gate.measure import Variant

TIGHT_BUDGET: dict[str, Any] = {"max_num_batched_tokens": 16}
ABORTED = ("aborted", "aborted_tokens")
UPDATED = ("in_flight_at_update", "tokens_of_version_0", "tokens_of_version_1")

ONE_RANK = [
    Variant(name="plain", absent=("preemptions", "chunks")),
    Variant(name="one request at a time", options={"max_num_seqs": 1}, occurs=("refused_slots",)),
    Variant(name="token budget 16", options=TIGHT_BUDGET, occurs=("chunks", "refused_tokens")),
    Variant(name="token budget 4096", options={"max_num_batched_tokens": 4096}, absent=("chunks",)),
    Variant(name="shuffled arrivals", arrival=shuffled, occurs=("prompts_out_of_place",)),
    Variant(name="trickled arrivals", arrival=trickled, occurs=("late_joins",)),
    Variant(name="arrivals 2 ms apart", arrival=paced(0.002), occurs=("late_joins",)),
    Variant(name="forward-signal coupling", arrival=forward_signal, occurs=("late_joins",)),
    Variant(name="prefix cache on", arrival=twice, occurs=("cached_prompt_tokens",)),
    Variant(
        name="prefix cache off",
        options={"enable_prefix_caching": False},
        arrival=twice,
        occurs=("computed_prompts",),
        absent=("cached_prompt_tokens",),
    ),
    Variant(name="forced preemption", tight_pool=True, occurs=("preemptions",)),
    Variant(
        name="preempted, chunked, trickled",
        options=TIGHT_BUDGET,
        tight_pool=True,
        arrival=trickled,
        occurs=("preemptions", "chunks", "late_joins"),
    ),
    Variant(name="abort and resubmit", arrival=aborted, occurs=ABORTED),
    Variant(name="weight update, mode wait", arrival=updated, occurs=UPDATED),
    Variant(
        name="routing replay",
        options={"return_routing": "all"} | TIGHT_BUDGET,
        tight_pool=True,
        occurs=("replayed_tokens", "preemptions", "chunks"),
        moe_only=True,
    ),
    Variant(name="worker process", options={"worker": "process"}, arrival=at_once),
]


def _several(
    name: str, expert: int, data: int, arrival: Arrival = at_once, occurs: tuple[str, ...] = (), **changes: Any
) -> Variant:
    """On expert * data ranks, all of which must compute tokens."""
    return Variant(
        name=name,
        options={"expert_parallel_size": expert, "data_parallel_size": data, "num_threads": 1, **changes},
        arrival=arrival,
        occurs=("busy_ranks", *occurs),
        moe_only=expert > 1,
        short=False,
    )


def _in_short(variant: Variant) -> Variant:
    return replace(variant, short=True)


MS_10, MS_100 = 0.010, 0.100
PACE = paced(0.002)
HELD = ("refused_window",)
COUPLED = ("late_joins", "dummy_entries")
HANDED_OVER = ("handovers",)
ROLES: dict[str, Any] = {"rank_roles": ("prefill", "decode")}

SEVERAL_RANKS = [
    _several("EP 2", 2, 1),
    _several("EP 4", 4, 1),
    _in_short(_several("DP 2", 1, 2)),
    _in_short(_several("EP 2 x DP 2", 2, 2)),
    replace(_several("DP 2, timeout 0", 1, 2, PACE, ("late_joins",), batched_token_timeout=0.0), absent=HELD),
    _in_short(_several("DP 2, timeout 10 ms", 1, 2, PACE, HELD, batched_token_timeout=MS_10)),
    _several("DP 2, timeout 0.1 s", 1, 2, PACE, HELD, batched_token_timeout=MS_100),
    replace(_several("EP 2, timeout 0", 2, 1, PACE, ("late_joins",), batched_token_timeout=0.0), absent=HELD),
    _several("EP 2, timeout 10 ms", 2, 1, PACE, HELD, batched_token_timeout=MS_10),
    _in_short(_several("EP 2, timeout 0.1 s", 2, 1, PACE, HELD, batched_token_timeout=MS_100)),
    _several("DP 2, token budget 16", 1, 2, occurs=("chunks", "refused_tokens"), **TIGHT_BUDGET),
    _several("EP 2, token budget 16", 2, 1, occurs=("chunks", "refused_tokens"), **TIGHT_BUDGET),
    _several("EP 2, trickled arrivals", 2, 1, trickled, ("late_joins",)),
    _in_short(_several("DP 2, forward-signal coupling", 1, 2, forward_signal, COUPLED)),
    _several("EP 2, forward-signal coupling", 2, 1, forward_signal, COUPLED),
    _several("DP 2, prefix cache on", 1, 2, twice, ("cached_prompt_tokens",)),
    _in_short(replace(_several("EP 2, forced preemption", 2, 1, occurs=("preemptions",)), tight_pool=True)),
    _several("EP 2, abort and resubmit", 2, 1, aborted, ABORTED),
    _in_short(_several("EP 2, weight update, mode wait", 2, 1, updated, UPDATED)),
    _in_short(_several("EP 2, expert rebalancing", 2, 1, occurs=("expert_moves",), expert_rebalance_interval=4)),
    _several(
        "EP 2, redundant experts, rebalancing",
        2,
        1,
        occurs=("expert_moves",),
        expert_rebalance_interval=4,
        num_redundant_experts=2,
    ),
    _in_short(_several("EP 2, routing replay", 2, 1, occurs=("replayed_tokens",), return_routing="all")),
    _in_short(_several("DP 2, roles prefill and decode", 1, 2, occurs=HANDED_OVER, **ROLES)),
    _several("EP 2, roles prefill and decode", 2, 1, occurs=HANDED_OVER, **ROLES),
]

VARIANTS = ONE_RANK + SEVERAL_RANKS
