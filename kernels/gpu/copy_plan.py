"""How placements of tensors become launches: tables of tensors and of equal pieces, so that one launch does many.

A launch is given a table of jobs (int64, a row for each tensor: where to read, where to write, how rows lie) and one of
pieces (int32: job, where it begins), one program each. Tensors are grouped by what the kernels must know at compile
time. `zerokl.kernels.gpu.copies` has the kernels; here are no kernels and no device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.device_tensors import Placement

Ints = NDArray[np.int64]

SIZES = {"bfloat16": 2, "float32": 4}
JOB_COLUMNS = 10
"""read, read stride, write, write stride, units per row, words, number of the placement; of words also the three masks
that tell a NaN or an infinity, of elements the columns. Strides are in words or elements."""
PIECE_WORDS = 1 << 13
"""Words of 8 bytes that a program reads."""
LINE_WORDS = 256
"""Words of a line at most: what neighbouring threads read together."""

_FLAT = 2**31 - 1
_MASKS = {
    "bfloat16": (0x7F807F807F807F80, 0x0080008000800080, 0x8000800080008000),
    "float32": (0x7F8000007F800000, 0x0080000000800000, 0x8000000080000000),
}
"""Exponent bits of a word's elements; what carries an exponent of ones into the sign's place; that place."""


class Variant(NamedTuple):
    """What a group's kernel is compiled for."""

    line: int
    """Words per line; 0: elements one by one, for types that change and rows that are no whole 16 bytes."""
    size: int
    """Bytes of an element of the source."""
    target_size: int
    """Bytes of one where it goes."""


class Tables(NamedTuple):
    """Where the tables of a group begin, and its number of pieces."""

    copy_jobs: int
    check_jobs: int
    pieces: int
    num_pieces: int

    def at(self, address: int) -> Tables:
        """Those counted from an address, as addresses."""
        return Tables(address + self.copy_jobs, address + self.check_jobs, address + self.pieces, self.num_pieces)


@dataclass(frozen=True, slots=True)
class Group:
    """Placements of one variant."""

    variant: Variant
    copy_jobs: Ints
    """[n, JOB_COLUMNS]: from source to target."""
    check_jobs: Ints
    """[n, JOB_COLUMNS]: the target alone, to read."""
    extents: tuple[int, ...]
    """Of each job, the lines (of elements: words) that it has."""

    @property
    def can_check(self) -> bool:
        """Whether a target still tells the bits of its source; otherwise these are hashed on the way."""
        return self.variant.size <= self.variant.target_size

    def pieces(self) -> NDArray[np.int32]:
        """[m, 2]: job and first line (of elements: first word)."""
        step = self.piece_extent
        counts = np.array([-(-extent // step) for extent in self.extents], np.int64)
        jobs = np.repeat(np.arange(len(counts)), counts)
        starts = (np.arange(len(jobs)) - np.repeat(np.cumsum(counts) - counts, counts)) * step
        return np.stack([jobs, starts], axis=1).astype(np.int32)

    @property
    def piece_extent(self) -> int:
        """Lines (of elements: words) of a piece."""
        return PIECE_WORDS // max(1, self.variant.line)


class CopyPlan:
    """Placements that are made ready once and carried out any number of times. Each is equal to itself alone."""

    def __init__(self, placements: Sequence[Placement], *, copies: bool = True) -> None:
        """Without `copies` the sources are read, and nothing is written."""
        self.placements = tuple(placements)
        self.copies = copies

    @staticmethod
    def of_tensors(tensors: Sequence[tuple[int, int, int, str]], targets: Sequence[int] | None = None) -> CopyPlan:
        """Tensors, by address, rows, columns and type, that are read or, with `targets`, copied to other addresses."""
        places = [tensor[0] for tensor in tensors] if targets is None else targets
        placements = [Placement(*one, at, one[3], one[2]) for one, at in zip(tensors, places, strict=True)]
        return CopyPlan(placements, copies=targets is not None)

    @cached_property
    def num_bytes(self) -> int:
        """That are read."""
        return sum(one.rows * one.columns * SIZES[one.dtype] for one in self.placements)

    @cached_property
    def groups(self) -> list[Group]:
        """`plan_groups` of the placements."""
        return plan_groups(self.placements)

    def tables(self) -> tuple[NDArray[np.uint8], list[Tables]]:
        """All tables as bytes of one array, and where in it, at multiples of 8, those of each group are."""
        parts, found, size = [], [], 0
        for group in self.groups:
            pieces = group.pieces()
            starts = list(accumulate((group.copy_jobs.nbytes, group.check_jobs.nbytes, pieces.nbytes), initial=size))
            found.append(Tables(starts[0], starts[1], starts[2], len(pieces)))
            size = starts[3]
            parts += [part.reshape(-1).view(np.uint8) for part in (group.copy_jobs, group.check_jobs, pieces)]
        return np.concatenate(parts), found


def buckets(num_pieces: int, bucket_bytes: int) -> Iterator[tuple[int, int]]:
    """First piece and number of pieces of one launch after the other."""
    step = max(1, bucket_bytes // (8 * PIECE_WORDS))
    for first in range(0, num_pieces, step):
        yield first, min(step, num_pieces - first)


def plan_groups(placements: Sequence[Placement]) -> list[Group]:
    """The placements by variant; jobs name a placement by its number. Empty tensors are in no group."""
    numbers: dict[Variant, list[int]] = {}
    for number, placement in enumerate(placements):
        if placement.rows and placement.columns:
            numbers.setdefault(_variant(placement), []).append(number)
    return [_group(variant, [(n, placements[n]) for n in some]) for variant, some in numbers.items()]


def _variant(placement: Placement) -> Variant:
    size, target_size = SIZES[placement.dtype], SIZES[placement.target_dtype]
    row, stride = placement.columns * size, placement.stride * target_size
    if size != target_size or (placement.source | placement.target | row | stride) % 16:
        return Variant(0, size, target_size)
    return Variant(LINE_WORDS if _is_flat(placement) else min(LINE_WORDS, row // 8 & -(row // 8)), size, target_size)


def _is_flat(placement: Placement) -> bool:
    return placement.rows == 1 or placement.stride == placement.columns


def _group(variant: Variant, members: list[tuple[int, Placement]]) -> Group:
    row_of = _row_of_words if variant.line else _row_of_elements
    rows = [row_of(variant, number, placement) for number, placement in members]
    copy_jobs = np.array(rows, np.uint64).astype(np.int64)
    check_jobs = copy_jobs.copy()
    check_jobs[:, :2] = copy_jobs[:, 2:4]
    words = copy_jobs[:, 5]
    extents = -(-words // variant.line) if variant.line else words
    assert extents.max() < 2**31, "a tensor of too many words"
    return Group(variant, copy_jobs, check_jobs, tuple(extents.tolist()))


def _row_of_words(variant: Variant, number: int, placement: Placement) -> tuple[int, ...]:
    row = placement.columns * variant.size // 8
    if _is_flat(placement):
        geometry = placement.source, 0, placement.target, 0, _FLAT
    else:
        stride = placement.stride * variant.size // 8
        geometry = placement.source, row, placement.target, stride, row // variant.line
    return (*geometry, placement.rows * row, number, *_MASKS[placement.dtype])


def _row_of_elements(variant: Variant, number: int, placement: Placement) -> tuple[int, ...]:
    row = -(-placement.columns * variant.size // 8)
    geometry = placement.source, placement.columns, placement.target, placement.stride, row
    return (*geometry, placement.rows * row, number, placement.columns, 0, 0)
