# mypy: ignore-errors
# Kernel functions are Triton's language in Python's syntax: types do not apply.
"""Copies of many tensors in one launch, and the checksums of what came of them.

The checksum of a tensor is a sum of 64-bit integers over its words (`zerokl.weight_sync.device_checksums` defines it),
added up by atomics: integer addition has no order. `zerokl.kernels.gpu.copy_plan` makes the tables.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zerokl.kernels.gpu.copy_plan import JOB_COLUMNS, PIECE_WORDS, Variant

_BLOCK = 2048
"""Words of a program at a time."""
_COLUMNS = tl.constexpr(JOB_COLUMNS)


@triton.jit
def mix(x):
    """The finaliser of SplitMix64, of uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def numbered(words, number):
    """What a word (uint64) adds to its tensor's checksum, being number `number` (int64)."""
    return mix(words + (number.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15)


@triton.jit
def add_up(sums, broken, number, terms, bad):
    """Add a program's terms (uint64) to the checksum of tensor `number`, and note whether anything in it was bad."""
    sums = sums.to(tl.pointer_type(tl.int64))
    broken = broken.to(tl.pointer_type(tl.int32))
    tl.atomic_add(sums + number, tl.sum(terms.to(tl.int64, bitcast=True)), sem="relaxed")
    count = tl.sum((bad != 0).to(tl.int32))
    tl.atomic_add(broken + number, count, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["jobs", "pieces", "sums", "broken", "first"])
def words_kernel(
    jobs, pieces, sums, broken, first,
    WRITE: tl.constexpr, HASH: tl.constexpr, LINE: tl.constexpr, LINES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One piece of tensors whose rows are whole multiples of 16 bytes. Tables and results are given by address.

    A tensor is a sequence of lines of LINE words; a row has some of them.
    """
    piece = pieces.to(tl.pointer_type(tl.int32)) + (first + tl.program_id(0)) * 2
    job = jobs.to(tl.pointer_type(tl.int64)) + tl.load(piece).to(tl.int64) * _COLUMNS
    read = tl.multiple_of(tl.load(job).to(tl.pointer_type(tl.int64)), 16)
    write = tl.multiple_of(tl.load(job + 2).to(tl.pointer_type(tl.int64)), 16)
    read_stride, write_stride = tl.multiple_of(tl.load(job + 1), 2), tl.multiple_of(tl.load(job + 3), 2)
    per_row = tl.load(job + 4).to(tl.int32)
    num_words = tl.multiple_of(tl.load(job + 5), 2)
    exponent, carry, sign = tl.load(job + 7), tl.load(job + 8), tl.load(job + 9)
    start = tl.load(piece + 1)
    column = tl.arange(0, LINE)
    terms = tl.zeros((LINES, LINE), tl.uint64)
    bad = tl.zeros((LINES, LINE), tl.int64)
    for step in range(STEPS):
        line = start + step * LINES + tl.arange(0, LINES)
        row, rest = (line // per_row).to(tl.int64), (line % per_row).to(tl.int64) * LINE
        word = line.to(tl.int64)[:, None] * LINE + column[None, :]
        inside = word < num_words
        x = tl.load(read + (row * read_stride + rest)[:, None] + column[None, :], mask=inside, other=0)
        if WRITE:
            tl.store(write + (row * write_stride + rest)[:, None] + column[None, :], x, mask=inside)
        if HASH:
            terms += tl.where(inside, numbered(x.to(tl.uint64, bitcast=True), word), 0)
            bad |= ((x & exponent) + carry) & sign
    if HASH:
        add_up(sums, broken, tl.load(job + 6), terms, bad)


@triton.jit(do_not_specialize=["jobs", "pieces", "sums", "broken", "first"])
def elements_kernel(
    jobs, pieces, sums, broken, first,
    READ: tl.constexpr, WRITE: tl.constexpr, HASHED: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One piece of any tensors: elements of READ bytes are stored as ones of WRITE bytes (0: not) and hashed as ones of
    HASHED bytes (0: not), LANES of which are a word: bfloat16 has 2 bytes, float32 4.
    """
    piece = pieces.to(tl.pointer_type(tl.int32)) + (first + tl.program_id(0)) * 2
    job = jobs.to(tl.pointer_type(tl.int64)) + tl.load(piece).to(tl.int64) * _COLUMNS
    read = tl.load(job).to(tl.pointer_type(tl.uint16 if READ == 2 else tl.uint32))
    write = tl.load(job + 2).to(tl.pointer_type(tl.uint16 if WRITE == 2 else tl.uint32))
    read_stride, write_stride = tl.load(job + 1), tl.load(job + 3)
    per_row, num_words = tl.load(job + 4).to(tl.int32), tl.load(job + 5).to(tl.int32)
    columns = tl.load(job + 7)
    exponent: tl.constexpr = 0x7F80 if READ == 2 else 0x7F800000
    lane = tl.arange(0, LANES)
    terms = tl.zeros((BLOCK,), tl.uint64)
    bad = tl.zeros((BLOCK, LANES), tl.int32)
    start = tl.load(piece + 1)
    for step in range(STEPS):
        word = start + step * BLOCK + tl.arange(0, BLOCK)
        row = (word // per_row).to(tl.int64)
        column = ((word % per_row).to(tl.int64) * LANES)[:, None] + lane[None, :]
        inside = (word < num_words)[:, None] & (column < columns)
        x = tl.load(read + (row * read_stride)[:, None] + column, mask=inside, other=0).to(tl.uint32)
        if WRITE:
            y = x
            if READ == 2 and WRITE == 4:
                y = x << 16
            if READ == 4 and WRITE == 2:
                y = (x + 0x7FFF + ((x >> 16) & 1)) >> 16
            tl.store(write + (row * write_stride)[:, None] + column, y.to(write.dtype.element_ty), mask=inside)
        if HASHED:
            part = x >> 16 if READ == 4 and HASHED == 2 else x
            whole = tl.sum((part.to(tl.uint64) << (lane * (64 // LANES)).to(tl.uint64)[None, :]).to(tl.int64), axis=1)
            terms += tl.where(word < num_words, numbered(whole.to(tl.uint64, bitcast=True), word), 0)
            bad |= ((x & exponent) == exponent).to(tl.int32)
    if HASHED:
        add_up(sums, broken, tl.load(job + 6), terms, bad)


def launch(
    variant: Variant, first: int, count: int, jobs: int, pieces: int, sums: int, broken: int,
    *, reads_target: bool, writes: bool, hashes: bool,
) -> None:  # fmt: skip
    """Launch pieces `first` to `first + count` of a group. Tables jobs (int64) and pieces (int32) and the results, sums
    (int64) and broken (int32) by number of the placement, both added to, are given by their addresses.

    With `reads_target` the jobs are those that check: what is read are elements of the target, hashed as the source's.
    """
    tables = (jobs, pieces, sums, broken, first)
    if variant.line:
        words_kernel[(count,)](
            *tables, WRITE=writes, HASH=hashes, LINE=variant.line, LINES=_BLOCK // variant.line,
            STEPS=PIECE_WORDS // _BLOCK, num_warps=8,
        )  # fmt: skip
        return
    hashed = variant.size if hashes else 0
    elements_kernel[(count,)](
        *tables, READ=variant.target_size if reads_target else variant.size,
        WRITE=variant.target_size if writes else 0, HASHED=hashed, LANES=8 // variant.size,
        BLOCK=_BLOCK // 2, STEPS=2 * PIECE_WORDS // _BLOCK, num_warps=8,
    )  # fmt: skip
