"""Which waiting requests join a step, and which rank each of them joins."""

from __future__ import annotations

from zerokl.rollout.rank_draft import RankDraft
from zerokl.rollout.request import Request
from zerokl.rollout.scheduler_config import SchedulerConfig
from zerokl.rollout.snapshot import Blocked, Decision, Join, Snapshot
from zerokl.rollout.step_plan import Refusal


class Admissions:
    """Tries the waiting requests of a weight set in order; test, then commit: one that is refused only ages.

    Where a request finds too few blocks on every rank, up to `look_ahead` such requests are passed over in a step. Each
    younger one that joins meanwhile, on whatever rank, overtakes them. Bound: nobody is overtaken more than
    `max_overtakes` times; then it alone may join, all ranks empty until one has room for it, and as admission refused
    what does not fit an empty rank, it starts at the latest when all that ran at that moment have ended.

    Balance: a request joins the rank where its own tokens to compute (cached ones apart) make the fewest in this step;
    then where the fewest tokens are expected altogether; then the lowest. A sample of a group prefers the rank
    that has its prompt (`_near_home`).
    """

    def __init__(
        self, snapshot: Snapshot, budgets: SchedulerConfig, decision: Decision, policy: str, drafts: list[RankDraft]
    ) -> None:
        """`drafts` are changed, of `decision` only the prefix keys."""
        self.drafts = drafts
        self.outcomes: list[Join | Blocked] = []
        self.refusals: list[tuple[Refusal, str | None]] = []
        self._queue = snapshot.queue
        self._budgets = budgets
        self._decision = decision
        self._policy = policy
        self._epoch = snapshot.weights[policy].epoch
        self._takers = [draft for draft in drafts if draft.role != "decode"]
        self._aged = snapshot.queue.aged
        blocked = [*snapshot.queue.blocked.values()]
        blocked += [outcome.request for outcome in decision.outcomes if isinstance(outcome, Blocked)]
        self._blocked = {request.request_id: (request, request.num_overtaken) for request in blocked}

    @property
    def could_take_more(self) -> bool:
        """Whether requests that arrive now could still join: nobody lacks blocks, and a rank has tokens and a slot."""
        is_blocked = any(isinstance(outcome, Blocked) for outcome in self.outcomes)
        return not is_blocked and any(draft.refusal() is None for draft in self._takers)

    def run(self) -> None:
        """Try everybody whose turn it is."""
        if self._aged is not None and len(self._queue) > 1:
            self._refuse(Refusal.TURN)
        look_ahead, num_blocked = self._budgets.look_ahead, 0
        limit = sum(draft.slots for draft in self._takers) + look_ahead + 1
        for request in self._queue.candidates(self._policy, limit):
            ranks = [draft for draft in self._takers if draft.refusal() is None]
            if not ranks:
                return self._refuse(self._takers[0].refusal() or Refusal.BLOCKS, request)
            if self._aged not in (None, request):  # it came of age by one that joined just now
                return self._refuse(Refusal.TURN, request)
            place = self._place(request, ranks)
            if place is not None:
                self._join(request, *place)
                continue
            self._refuse(Refusal.BLOCKS, request)
            self.outcomes.append(Blocked(request))
            self._blocked.setdefault(request.request_id, (request, request.num_overtaken))
            num_blocked += 1
            if num_blocked > look_ahead:
                return None
        return None

    # -- where to ----------------------------------------------------------------------------------
    def _place(self, request: Request, ranks: list[RankDraft]) -> tuple[RankDraft, list[int]] | None:
        """The rank to join and the blocks shared there; None if it fits nowhere."""
        prefix = self._decision.prefix_keys(ranks[0].kv_cache, request, self._epoch)
        fitting: list[tuple[RankDraft, list[int]]] = []
        for draft in ranks:
            matched = draft.kv_cache.match(request, prefix)
            if draft.has_blocks(request, matched):
                fitting.append((draft, matched))
        if request.group_id is not None and len(fitting) > 1:
            fitting = self._near_home(fitting)
        first_position = ranks[0].kv_cache.first_position
        return min(
            fitting,
            key=lambda place: (
                place[0].num_tokens + request.compute_target - first_position(request, place[1]),
                place[0].expected_tokens,
                place[0].rank,
            ),
            default=None,
        )

    def _near_home(self, fitting: list[tuple[RankDraft, list[int]]]) -> list[tuple[RankDraft, list[int]]]:
        """Places for a sample of a group: where most of its prompt is, within `max_group_imbalance`."""
        kv_cache = fitting[0][0].kv_cache
        bound = self._budgets.max_group_imbalance * kv_cache.num_blocks * kv_cache.block_size
        lowest = min(draft.expected_tokens for draft, _ in fitting)
        near = [place for place in fitting if place[0].expected_tokens - lowest <= bound]
        home = max(near, key=lambda place: (len(place[1]), -place[0].rank))
        return [home] if home[1] else near

    # -- what is decided ---------------------------------------------------------------------------
    def _join(self, request: Request, draft: RankDraft, matched: list[int]) -> None:
        draft.admit(request, matched, draft.kv_cache.first_position(request, matched))
        self.outcomes.append(Join(request, draft.rank, matched))
        self._blocked.pop(request.request_id, None)
        for request_id, (other, overtaken) in self._blocked.items():
            if other.arrival < request.arrival:
                self._blocked[request_id] = other, overtaken + 1
        over = [other for other, overtaken in self._blocked.values() if overtaken >= self._budgets.max_overtakes]
        self._aged = min(over, key=lambda other: other.arrival, default=None)

    def _refuse(self, refusal: Refusal, request: Request | None = None) -> None:
        self.refusals.append((refusal, None if request is None else request.request_id))
