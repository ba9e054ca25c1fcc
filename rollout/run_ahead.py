"""The step after one whose results are not there yet, where it follows from what is known: each request that samples
gets one more token, which its device has already.

    step k      launched ----------- results -> requests
    step k + 1         planned here, launched ----------- results

A request that turns out to have ended with step k has a row in step k + 1 all the same; its result is dropped, and
what the row wrote lies behind all that the request has published. Everything else waits for the results: requests that
come, chunks, penalties and minimum lengths (their rows depend on the tokens themselves), and a pool that runs dry.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.ops import SamplingBatch, StepInputs
from zerokl.rollout.request import Request
from zerokl.rollout.step_order import StepOrder
from zerokl.rollout.step_plan import PlanEntry, StepPlan

Ints = NDArray[np.int32]


class Following(NamedTuple):
    """What follows a step on its one rank."""

    entries: tuple[PlanEntry, ...]
    grown: list[Request]
    """Each needs one more block."""


def follow(
    plan: StepPlan,
    requests: Mapping[str, Request],
    left: Collection[str],
    num_running: int,
    num_free_blocks: int,
    block_size: int,
) -> Following | None:
    """The entries after those of `plan`, of one rank, for the requests that it moves forward: not those in `left`.

    None where the results are needed first, where others than these run, or nobody goes on.
    """
    entries: list[PlanEntry] = []
    num_moved = 0
    grown: list[Request] = []
    for entry in plan.ranks[0].entries:
        if entry.request_id in left:
            continue  # its result will be dropped
        request = requests[entry.request_id]
        num_moved += 1
        if not entry.num_rows or not _draws_freely(request):
            return None
        start = entry.start + entry.num_tokens
        if start + 1 >= request.max_num_tokens:
            continue  # the token under way is its last
        entries.append(PlanEntry(entry.request_id, start, 1, 1))
        if start + 1 > request.num_blocks * block_size:
            grown.append(request)
    if not entries or num_moved < num_running or len(grown) > num_free_blocks:
        return None
    return Following(tuple(entries), grown)


def _draws_freely(request: Request) -> bool:
    """Whether the next row needs no more of the tokens before it than their keys and values."""
    return request.kind == "generate" and request.sampling.history is None and not request.sampling.uses_bias


def order_ahead(
    before: StepOrder, before_plan: StepPlan, plan: StepPlan, requests: Mapping[str, Request], block_size: int
) -> StepOrder:
    """What the rank is told of `plan`, which follows `before_plan`; `before` is what it was told of that.

    Each token is that of a row of the step before (`StepInputs.token_rows`).
    """
    old = before.inputs
    sources = {entry.request_id: index for index, entry in enumerate(before_plan.ranks[0].entries)}
    entries = plan.ranks[0].entries
    index = np.array([sources[entry.request_id] for entry in entries], np.int32)
    num_rows = np.array([entry.num_rows for entry in before_plan.ranks[0].entries], np.int32)
    rows = (np.cumsum(num_rows, dtype=np.int32) - num_rows)[index]
    positions = np.array([entry.start for entry in entries], np.int32)
    tables = _grown_tables(old, index, entries, requests)
    count = np.arange(len(entries), dtype=np.int32)
    return StepOrder(
        inputs=StepInputs(
            token_ids=np.zeros(len(entries), np.int32),
            positions=positions,
            slot_mapping=tables[count, positions // block_size] * block_size + positions % block_size,
            seq_starts=np.arange(len(entries) + 1, dtype=np.int32),
            context_lens=positions + 1,
            block_tables=tables,
            logit_rows=count,
            sampling=_sampling(old.sampling, rows, positions),
            step=plan.step,
            policy=plan.policy,
            token_rows=rows,
        )
    )


def _grown_tables(
    old: StepInputs, index: Ints, entries: tuple[PlanEntry, ...], requests: Mapping[str, Request]
) -> Ints:
    """The block tables of the step before, with the blocks that were added since."""
    tables: Ints = old.block_tables[index]
    known = (tables >= 0).sum(axis=1)
    sizes = np.array([requests[entry.request_id].num_blocks for entry in entries])
    widest = int(sizes.max())
    if widest > tables.shape[1]:
        tables = np.pad(tables, ((0, 0), (0, widest - tables.shape[1])), constant_values=-1)
    for row in np.flatnonzero(sizes > known).tolist():
        request = requests[entries[row].request_id]
        tables[row, : request.num_blocks] = request.block_table[: request.num_blocks]
    return tables


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
