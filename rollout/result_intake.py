"""From the results of a step to its requests: each takes its rows, and some end with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.ops import SampleResult
from zerokl.rollout.completion import End, StopChecker, find_end
from zerokl.rollout.progress import Progress
from zerokl.rollout.request import Request
from zerokl.rollout.residents import Residents
from zerokl.rollout.results import DECODE, PREFILL, Origin, Rows, cells_of, make_rows
from zerokl.rollout.row_log import RowLog
from zerokl.rollout.scheduler_meter import SchedulerMeter
from zerokl.rollout.step_order import StepResult
from zerokl.rollout.step_plan import PlanEntry, RankPlan, StepPlan

Members = Sequence[Request | None]
"""The request of each entry; None where nobody is to have its rows."""


class ResultIntake:
    """Takes the results of one step after the other.

    A step has a row for each of a thousand sequences: what rows are made of is laid out for all of them at once, and a
    request copies its own.
    """

    def __init__(
        self, residents: Residents, progress: Progress, meter: SchedulerMeter, stop_checker: StopChecker | None
    ) -> None:
        self._residents = residents
        self._progress = progress
        self._meter = meter
        self._stop_checker = stop_checker
        self._log = RowLog()

    def take(
        self, plan: StepPlan, results: Sequence[StepResult], left: AbstractSet[str], requests: Mapping[str, Request]
    ) -> list[tuple[Request, End]]:
        """Give the requests of a step their rows; returns those that end with them, in order, and why.

        `left`: ids of those whose results are dropped; `requests` holds all others. Requests are moved forward by the
        step here, unless it was foreseen.
        """
        all_ended: list[tuple[Request, End]] = []
        is_foreseen = plan.step == self._progress.foreseen_step
        for rank_plan, result in zip(plan.ranks, results, strict=True):
            num_rows = len(result.sampled.tokens)
            assert num_rows == rank_plan.num_rows, f"{num_rows} rows for a plan of {rank_plan.num_rows}"
            members = [None if entry[0] in left else requests[entry[0]] for entry in rank_plan.entries]
            sampled = result.sampled
            if is_foreseen:
                ended, num_generated = self._take_foreseen(plan, rank_plan, members, sampled)
            else:
                self._progress.move(rank_plan, members)
                rows = make_rows(sampled, _origin(plan, rank_plan, rank_plan.entries, members))
                ended, num_generated = self._take_each(rank_plan.entries, members, rows, sampled.tokens.tolist())
                self._progress.note_moved(rank_plan, members, {request.request_id for request, _ in ended})
            self._meter.count_results(plan, rank_plan, num_generated)
            all_ended += ended
        return all_ended

    def _take_foreseen(
        self, plan: StepPlan, rank_plan: RankPlan, members: Members, sampled: SampleResult
    ) -> tuple[list[tuple[Request, End]], int]:
        """As `_take_each`, of all entries; the log takes the rows of those that have a lane."""
        lanes = [-1 if request is None else request.lane for request in members]
        logged = [request for request, lane in zip(members, lanes, strict=True) if request is not None and lane >= 0]
        early, num_drawn = list[tuple[Request, End]](), 0
        if len(logged) < len(members):
            others = [None if lane >= 0 else request for request, lane in zip(members, lanes, strict=True)]
            rows = make_rows(sampled, _origin(plan, rank_plan, rank_plan.entries, others))
            early, num_drawn = self._take_each(rank_plan.entries, others, rows, sampled.tokens.tolist())
            self._enter(rank_plan.entries, others, early)
        if not logged:
            return early, num_drawn
        ended = self._take_logged(plan, rank_plan, logged, np.array(lanes), sampled)
        return _in_order(members, early, ended) if early else ended, len(logged) + num_drawn

    def _take_logged(
        self,
        plan: StepPlan,
        rank_plan: RankPlan,
        logged: Sequence[Request],
        lanes: NDArray[np.int64],
        sampled: SampleResult,
    ) -> list[tuple[Request, End]]:
        """Write the rows of these requests, those of all entries that have `lanes`: who ends with them.

        All of them decode.
        """
        tokens, rows = sampled.tokens, make_rows(sampled, Origin(plan.policy_version, plan.step, DECODE, 0))
        if len(logged) < len(lanes):
            (index,) = np.nonzero(lanes >= 0)
            counts = np.array([entry.num_rows for entry in rank_plan.entries])
            assert (counts[index] == 1).all(), "a sequence that decodes has one row"
            first_rows = (np.cumsum(counts) - counts)[index]
            tokens, rows, lanes = tokens[first_rows], rows[first_rows], lanes[index]
        rows["cached_lens"], rows["ranks"] = self._log.cached_lens[lanes], rank_plan.rank
        ended = []
        for place in self._log.write(logged, lanes, tokens, rows):
            end = find_end(logged[place], int(tokens[place]), self._stop_checker)
            if end is not None:
                ended.append((logged[place], end))
        return ended

    def _enter(self, entries: Sequence[PlanEntry], members: Members, ended: Sequence[tuple[Request, End]]) -> None:
        """Those that have drawn a token, and go on, decode from here on: they get a lane."""
        gone = {request.request_id for request, _ in ended}
        for entry, request in zip(entries, members, strict=True):
            has_drawn = request is not None and entry[3] and request.request_id not in gone
            if request is not None and has_drawn and self._log.serves(request):
                self._log.enter(request)

    def _take_each(
        self, entries: Sequence[PlanEntry], members: Members, rows: Rows, tokens: Sequence[int]
    ) -> tuple[list[tuple[Request, End]], int]:
        """Give requests their rows one by one: who ends with them, and how many are tokens that were drawn."""
        cells, ended = cells_of(rows), list[tuple[Request, End]]()
        end_row = num_generated = 0
        for entry, request in zip(entries, members, strict=True):
            row, end_row = end_row, end_row + entry[3]
            if request is None or row == end_row:
                continue
            if request.kind == "generate":
                assert end_row - row == 1, f"{request.request_id} draws one token a step"
                num_generated += 1
                # Most go on: a thousand need not be asked for every reason to end.
                if not request.take_token(tokens[row], cells[row]):
                    continue
                if request.num_output_tokens == 1:
                    self._meter.count_first_token(request)
            else:
                request.take_rows(rows[row:end_row])
            end = find_end(request, tokens[row], self._stop_checker)
            if end is not None:
                ended.append((request, end))
        return ended, num_generated


def _origin(plan: StepPlan, rank_plan: RankPlan, entries: Sequence[PlanEntry], members: Members) -> Origin:
    """Of all rows of a rank's result; where nobody takes them it does not matter."""
    decodes = [
        num_tokens == 1 and request is not None and start >= request.num_prompt_tokens and request.kind == "generate"
        for (_, start, num_tokens, _), request in zip(entries, members, strict=True)
    ]
    cached = [0 if request is None else request.num_matched_tokens for request in members]
    phases, cached_lens = np.where(decodes, DECODE, PREFILL), np.array(cached, np.int32)
    if rank_plan.num_rows != len(members):
        counts = [entry.num_rows for entry in entries]
        phases, cached_lens = np.repeat(phases, counts), np.repeat(cached_lens, counts)
    return Origin(plan.policy_version, plan.step, phases, cached_lens, rank_plan.rank)


def _in_order(
    members: Members, some: list[tuple[Request, End]], others: list[tuple[Request, End]]
) -> list[tuple[Request, End]]:
    """Those that have ended, of two lists of them, as they stand among the members."""
    place = {request.request_id: index for index, request in enumerate(members) if request is not None}
    return sorted([*some, *others], key=lambda pair: place[pair[0].request_id])
