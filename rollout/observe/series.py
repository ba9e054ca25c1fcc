"""Every series that Prometheus is told, as a table: name, kind, labels, meaning, and where in the telemetry it is.

Names are Prometheus's: base units (seconds, bytes, ratios), counters end in `_total`, and each label has a bounded set
of values.
"""

from __future__ import annotations

from collections.abc import Iterable

from zerokl.rollout.observe.readings import (
    Sample,
    Series,
    Telemetry,
    by,
    flat,
    histogram,
    of_mismatch,
    of_ranks,
    of_token_kinds,
)

STATES = ("running", "draining", "paused", "asleep", "failed", "closed")
_REFUSALS = ("tokens", "slots", "blocks", "policy", "turn", "window", "handover")
_RANK_FAULTS = {"death": "rank_deaths", "stall": "rank_stalls", "step_timeout": "rank_step_timeouts"}


def unlisted(telemetry: Telemetry) -> list[Sample]:
    """Keys of `metrics()` that no series stands for."""
    covered = {key for series in SERIES for key in series.covers}
    return [((key,), value) for key, value in telemetry["metrics"].items() if key not in covered]


def _faults(telemetry: Telemetry) -> Iterable[Sample]:
    metrics = telemetry["metrics"]
    return [((fault,), metrics[key]) for fault, key in _RANK_FAULTS.items() if key in metrics]


# -- the table --------------------------------------------------------------------------------------------------------
_STATE = (
    Series(
        name="zerokl_engine_state",
        kind="gauge",
        labels=("state",),
        meaning="1 for the state that the engine is in, 0 for the others.",
        read=lambda seen: [((state,), float(seen["health"]["state"] == state)) for state in STATES],
    ),
    Series(
        name="zerokl_weight_version",
        kind="gauge",
        labels=("set",),
        meaning="Version of the live weights (`policy`) and of each pinned set.",
        read=lambda seen: [((name,), version) for name, version in seen["health"]["weight_versions"].items()],
    ),
    Series(
        name="zerokl_hook_errors",
        kind="counter",
        meaning="Exceptions of update hooks and alarm hooks that were logged.",
        read=lambda seen: [((), seen["health"]["hook_errors"] + seen["mismatch"]["hook_errors"])],
    ),
)
_RANKS = (
    of_ranks("gauge", "zerokl_running_requests", lambda row: row["running"], "Requests that run there.", "running"),
    of_ranks(
        "gauge",
        "zerokl_kv_usage_ratio",
        lambda row: 1.0 - row["free_blocks"] / row["total_blocks"],
        "Part of the KV blocks that requests hold.",
        "kv_usage",
    ),
    of_ranks("gauge", "zerokl_kv_blocks", lambda row: row["total_blocks"], "KV blocks in the pool.", "total_blocks"),
    of_ranks(
        "gauge",
        "zerokl_kv_free_blocks",
        lambda row: row["free_blocks"],
        "KV blocks that no request holds, cached ones included.",
        "free_blocks",
    ),
    of_ranks(
        "gauge",
        "zerokl_kv_cached_blocks",
        lambda row: row["cached_blocks"],
        "KV blocks that the prefix cache can give, held or free.",
        "cached_blocks",
    ),
    of_ranks(
        "counter",
        "zerokl_computed_tokens",
        lambda row: row["computed_tokens"],
        "Tokens that went through the forward.",
        "computed_tokens",
    ),
    of_ranks(
        "counter",
        "zerokl_generated_tokens",
        lambda row: row["generated_tokens"],
        "Tokens sampled; its rate is tokens per second.",
        "generated_tokens",
    ),
    flat("counter", "zerokl_rank_restarts", "rank_restarts", "Ranks that were started anew after a fault."),
    flat("counter", "zerokl_rank_restart_seconds", "rank_restart_seconds", "From faults until the ranks worked again."),
    Series(
        name="zerokl_rank_faults",
        kind="counter",
        labels=("fault",),
        meaning="Ranks that died, gave no sign of life, or took too long over a step.",
        read=_faults,
        covers=tuple(_RANK_FAULTS.values()),
    ),
    flat(
        "counter", "zerokl_rank_faults_in_step", "rank_faults_in_step", "Faults that hit a rank with a step in flight."
    ),
)
_REQUESTS = (
    flat("counter", "zerokl_requests_received", "received", "Requests queued: samples and scored sequences."),
    by(
        "reason",
        "zerokl_requests_finished",
        {reason: f"finished_{reason}" for reason in ("stop", "length", "abort")},
        "Requests that have ended.",
    ),
    flat("gauge", "zerokl_waiting_requests", "waiting", "Requests that hold no KV block; they have no rank yet."),
    flat("gauge", "zerokl_held_calls", "held", "Calls and changes held by a pause, a change or a step in flight."),
    by(
        "reason",
        "zerokl_refusals",
        {reason: f"refused_{reason}" for reason in _REFUSALS},
        "Times that a step could not take those that wait, by what was lacking.",
    ),
    flat("counter", "zerokl_admissions", "admissions", "Requests that began to run, preempted ones again."),
    flat("counter", "zerokl_preemptions", "preemptions", "Requests that lost their KV blocks, to be computed again."),
    flat("counter", "zerokl_handovers", "handovers", "Requests that moved from a prefill rank to a decode rank."),
    histogram("zerokl_intake_seconds", "intake_seconds", "From submission until the scheduler had the request."),
    histogram(
        "zerokl_queue_wait_seconds",
        "queue_wait_seconds",
        "From submission (or preemption) until the request ran, by what held it last.",
        "reason",
    ),
    histogram(
        "zerokl_time_to_first_token_seconds",
        "time_to_first_token_seconds",
        "From submission to the first sampled token.",
    ),
    histogram("zerokl_request_seconds", "request_seconds", "From submission to the end, by why it ended.", "reason"),
)
_WORK = (
    flat("counter", "zerokl_steps", "steps", "Steps planned."),
    histogram("zerokl_step_seconds", "step_seconds", "A step, planning to results.", covers=("step_seconds",)),
    histogram("zerokl_plan_seconds", "plan_seconds", "Planning a step and laying out its arrays."),
    flat("counter", "zerokl_worker_seconds", "worker_seconds", "Seconds of steps that the ranks computed."),
    by(
        "phase",
        "zerokl_forward_tokens",
        {"prefill": "prefill_tokens", "decode": "decode_tokens"},
        "Tokens that went through the forward alone (decode) or with others of their sequence (prefill).",
    ),
    flat("counter", "zerokl_result_rows", "result_rows", "Rows of results: sampled and rated tokens."),
    flat(
        "counter",
        "zerokl_prefix_cache_hit_tokens",
        "cached_tokens",
        "Tokens that came from the prefix cache when their request began to run.",
    ),
    Series(
        name="zerokl_version_generated_tokens",
        kind="counter",
        labels=("version",),
        meaning="Tokens sampled by each of the newest 8 versions that sampled any, and by `older` ones.",
        read=lambda seen: [((version,), count) for version, count in seen["version_tokens"].items()],
    ),
    flat("counter", "zerokl_expert_moves", "expert_moves", "Experts that came to another rank."),
    flat("counter", "zerokl_expert_rebalances", "expert_rebalances", "Times that experts moved."),
)
_WEIGHTS = (
    flat("counter", "zerokl_weight_updates", "weight_updates", "Updates that became live."),
    flat(
        "counter", "zerokl_weight_update_failures", "weight_update_failures", "Updates after which the old one served."
    ),
    histogram(
        "zerokl_weight_sync_seconds",
        "weight_sync_seconds",
        "Reading and packing weights beside the steps (`stage`), changes waiting for requests in flight (`drain`), the "
        "flip (`commit`).",
        "part",
        covers=("weight_stage_seconds", "weight_drain_seconds", "weight_commit_seconds"),
    ),
    histogram(
        "zerokl_pause_seconds",
        "pause_seconds",
        "Between the last step before new weights and the first one after, with requests in flight (`weights`); "
        "`pause_generation` until `resume_generation` (`generation`).",
        "cause",
        covers=("weight_pause_seconds", "generation_pause_seconds"),
    ),
)
_MISMATCH = (
    of_mismatch("counter", "zerokl_mismatch_reports", "reports", "Calls of `report_trainer_logprobs`."),
    of_token_kinds(
        "counter",
        "zerokl_mismatch_tokens",
        "tokens",
        None,
        "Tokens reported: `exact` must agree, `inexact` weights and `other_version` need not.",
    ),
    of_token_kinds(
        "counter",
        "zerokl_mismatch_differing_logprobs",
        "differing_logprobs",
        None,
        "Tokens whose two logprobs were not the same number.",
    ),
    of_token_kinds(
        "gauge",
        "zerokl_mismatch_k3_kl_mean",
        "last",
        "k3_kl_mean",
        "Mean k3 of the last report: trainer's forward against rollout, never against the reference.",
    ),
    of_token_kinds("gauge", "zerokl_mismatch_k3_kl_max", "last", "k3_kl_max", "Largest k3 of the last report."),
    of_token_kinds(
        "gauge",
        "zerokl_mismatch_probs_diff_max",
        "last",
        "probs_diff_max",
        "Largest difference of two probabilities in the last report.",
    ),
    of_mismatch("counter", "zerokl_mismatch_alarms", "alarms", "Reports whose exact tokens were over the threshold."),
    of_mismatch("gauge", "zerokl_mismatch_alarming", "is_alarming", "1 while the last report is over the threshold."),
    of_mismatch("gauge", "zerokl_mismatch_alarm_threshold", "k3_alarm", "`EngineConfig.k3_alarm`; left out for None."),
)
_SERVER = (
    flat("gauge", "zerokl_server_clients", "server_clients", "Clients with a session."),
    flat("gauge", "zerokl_server_calls", "server_calls", "Calls that are open or being answered."),
    flat("gauge", "zerokl_server_queued_bytes", "server_queued_bytes", "Memory promised to calls and their results."),
    flat("gauge", "zerokl_server_max_queued_bytes", "server_max_queued_bytes", "The most that was ever promised."),
    flat("gauge", "zerokl_server_unacknowledged_bytes", "server_unacknowledged_bytes", "Sent and not acknowledged."),
    flat(
        "counter",
        "zerokl_server_refused_messages",
        "server_refused_messages",
        "Messages that were none, or came before hello.",
    ),
)
SERIES: tuple[Series, ...] = (*_STATE, *_RANKS, *_REQUESTS, *_WORK, *_WEIGHTS, *_MISMATCH, *_SERVER)
UNLISTED = Series(
    name="zerokl_unlisted",
    kind="gauge",
    labels=("name",),
    meaning="Numbers of `metrics()` that have no series of their own yet.",
    read=unlisted,
)
