"""Which tile is fastest for each op, number of rows and shape: what the tables of zerokl.kernels.gpu.tiles hold.

python benchmarks/gpu_tiles.py [--ops linear swiglu head attention mixture] [--models A B C] [--rows 16 ... 2048]

Prints the best tiles of each case with their time over the floor. Every tile gives the same bits (tests/gpu).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator

from gpu_attention_cases import CONTEXT, attention_cases
from gpu_cases import MODELS, Case, Shape, head_case, launches, linear_case, mixture_case, swiglu_case
from gpu_timing import PEAK, Bench

from zerokl.kernels.gpu.attention_tiles import SPLIT
from zerokl.kernels.gpu.tiles import Tile

MakeCase = Callable[[Tile], Case]

BY_ROWS = {
    16: [(16, 16, 256, 4, 4), (16, 32, 128, 4, 5), (16, 32, 256, 4, 4), (16, 64, 128, 4, 4), (16, 64, 256, 4, 3),
         (16, 128, 128, 4, 3), (16, 16, 128, 2, 8)],
    32: [(32, 16, 256, 4, 4), (32, 32, 128, 4, 5), (32, 64, 128, 4, 4), (32, 64, 64, 4, 6), (32, 32, 256, 4, 3),
         (16, 64, 128, 4, 4)],
    64: [(64, 16, 128, 4, 4), (64, 32, 128, 4, 4), (64, 64, 64, 4, 5), (64, 64, 128, 4, 4), (64, 32, 128, 4, 4, True),
         (64, 64, 128, 4, 4, True), (64, 128, 128, 4, 3, True), (64, 64, 128, 4, 3, True)],
    128: [(64, 32, 128, 4, 4), (64, 64, 64, 4, 5), (64, 64, 128, 4, 4), (64, 32, 128, 4, 4, True),
          (64, 64, 128, 4, 4, True), (128, 64, 128, 4, 4, True), (128, 64, 64, 8, 4, True), (128, 128, 64, 8, 4, True),
          (128, 64, 128, 8, 3, True), (64, 128, 64, 4, 4, True)],
    256: [(64, 64, 64, 4, 5), (128, 128, 64, 8, 4), (64, 64, 128, 4, 4, True), (128, 64, 128, 4, 4, True),
          (64, 128, 64, 4, 4, True), (64, 128, 64, 4, 6, True), (128, 128, 64, 4, 5, True),
          (64, 128, 128, 4, 3, True), (128, 128, 128, 8, 3, True), (256, 128, 64, 8, 4, True),
          (128, 128, 64, 8, 5, True, True), (128, 256, 64, 8, 4, True), (256, 64, 64, 8, 4, True),
          (128, 64, 128, 8, 3, True),
          (128, 128, 64, 8, 4, True)],
    2048: [(128, 128, 64, 8, 4), (256, 128, 64, 8, 4, True), (128, 128, 64, 8, 4, True), (128, 128, 64, 4, 4, True),
           (128, 256, 64, 8, 4, True), (256, 64, 64, 8, 4, True), (128, 64, 64, 8, 4, True),
           (128, 256, 64, 8, 3, True, True), (128, 128, 64, 8, 5, True, True)],
}  # fmt: skip
ATTENTION = {
    False: [(16, 2, 3), (16, 4, 2), (16, 4, 3), (16, 4, 4), (16, 8, 3)],
    True: [(64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 8, 2), (128, 8, 3), (32, 4, 3)],
}


def candidates(rows: int) -> list[Tile]:
    """Tiles worth a try for `rows` rows."""
    size = next((size for size in BY_ROWS if rows <= size), max(BY_ROWS))
    return [Tile(*fields) for fields in BY_ROWS[size]]


def try_all(bench: Bench, label: str, tiles: Iterable[Tile], make: MakeCase) -> None:
    """One line with the fastest tiles."""
    times = []
    floor = 0.0
    for tile in tiles:
        try:
            case = make(tile)
            seconds = bench.seconds(launches(case), repeats=5)
        except Exception as error:  # noqa: BLE001  (a tile may need more shared memory than there is)
            print(label, tile, "does not run:", str(error)[:80], flush=True)
            continue
        floor = max(case.num_bytes / bench.bandwidth, case.flops / PEAK)
        times.append((seconds, tile))
    times.sort(key=lambda pair: pair[0])
    best = "  ".join(
        f"{seconds * 1e6:.2f} ({','.join(map(str, tile.options().values()))}{' tma' * tile.tma}"
        f"{' persistent' * tile.persistent})"
        for seconds, tile in times[:4]
    )
    print(f"{label:28s} floor {floor * 1e6:8.2f} us: {best}", flush=True)


def sweep(bench: Bench, op: str, name: str, shape: Shape, rows: int) -> None:
    """All tiles of an op of a model."""
    e, q, kv = shape.hidden, shape.heads * shape.size, shape.kv_heads * shape.size
    label = f"{op} {name} {rows}"
    if op == "linear":
        shapes = {"qkv": (q + 2 * kv, e), "o": (e, q)} | ({} if shape.experts else {"down": (e, shape.inner)})
        for part, (n, k) in shapes.items():
            try_all(bench, f"{label} {part}", candidates(rows), _linear(bench, rows, n, k))
    elif op == "swiglu" and not shape.experts:
        try_all(bench, label, candidates(rows), lambda tile: swiglu_case(bench, rows, shape.inner, e, tile))
    elif op == "head" and rows <= 512:
        try_all(bench, label, candidates(rows), lambda tile: head_case(bench, shape, rows, tile))
    elif op == "mixture" and shape.experts:
        per_expert = rows * shape.top_k // shape.experts
        narrow = [t for t in candidates(max(16, per_expert)) if t.BLOCK_M * t.BLOCK_N <= 128 * 128]
        try_all(bench, label, narrow, lambda tile: mixture_case(bench, shape, rows, tile))
    elif op == "attention":
        for split in (64, 128):
            tiles = [Tile(m, 0, 0, warps, stages) for m, warps, stages in ATTENTION[rows > 256]]
            try_all(bench, f"{label} split {split}", tiles, _attention(bench, shape, rows, split))


def _linear(bench: Bench, rows: int, n: int, k: int) -> MakeCase:
    return lambda tile: linear_case(bench, "linear", rows, n, k, tile)


def _attention(bench: Bench, shape: Shape, rows: int, split: int) -> MakeCase:
    return lambda tile: list(attention_cases(bench, shape, rows, tile, split))[1]


def combinations(ops: Iterable[str], models: Iterable[str], rows: Iterable[int]) -> Iterator[tuple[str, str, int]]:
    """What to try, an op at a time."""
    for op in ops:
        for count in rows:
            for name in models:
                yield op, name, count


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=["linear", "swiglu", "head", "attention", "mixture"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 32, 64, 128, 256, 2048])
    options = parser.parse_args()
    bench = Bench()
    print(bench.name, bench.ceilings(), f"context {CONTEXT}, split {SPLIT}", flush=True)
    for op, name, rows in combinations(options.ops, options.models, options.rows):
        sweep(bench, op, name, MODELS[name], rows)


if __name__ == "__main__":
    main()
