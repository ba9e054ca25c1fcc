"""Tables of copies: every word of every tensor is in one piece, and goes where the placement says."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from zerokl.kernels.device_tensors import Placement
from zerokl.kernels.gpu.copy_plan import JOB_COLUMNS, PIECE_WORDS, SIZES, CopyPlan, Group, buckets, plan_groups

DTYPES = st.sampled_from(["bfloat16", "float32"])


@st.composite
def placements(draw: st.DrawFn) -> list[Placement]:
    made, address = [], 1 << 20
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(st.sampled_from([0, 1, 2, 37]))
        columns = draw(st.one_of(st.integers(0, 70), st.sampled_from([128, 768, 40_000])))
        dtype, target_dtype = draw(DTYPES), draw(DTYPES)
        stride = draw(st.sampled_from([columns, 2 * columns, columns + 3]))
        source, address = address + draw(st.sampled_from([0, 0, 4])), address + (1 << 24)
        made.append(Placement(source, rows, columns, dtype, address, target_dtype, stride))
        address += 1 << 24
    return made


def reads(group: Group, jobs: np.ndarray, job: int, unit: int) -> Iterator[tuple[int, int]]:
    """First and end address of what the kernels read and hash of one line, or of one word, of a job."""
    row = jobs[job]
    if group.variant.line:
        line = group.variant.line
        at = row[0] + 8 * (unit // row[4] * row[1] + unit % row[4] * line)
        yield at, at + 8 * min(line, row[5] - unit * line)
    else:
        size = group.variant.size
        lanes = 8 // size
        first = unit % row[4] * lanes
        at = row[0] + size * (unit // row[4] * row[1] + first)
        yield at, at + size * min(lanes, row[7] - first)


@settings(deadline=None, max_examples=60)
@given(placements())
def test_every_element_is_read_once_and_in_order(given_ones: list[Placement]) -> None:
    seen: set[int] = set()
    for group in plan_groups(given_ones):
        pieces = group.pieces()
        covered = [np.zeros(extent, np.int64) for extent in group.extents]
        for job, first in pieces.tolist():
            covered[job][first : first + group.piece_extent] += 1
        assert all((counts == 1).all() for counts in covered)
        assert sum(count for _, count in buckets(len(pieces), 1 << 18)) == len(pieces)
        for job, extent in enumerate(group.extents):
            number = int(group.copy_jobs[job, 6])
            seen.add(number)
            placement = given_ones[number]
            size = SIZES[placement.dtype]
            at = 0
            for unit in sorted({0, 1, extent // 2, extent - 2, extent - 1} & set(range(extent))):
                ((start, end),) = reads(group, group.copy_jobs, job, unit)
                assert start < end <= placement.source + placement.rows * placement.columns * size
                assert start >= placement.source + at
                at = end - placement.source
            assert at == placement.rows * placement.columns * size
            check, copy = group.check_jobs[job], group.copy_jobs[job]
            assert (check[:4] == copy[[2, 3, 2, 3]]).all() and (check[4:] == copy[4:]).all()
    assert seen == {n for n, placement in enumerate(given_ones) if placement.rows and placement.columns}


def test_matrices_are_copied_in_words_and_what_changes_type_is_not() -> None:
    def line(rows: int, columns: int, dtype: str, target_dtype: str, stride: int, source: int = 256) -> int:
        (group,) = plan_groups([Placement(source, rows, columns, dtype, 1 << 20, target_dtype, stride)])
        assert group.can_check == (dtype == target_dtype or dtype == "bfloat16")
        return group.variant.line

    assert line(4, 1024, "bfloat16", "bfloat16", 1024) == 256
    assert line(4, 1024, "bfloat16", "bfloat16", 2048) == 256
    assert line(4, 896, "bfloat16", "bfloat16", 1792) == 32
    assert line(4, 24, "float32", "float32", 48) == 4
    assert line(1, 128, "float32", "float32", 128) == 256
    assert line(4, 1024, "float32", "bfloat16", 1024) == 0
    assert line(1, 128, "bfloat16", "float32", 128) == 0
    assert line(3, 1023, "bfloat16", "bfloat16", 1023) == 0
    assert line(4, 1024, "bfloat16", "bfloat16", 1024, source=264) == 0


def test_launches_are_as_large_as_buckets() -> None:
    assert list(buckets(10, 8 * PIECE_WORDS * 4)) == [(0, 4), (4, 4), (8, 2)]
    assert list(buckets(2, 1)) == [(0, 1), (1, 1)]
    assert list(buckets(0, 1 << 20)) == []


@settings(deadline=None, max_examples=30)
@given(placements())
def test_tables_lie_one_after_the_other(given_ones: list[Placement]) -> None:
    plan = CopyPlan(given_ones)
    if not plan.groups:
        return
    content, tables = plan.tables()
    end = 0
    for group, there in zip(plan.groups, (one.at(0) for one in tables), strict=True):
        for start, table in zip(there[:3], (group.copy_jobs, group.check_jobs, group.pieces()), strict=True):
            assert start == end and start % 8 == 0
            end = start + table.nbytes
            np.testing.assert_array_equal(content[start:end].view(table.dtype).reshape(table.shape), table)
        assert there.num_pieces == len(group.pieces())
        assert group.copy_jobs.itemsize * JOB_COLUMNS * len(group.extents) == there.check_jobs - there.copy_jobs
    assert end == len(content)
    assert tables[0].at(1 << 40).pieces == tables[0].pieces + (1 << 40)
    assert CopyPlan(given_ones) != plan, "each is equal to itself alone"
