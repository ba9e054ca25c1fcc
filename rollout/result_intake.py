"""From the results of a step to its requests: each takes its rows, and some end with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from zerokl.rollout.completion import End, StopChecker, find_end
from zerokl.rollout.progress import Progress
from zerokl.rollout.request import Request
from zerokl.rollout.residents import Residents
from zerokl.rollout.results import DECODE, PREFILL, Origin, Rows, cells_of, make_rows
from zerokl.rollout.scheduler_meter import SchedulerMeter
from zerokl.rollout.step_order import StepResult
from zerokl.rollout.step_plan import RankPlan, StepPlan


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
            if not is_foreseen:
                self._progress.move(rank_plan, members)
            rows = _rows(plan, rank_plan, members, result)
            ended, num_generated = self._take_rank(rank_plan, members, rows, result.sampled.tokens.tolist())
            if not is_foreseen:
                self._progress.note_moved(rank_plan, members, {request.request_id for request, _ in ended})
            self._meter.count_results(plan, rank_plan, num_generated)
            all_ended += ended
        return all_ended

    def _take_rank(
        self, rank_plan: RankPlan, members: Sequence[Request | None], rows: Rows, tokens: Sequence[int]
    ) -> tuple[list[tuple[Request, End]], int]:
        """The rows of one rank: who ends with them, and how many are tokens that were drawn."""
        cells, ended = cells_of(rows), list[tuple[Request, End]]()
        end_row = num_generated = 0
        for entry, request in zip(rank_plan.entries, members, strict=True):
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


def _rows(plan: StepPlan, rank_plan: RankPlan, members: Sequence[Request | None], result: StepResult) -> Rows:
    """All rows of a rank's result with where they come from; of requests that have left it does not matter."""
    decodes = [
        num_tokens == 1 and request is not None and start >= request.num_prompt_tokens and request.kind == "generate"
        for (_, start, num_tokens, _), request in zip(rank_plan.entries, members, strict=True)
    ]
    cached = [0 if request is None else request.num_matched_tokens for request in members]
    phases, cached_lens = np.where(decodes, DECODE, PREFILL), np.array(cached, np.int32)
    if rank_plan.num_rows != len(members):
        counts = [entry.num_rows for entry in rank_plan.entries]
        phases, cached_lens = np.repeat(phases, counts), np.repeat(cached_lens, counts)
    return make_rows(result.sampled, Origin(plan.policy_version, plan.step, phases, cached_lens, rank_plan.rank))
