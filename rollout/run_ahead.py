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
    members = [requests[entry[0]] for entry in entries]
    # `_is_carried` of each, without two calls for each.
    others = [
        entry
        for entry, request in zip(entries, members, strict=True)
        if entry[1] != request.num_tokens or not request.sampling.is_constant
    ]
    if others and entries[-len(others) :] != others:  # those that have just joined are the last ones
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
    that were in the one before: their arrays are made of its arrays, and what stays as it was is the same array.
    """
    old_plan, rank_plan = before_plan.ranks[rank], plan.ranks[rank]
    entries = rank_plan.entries
    # `carried_first` has sorted them: a thousand need not be asked again.
    count = bisect_left(range(len(entries)), True, key=lambda n: not _is_carried(entries[n], requests[entries[n][0]]))
    if count and count == len(entries) and _are_same(old_plan, entries):
        carried = _carried(before.inputs, None, np.arange(count, dtype=np.int32), entries, requests, block_size)
        return StepOrder(inputs=replace(carried, step=plan.step, policy=plan.policy))
    num_rows = np.array([entry.num_rows for entry in old_plan.entries], np.int32)
    rows = (np.cumsum(num_rows, dtype=np.int32) - num_rows).tolist()
    index_of = {entry[0]: index for index, entry in enumerate(old_plan.entries)}
    parts: list[StepInputs] = []
    if count:
        index = [index_of[entry[0]] for entry in entries[:count]]
        source_rows = np.array([rows[i] for i in index], np.int32)
        carried = _carried(before.inputs, np.array(index), source_rows, entries[:count], requests, block_size)
        parts.append(replace(carried, step=plan.step, policy=plan.policy))
    if count < len(entries) or not entries:
        others = entries[count:]
        sources = [
            rows[index_of[entry.request_id]] if is_under_way(entry, requests[entry.request_id]) else -1
            for entry in others
        ]
        part = RankPlan(rank, others, rank_plan.num_tokens - count, rank_plan.num_rows - count)
        parts.append(_with_sources(rank_inputs(plan, part, requests, block_size), others, sources))
    return StepOrder(inputs=parts[0] if len(parts) == 1 else joined(*parts))


def _are_same(old: RankPlan, entries: Sequence[PlanEntry]) -> bool:
    """Whether these are the requests of a step in which each had one token and one row, in the same order."""
    if not len(entries) == len(old.entries) == old.num_tokens == old.num_rows:
        return False
    return [entry[0] for entry in entries] == [entry[0] for entry in old.entries]


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
    index: NDArray[np.intp] | None,
    rows: Ints,
    entries: Sequence[PlanEntry],
    requests: Mapping[str, Request],
    block_size: int,
) -> StepInputs:
    """Arrays for one more token of sequences of the step before: its sequences `index`, its rows `rows`.

    None: all its sequences, of which each has one row.
    """
    positions = old.context_lens if index is None else old.context_lens[index]
    tables = old.block_tables if index is None else old.block_tables[index]
    grown = {row: requests[entries[row][0]] for row in np.flatnonzero(positions % block_size == 0).tolist()}
    tables = _grown_tables(tables, int(positions.max()) // block_size + 1, grown)
    count = np.arange(len(entries), dtype=np.int32)
    batch = old.sampling
    if index is None:
        sampling = replace(batch, position=(positions + 1).astype(np.uint32))
    else:
        sampling = _sampling(batch, rows, positions)
    if batch.want_raw and not any(requests[entry[0]].sampling.want_raw for entry in entries):
        sampling = replace(sampling, want_raw=False)
    return StepInputs(
        token_ids=np.zeros(len(entries), np.int32),
        positions=positions,
        slot_mapping=tables[count, positions // block_size] * block_size + positions % block_size,
        seq_starts=np.arange(len(entries) + 1, dtype=np.int32),
        context_lens=positions + 1,
        block_tables=tables,
        logit_rows=count,
        sampling=sampling,
        token_rows=rows,
    )


def _grown_tables(tables: Ints, width: int, grown: Mapping[int, Request]) -> Ints:
    """Block tables of the step before, `width` blocks wide, with the blocks that these rows' requests begin with this
    one; the same array where nothing is another.

    A sequence that decodes has blocks up to the token that it computes: the longest one says how wide they are.
    """
    if width == tables.shape[1] and not grown:
        return tables
    made = np.full((len(tables), width), -1, np.int32)
    kept = min(width, tables.shape[1])
    made[:, :kept] = tables[:, :kept]
    for row, request in grown.items():
        made[row, : request.num_blocks] = request.block_table[: request.num_blocks]
    return made


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
