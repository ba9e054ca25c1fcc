"""Decides what a step computes on every rank: a function of what is there, which changes nothing.

There is no prefill phase and no decode phase. Every request has `num_computed_tokens`, which catches up with its tokens
under one token budget per rank and step; chunked prefill, cached prefixes, scoring and computing again after a
preemption are all the same movement. What a step computes never changes what it gives: only speed and fairness are
decided here.
"""

from __future__ import annotations

from zerokl.rollout.admissions import Admissions
from zerokl.rollout.rank_draft import RankDraft
from zerokl.rollout.request import Request
from zerokl.rollout.scheduler_config import Role, SchedulerConfig
from zerokl.rollout.snapshot import Decision, Move, Snapshot
from zerokl.rollout.step_plan import Refusal


def plan(snapshot: Snapshot, budgets: SchedulerConfig, now: float) -> Decision:
    """What the next step is to do; `now` in seconds, of the clock that arrival times were taken from.

    On each rank those that run are served first (`RankDraft.serve`), then requests of prefill ranks whose prompt is
    computed are handed over, then waiting ones join (`Admissions`). One weight set runs on all ranks; the one that
    has waited longest and has anything to compute is it.

    With several ranks, joining may be put off: while all waiting requests of the weight set are new, the first of them
    has waited for less than `batched_token_timeout`, and some rank could still take more. What runs goes on meanwhile.
    """
    mixed: Role = "mixed"
    roles = budgets.roles or (mixed,) * len(snapshot.running)
    drafts = [
        RankDraft(rank, roles[rank], running, kv_cache, budgets)
        for rank, (running, kv_cache) in enumerate(zip(snapshot.running, snapshot.kv_caches, strict=True))
    ]
    decision = Decision(policy=None, ranks=[])
    for policy in snapshot.turns:
        _serve_running(snapshot, decision, drafts, policy)
        deadline = _window_end(snapshot, budgets, policy, now)
        # Only what may be put off is tried on copies.
        apart = drafts if deadline is None else [draft.fork() for draft in drafts]
        tried = Admissions(snapshot, budgets, decision, policy, apart)
        tried.run()
        if deadline is not None and tried.could_take_more:
            decision.refusals.append((Refusal.WINDOW, None))
            decision.hold_until = min(deadline, decision.hold_until or deadline)
        else:
            drafts = tried.drafts
            decision.outcomes += tried.outcomes
            decision.refusals += tried.refusals
            decision.left.append(policy)
        if any(draft.entries for draft in drafts):
            decision.policy = policy
            break
    decision.ranks = [draft.finish() for draft in drafts]
    if decision.policy is not None:
        others = [policy for policy in snapshot.queue.policies() if policy != decision.policy]
        decision.refusals += [(Refusal.POLICY, None)] * len(others)
    return decision


def _window_end(snapshot: Snapshot, budgets: SchedulerConfig, policy: str, now: float) -> float | None:
    """When the requests that wait stop waiting for others; None if they need not, or no longer."""
    if len(snapshot.running) == 1 or budgets.batched_token_timeout == 0:
        return None
    since = snapshot.queue.gathers_since(policy)
    if since is None or now >= since + budgets.batched_token_timeout:
        return None
    return since + budgets.batched_token_timeout


def _serve_running(snapshot: Snapshot, decision: Decision, drafts: list[RankDraft], policy: str) -> None:
    """Decode-capable ranks first: what a prefill rank hands over is to find them as they are after growth."""
    targets = [draft for draft in drafts if draft.role != "prefill"]
    for draft in targets:
        draft.serve(policy, None)

    def hand_over(source: RankDraft, request: Request) -> bool:
        return _hand_over(snapshot, decision, targets, source, request)

    for draft in drafts:
        if draft.role == "prefill":
            draft.serve(policy, hand_over)


def _hand_over(
    snapshot: Snapshot, decision: Decision, targets: list[RankDraft], source: RankDraft, request: Request
) -> bool:
    """Let a request of a prefill rank that samples go on at the decode-capable rank with the fewest expected tokens.

    Tokens that the rank has cached count as fewer. False if it stays: it still computes its prompt, is to be scored, or
    finds no room; then it goes on where it is, so no rank waits for another one.
    """
    if request.kind != "generate" or not request.num_output_tokens:
        return False
    best: tuple[int, int] | None = None
    best_matched: list[int] = []
    for draft in targets:
        if draft.refusal() is not None:
            continue
        matched: list[int] = []
        if not request.has_older_kv:
            prefix = decision.prefix_keys(draft.kv_cache, request, snapshot.weights[request.policy].epoch)
            matched = draft.kv_cache.match(request, prefix)
        cost = (draft.expected_tokens - len(matched) * draft.kv_cache.block_size, draft.rank)
        if (best is None or cost < best) and draft.has_blocks(request, matched):
            best, best_matched = cost, matched
    if best is None:
        decision.refusals.append((Refusal.HANDOVER, request.request_id))
        return False
    target = next(draft for draft in targets if draft.rank == best[1])
    target.admit(request, best_matched, request.num_computed_tokens)
    decision.moves.append(Move(request, source.rank, target.rank, best_matched))
    return True
