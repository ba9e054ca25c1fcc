"""A step's metadata and sampling options as one int32 array for the device, in a layout that a bucket of sizes fixes.

Sizes are rounded up to those of buckets, so that few layouts occur and a recorded step can be replayed for every step
of its bucket. Padding is inert: tokens of no sequence with slot -1, rows of no interest, empty histories.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.gpu import sampling as columns
from zerokl.kernels.ops import SamplingBatch, StepInputs

Ints = NDArray[np.int32]

_ALIGN = 64  # entries between sections: Triton compiles apart what is not aligned to 16 bytes


_FINE = 512  # up to here buckets are powers of two, beyond it multiples of it: padding costs more than a layout


def bucket(count: int, least: int = 16) -> int:
    """The next power of two, at least `least`; beyond 512 the next multiple of 512."""
    return -(-count // _FINE) * _FINE if count > _FINE else power_bucket(count, least)


def power_bucket(count: int, least: int = 16) -> int:
    """The next power of two, at least `least`: for lists whose length may change with every step."""
    return max(least, 1 << (count - 1).bit_length() if count > 1 else 1)


def _table_bucket(blocks: int) -> int:
    """Entries of a block table: 8, 32, 128, ... Wide tables cost a copy, many widths a recorded step each."""
    width = 8
    while width < blocks:
        width *= 4
    return width


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLayout:
    """One flat array and where its sections lie."""

    flat: Ints
    sections: dict[str, slice]
    num_tokens: int
    """Of the bucket, padding included."""
    num_rows: int
    """Of the bucket, padding included."""
    max_blocks: int

    def num_entries(self, section: str) -> int:
        """Entries of a section, 0 if the step has none of that name."""
        here = self.sections.get(section, slice(0, 0))
        return int(here.stop - here.start)

    def key(self) -> tuple[Any, ...]:
        """Equal for the steps of a bucket, whose launches have equal sizes: one section may be many narrow tables or
        few wide ones.
        """
        ends = tuple((name, section.stop) for name, section in self.sections.items())
        return self.num_tokens, self.num_rows, self.max_blocks, ends


def lay_out(inputs: StepInputs, **lists: Ints) -> StepLayout:
    """The flat array of a step.

    Sections are token_ids, token_rows (see `StepInputs`), positions, slots, sequences (of each token, -1 for none),
    tables, rows, options, the history and bias entries of the rows, routing and routing_weights (by their bits), both
    [M, T, k], where they are given, and `lists`, each [n, columns] padded by zeros; an empty one has no section.
    """
    tokens, rows = bucket(len(inputs.token_ids)), bucket(len(inputs.logit_rows))
    counts = np.diff(inputs.seq_starts)
    max_blocks = _table_bucket(inputs.block_tables.shape[1])
    tables = np.full((bucket(len(counts)), max_blocks), -1, np.int32)
    tables[: len(counts), : inputs.block_tables.shape[1]] = inputs.block_tables
    sections = {
        "token_ids": _padded(inputs.token_ids, tokens, 0),
        "token_rows": _padded(_none(tokens) if inputs.token_rows is None else inputs.token_rows, tokens, -1),
        "positions": _padded(inputs.positions, tokens, 0),
        "slots": _padded(inputs.slot_mapping, tokens, -1),
        "sequences": _padded(np.repeat(np.arange(len(counts)), counts), tokens, -1),
        "tables": tables,
        "rows": _padded(inputs.logit_rows, rows, 0),
        **sampling_sections(inputs.sampling, rows),
        **{name: _padded_rows(values, power_bucket(len(values))) for name, values in lists.items() if len(values)},
    }
    if inputs.routing is not None:
        sections["routing"] = np.stack([_padded_rows(ids, tokens) for ids in inputs.routing])
    if inputs.routing_weights is not None:
        bits = inputs.routing_weights.view(np.int32)
        sections["routing_weights"] = np.stack([_padded_rows(weights, tokens) for weights in bits])
    flat, slices = _join(sections)
    return StepLayout(flat=flat, sections=slices, num_tokens=tokens, num_rows=rows, max_blocks=max_blocks)


def sampling_options(batch: SamplingBatch, rows: int) -> Ints:
    """Options [rows, NUM_OPTIONS] in the columns of `zerokl.kernels.gpu.sampling`, rows past the batch zeros."""
    options = np.zeros((rows, int(columns.NUM_OPTIONS)), np.int32)
    used = options[: len(batch.forced)]
    for column, values in (
        (columns.TEMPERATURE, batch.temperature),
        (columns.TOP_P, batch.top_p),
        (columns.MIN_P, batch.min_p),
        (columns.REPETITION, batch.repetition_penalty),
        (columns.PRESENCE, batch.presence_penalty),
        (columns.FREQUENCY, batch.frequency_penalty),
        (columns.SAMPLE_INDEX, batch.sample_index),
        (columns.POSITION, batch.position),
        (columns.TOP_K, batch.top_k),
        (columns.FORCED, batch.forced),
    ):
        used[:, int(column)] = values.view(np.int32)
    used[:, int(columns.SEED_LOW)] = (batch.seed & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32)
    used[:, int(columns.SEED_HIGH)] = (batch.seed >> np.uint64(32)).astype(np.uint32).view(np.int32)
    return options


def sampling_sections(batch: SamplingBatch, rows: int) -> dict[str, NDArray[Any]]:
    """The sections of `lay_out` that sampling reads, for `rows` rows of which the batch may have fewer."""
    history, bias = power_bucket(len(batch.history_token)), power_bucket(len(batch.bias_token))
    return {
        "options": sampling_options(batch, rows),
        "history_start": _padded(batch.history_start, rows + 1, len(batch.history_token)),
        "history_token": _padded(batch.history_token, history, 0),
        "history_count": _padded(batch.history_count, history, 0),
        "bias_start": _padded(batch.bias_start, rows + 1, len(batch.bias_token)),
        "bias_token": _padded(batch.bias_token, bias, 0),
        "bias_value": _padded(batch.bias_value.view(np.int32), bias, 0),
    }


def _none(count: int) -> Ints:
    return np.full(count, -1, np.int32)


def _padded(values: NDArray[Any], length: int, fill: int) -> Ints:
    if len(values) == length and values.dtype == np.int32:
        return values  # read only: `_join` copies it
    out = np.full(length, fill, np.int32)
    out[: len(values)] = values
    return out


def _padded_rows(values: NDArray[Any], rows: int) -> Ints:
    if len(values) == rows and values.dtype == np.int32:
        return values
    out = np.zeros((rows, *values.shape[1:]), np.int32)
    out[: len(values)] = values
    return out


def _join(arrays: dict[str, NDArray[Any]]) -> tuple[Ints, dict[str, slice]]:
    slices, end = {}, 0
    for name, array in arrays.items():
        slices[name] = slice(end, end + array.size)
        end += -(-array.size // _ALIGN) * _ALIGN
    flat = np.zeros(end, np.int32)
    for name, array in arrays.items():
        flat[slices[name]] = array.reshape(-1)
    return flat, slices
