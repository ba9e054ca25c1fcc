"""From a `StepPlan` to the arrays that each rank's worker needs: vectorised, a few array operations per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.ops import SamplingBatch, StepInputs
from zerokl.rollout.request import Request
from zerokl.rollout.sampling_state import TokenHistory
from zerokl.rollout.step_order import BlockMove, StepOrder
from zerokl.rollout.step_plan import PlanEntry, RankPlan, StepPlan

Ints = NDArray[np.int32]
_PLACE = np.int32(-1)
_Rows = tuple[int, PlanEntry, Request]
"""An entry that gives rows, after the first one's number in its rank's result."""


def build_step_orders(plan: StepPlan, requests: Mapping[str, Request], block_size: int) -> list[StepOrder]:
    """What each rank is told, in order of ranks; see `StepOrder`.

    `requests` holds at least the requests of the plan, unchanged since it was made. Changes nothing.
    """
    sends = [(move.source, move.target, move.source_blocks) for move in plan.handovers]
    receives = [(move.target, move.source, move.target_blocks) for move in plan.handovers]
    return [
        StepOrder(
            inputs=rank_inputs(plan, rank_plan, requests, block_size),
            sends=_moves(sends, rank_plan.rank),
            receives=_moves(receives, rank_plan.rank),
            has_moves=any(move.source_blocks for move in plan.handovers),
        )
        for rank_plan in plan.ranks
    ]


def _moves(ends: Sequence[tuple[int, int, tuple[int, ...]]], rank: int) -> tuple[BlockMove, ...]:
    """Of (rank, peer, blocks) of all handovers those of one rank, by peer; both ends list them in one order."""
    blocks: dict[int, list[int]] = {}
    for own, peer, moved in ends:
        if own == rank and moved:
            blocks.setdefault(peer, []).extend(moved)
    return tuple(BlockMove(peer=peer, blocks=np.array(blocks[peer], np.int32)) for peer in sorted(blocks))


def rank_inputs(plan: StepPlan, rank_plan: RankPlan, requests: Mapping[str, Request], block_size: int) -> StepInputs:
    """A rank's arrays for its T tokens, S sequences (one per entry, in order) and R rows; all empty for a dummy.

    A token that only the device has yet stands as 0. A history that lacks it ends with a place for it, whose count is
    to say which row draws it (`SamplingBatch.history_token`).
    """
    entries = rank_plan.entries
    members = [requests[entry.request_id] for entry in entries]
    columns = np.array([entry[1:] for entry in entries], np.int32).reshape(-1, 3)
    starts, lengths, row_counts = columns[:, 0], columns[:, 1], columns[:, 2]
    seq_starts = _offsets(lengths)
    # Tokens of one sequence count up from its start: repeat (start - offset) and add the running index.
    positions = np.repeat(starts - seq_starts[:-1], lengths) + np.arange(rank_plan.num_tokens, dtype=np.int32)
    block_tables = _block_tables(members)
    sequence = np.repeat(np.arange(len(entries)), lengths)
    slots = block_tables[sequence, positions // block_size] * block_size + positions % block_size
    # Published blocks are read only: what is computed again there, for its row, is there already.
    published = np.array([request.num_published_blocks for request in members], np.int32) * block_size
    slots[positions < published[sequence]] = -1
    # The rows of an entry are its last ones: count up to the end of its tokens.
    row_starts = _offsets(row_counts)
    logit_rows = np.repeat(seq_starts[1:] - row_starts[1:], row_counts) + np.arange(rank_plan.num_rows, dtype=np.int32)
    spans = [_tokens(entry, request) for entry, request in zip(entries, members, strict=True)]
    return StepInputs(
        token_ids=_joined(spans, np.int32),
        positions=positions,
        slot_mapping=slots,
        seq_starts=seq_starts,
        context_lens=starts + lengths,
        block_tables=block_tables,
        logit_rows=logit_rows,
        sampling=_sampling_batch(entries, members, row_starts, positions[logit_rows]),
        step=plan.step,
        policy=plan.policy,
    )


def is_under_way(entry: PlanEntry, request: Request) -> bool:
    """Whether the entry's token is drawn by the step before, whose results are not in."""
    return entry.start == request.num_tokens


def _tokens(entry: PlanEntry, request: Request) -> Ints:
    if is_under_way(entry, request):
        return np.zeros(1, np.int32)
    return request.token_ids[entry.start : entry.start + entry.num_tokens]


def _first_output(entry: PlanEntry, request: Request) -> int:
    """Number of the output token, from 0, that the entry's first row gives."""
    return entry.start + entry.num_tokens - entry.num_rows + 1 - request.num_prompt_tokens


def _block_tables(members: Sequence[Request]) -> Ints:
    tables = np.full((len(members), max((request.num_blocks for request in members), default=1)), -1, np.int32)
    for table, request in zip(tables, members, strict=True):
        table[: request.num_blocks] = request.block_table[: request.num_blocks]
    return tables


def _sampling_batch(
    entries: Sequence[PlanEntry], members: Sequence[Request], row_starts: Ints, row_positions: Ints
) -> SamplingBatch:
    all_rows = zip(row_starts.tolist(), entries, members, strict=False)
    wanted = [rows for rows in all_rows if rows[1].num_rows]
    counts = [entry.num_rows for _, entry, _ in wanted]
    constants = list(zip(*(request.sampling.constants for _, _, request in wanted), strict=True)) or [()] * 9

    def column(index: int, dtype: Any) -> NDArray[Any]:
        return np.repeat(np.array(constants[index], dtype), counts)

    history_start, history_token, history_count = _histories(wanted, len(row_positions))
    bias_start, bias_token, bias_value = _biases(wanted, len(row_positions))
    return SamplingBatch(
        temperature=column(0, np.float32),
        top_k=column(1, np.int32),
        top_p=column(2, np.float32),
        min_p=column(3, np.float32),
        repetition_penalty=column(4, np.float32),
        presence_penalty=column(5, np.float32),
        frequency_penalty=column(6, np.float32),
        seed=column(7, np.uint64),
        sample_index=column(8, np.uint32),
        position=(row_positions + 1).astype(np.uint32),
        forced=_forced(wanted, len(row_positions)),
        history_start=history_start,
        history_token=history_token,
        history_count=history_count,
        bias_start=bias_start,
        bias_token=bias_token,
        bias_value=bias_value,
        want_raw=any(request.sampling.want_raw for _, _, request in wanted),
    )


def _forced(wanted: Sequence[_Rows], num_rows: int) -> Ints:
    """A score request's rows rate the tokens after them; the others draw."""
    forced = np.full(num_rows, -1, np.int32)
    for first_row, entry, request in wanted:
        if request.kind == "score":
            end = entry.start + entry.num_tokens + 1
            forced[first_row : first_row + entry.num_rows] = request.token_ids[end - entry.num_rows : end]
    return forced


def _histories(wanted: Sequence[_Rows], num_rows: int) -> tuple[Ints, Ints, Ints]:
    """Offsets, tokens and counts: for each row of a request with penalties, what comes before the token it gives."""
    sizes = np.zeros(num_rows, np.int32)
    tokens: list[Ints] = []
    counts: list[Ints] = []
    for first_row, entry, request in wanted:
        history = request.sampling.history
        if history is None:
            continue
        for row, (row_tokens, row_counts) in enumerate(_row_histories(entry, request, history), first_row):
            sizes[row] = len(row_tokens)
            tokens.append(row_tokens)
            counts.append(row_counts)
    return _offsets(sizes), _joined(tokens, np.int32), _joined(counts, np.int32)


def _row_histories(entry: PlanEntry, request: Request, history: TokenHistory) -> list[tuple[Ints, Ints]]:
    if is_under_way(entry, request):
        tokens, counts = history.arrays()
        return [(np.append(tokens, _PLACE), np.append(counts, _PLACE))]
    first = request.num_prompt_tokens + _first_output(entry, request)
    begin = request.num_prompt_tokens + request.num_output_tokens
    if first == begin and entry.num_rows == 1:
        return [history.arrays()]
    # Scoring: each row has seen one forced token more than the row before; results of earlier ones may not be in.
    ahead, rows = history.copy(), []
    for position in range(begin, first + entry.num_rows):
        if position >= first:
            rows.append(ahead.arrays())
        ahead.append(int(request.token_ids[position]))
    return rows


def _biases(wanted: Sequence[_Rows], num_rows: int) -> tuple[Ints, Ints, NDArray[np.float32]]:
    sizes = np.zeros(num_rows, np.int32)
    tokens: list[Ints] = []
    values: list[NDArray[np.float32]] = []
    for first_row, entry, request in wanted:
        if not request.sampling.uses_bias:
            continue
        first_output = _first_output(entry, request)
        for offset in range(entry.num_rows):
            row_tokens, row_values = request.sampling.bias(first_output + offset)
            sizes[first_row + offset] = len(row_tokens)
            tokens.append(row_tokens)
            values.append(row_values)
    return _offsets(sizes), _joined(tokens, np.int32), _joined(values, np.float32)


def joined(first: StepInputs, second: StepInputs) -> StepInputs:
    """The sequences of two parts of a step in one; both say of each token whether it is under way (`token_rows`)."""
    assert first.token_rows is not None and second.token_rows is not None
    width = max(first.block_tables.shape[1], second.block_tables.shape[1])
    tables = [
        np.pad(part.block_tables, ((0, 0), (0, width - part.block_tables.shape[1])), constant_values=-1)
        for part in (first, second)
    ]
    return replace(
        first,
        token_ids=np.concatenate([first.token_ids, second.token_ids]),
        positions=np.concatenate([first.positions, second.positions]),
        slot_mapping=np.concatenate([first.slot_mapping, second.slot_mapping]),
        seq_starts=_joined_offsets(first.seq_starts, second.seq_starts),
        context_lens=np.concatenate([first.context_lens, second.context_lens]),
        block_tables=np.concatenate(tables),
        logit_rows=np.concatenate([first.logit_rows, second.logit_rows + first.seq_starts[-1]]),
        sampling=_joined_sampling(first.sampling, second.sampling),
        token_rows=np.concatenate([first.token_rows, second.token_rows]),
    )


def _joined_sampling(first: SamplingBatch, second: SamplingBatch) -> SamplingBatch:
    """All arrays one after the other, offsets counted on."""
    arrays: dict[str, Any] = {}
    for field in fields(SamplingBatch):
        parts = getattr(first, field.name), getattr(second, field.name)
        if field.name.endswith("_start"):
            arrays[field.name] = _joined_offsets(*parts)
        elif field.name != "want_raw":
            arrays[field.name] = np.concatenate(parts)
    return SamplingBatch(**arrays, want_raw=first.want_raw or second.want_raw)


def _joined_offsets(first: Ints, second: Ints) -> Ints:
    return np.concatenate([first, second[1:] + first[-1]])


def _offsets(sizes: Ints) -> Ints:
    offsets = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def _joined(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
