"""What a rank is told of a step whose tokens are partly those that the step before draws: only the device has them yet.

    step k      launched ----------- results -> requests
    step k + 1         planned here, launched ----------- results

A request that turns out to have ended with step k has a row in step k + 1 all the same; its result is dropped, and
what the row wrote lies behind all that the request has published.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.ops import SamplingBatch, StepInputs
from zerokl.rollout.request import Request
from zerokl.rollout.step_inputs import is_under_way, joined, rank_inputs
from zerokl.rollout.step_order import StepOrder
from zerokl.rollout.step_plan import PlanEntry, RankPlan, StepPlan

Ints = NDArray[np.int32]


def carried_first(entries: list[PlanEntry], requests: Mapping[str, Request]) -> None:
    """Put first the entries that `order_ahead` takes from the order before."""
    others = [entry for entry in entries if not _is_carried(entry, requests[entry.request_id])]
    if others:
        left = set(others)
        entries[:] = [entry for entry in entries if entry not in left] + others


def _is_carried(entry: PlanEntry, request: Request) -> bool:
    """Whether all that the rank is told of the entry follows from what it was told of the row before."""
    return request.sampling.is_constant and is_under_way(entry, request)


def order_ahead(
    before: StepOrder,
    before_plan: StepPlan,
    plan: StepPlan,
    requests: Mapping[str, Request],
    block_size: int,
    rank: int = 0,
) -> StepOrder:
    """What a rank is told of `plan`, which follows `before_plan`; `before` is what it was told of that.

    Tokens under way are those of rows of the step before (`StepInputs.token_rows`). A step decodes a thousand sequences
    that were in the one before: their arrays are made of its arrays.
    """
    old_entries, rank_plan = before_plan.ranks[rank].entries, plan.ranks[rank]
    num_rows = np.array([entry.num_rows for entry in old_entries], np.int32)
    rows = (np.cumsum(num_rows, dtype=np.int32) - num_rows).tolist()
    index_of = {entry.request_id: index for index, entry in enumerate(old_entries)}
    entries = rank_plan.entries
    members = [requests[entry.request_id] for entry in entries]
    # `carried_first` has sorted them: a thousand need not be asked again.
    count = bisect_left(range(len(entries)), True, key=lambda n: not _is_carried(entries[n], members[n]))
    parts: list[StepInputs] = []
    if count:
        index = [index_of[entry.request_id] for entry in entries[:count]]
        source_rows = np.array([rows[i] for i in index], np.int32)
        carried = _carried(before.inputs, np.array(index), source_rows, entries[:count], members[:count], block_size)
        parts.append(replace(carried, step=plan.step, policy=plan.policy))
    if count < len(entries) or not entries:
        others = entries[count:]
        sources = [
            rows[index_of[entry.request_id]] if is_under_way(entry, request) else -1
            for entry, request in zip(others, members[count:], strict=True)
        ]
        part = RankPlan(rank, others, rank_plan.num_tokens - count, rank_plan.num_rows - count)
        parts.append(_with_sources(rank_inputs(plan, part, requests, block_size), others, sources))
    return StepOrder(inputs=parts[0] if len(parts) == 1 else joined(*parts))


def _with_sources(inputs: StepInputs, entries: Sequence[PlanEntry], sources: Sequence[int]) -> StepInputs:
    """`inputs` of entries, of which each draws its input in row `sources[i]` of the step before; -1: it is known."""
    token_rows = np.full(len(inputs.token_ids), -1, np.int32)
    batch, row = inputs.sampling, 0
    for entry, token, source in zip(entries, inputs.seq_starts.tolist(), sources, strict=False):
        if source >= 0:
            token_rows[token] = source
            if batch.history_start[row + 1] > batch.history_start[row]:
                batch.history_count[batch.history_start[row + 1] - 1] = -1 - source
        row += entry.num_rows
    return replace(inputs, token_rows=token_rows)


def _carried(
    old: StepInputs,
    index: NDArray[np.intp],
    rows: Ints,
    entries: Sequence[PlanEntry],
    members: Sequence[Request],
    block_size: int,
) -> StepInputs:
    """Arrays for one more token of sequences of the step before: its sequences `index`, its rows `rows`."""
    positions = np.array([entry.start for entry in entries], np.int32)
    tables = _grown_tables(old.block_tables[index], members)
    count = np.arange(len(entries), dtype=np.int32)
    want_raw = old.sampling.want_raw and any(request.sampling.want_raw for request in members)
    return StepInputs(
        token_ids=np.zeros(len(entries), np.int32),
        positions=positions,
        slot_mapping=tables[count, positions // block_size] * block_size + positions % block_size,
        seq_starts=np.arange(len(entries) + 1, dtype=np.int32),
        context_lens=positions + 1,
        block_tables=tables,
        logit_rows=count,
        sampling=replace(_sampling(old.sampling, rows, positions), want_raw=want_raw),
        token_rows=rows,
    )


def _grown_tables(tables: Ints, members: Sequence[Request]) -> Ints:
    """Block tables of the step before, with the blocks that were added since, as wide as the longest one."""
    known = (tables >= 0).sum(axis=1)
    sizes = np.array([request.num_blocks for request in members])
    widest = int(sizes.max())
    if widest > tables.shape[1]:
        tables = np.pad(tables, ((0, 0), (0, widest - tables.shape[1])), constant_values=-1)
    for row in np.flatnonzero(sizes > known).tolist():
        request = members[row]
        tables[row, : request.num_blocks] = request.block_table[: request.num_blocks]
    return np.ascontiguousarray(tables[:, :widest])


def _sampling(batch: SamplingBatch, rows: Ints, positions: Ints) -> SamplingBatch:
    """Of the rows `rows` of a batch the constants, for the tokens after those at `positions`."""
    none = np.zeros(len(rows) + 1, np.int32)
    return replace(
        batch,
        temperature=batch.temperature[rows],
        top_k=batch.top_k[rows],
        top_p=batch.top_p[rows],
        min_p=batch.min_p[rows],
        repetition_penalty=batch.repetition_penalty[rows],
        presence_penalty=batch.presence_penalty[rows],
        frequency_penalty=batch.frequency_penalty[rows],
        seed=batch.seed[rows],
        sample_index=batch.sample_index[rows],
        position=(positions + 1).astype(np.uint32),
        forced=np.full(len(rows), -1, np.int32),
        history_start=none,
        history_token=none[:0],
        history_count=none[:0],
        bias_start=none,
        bias_token=none[:0],
        bias_value=np.zeros(0, np.float32),
    )
