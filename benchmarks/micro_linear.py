"""Micro-benchmark of the CPU matrix products: each rate beside the machine's own, measured around it.

    python benchmarks/micro_linear.py [--rows 1 32 256] [--layers 30] [--seconds 1] [--json]

Packed products run over the weights of a whole decoder (SmolLM2-135M's shapes: 538 MB, far beyond any cache), layer
after layer as a step does; few rows are compared with the read bandwidth, many with the multiply-add peak. FLOPs are
2 x rows x weights. The trainer's products (unpacked forward, dX = dY W, dW += dY^T X) run over one layer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.cpu import _cpu

Floats = NDArray[np.float32]

HIDDEN, INNER, QKV, VOCAB = 576, 1536, 960, 49152
LAYER_SHAPES = {"qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER)}


def aligned(*shape: int) -> Floats:
    """An uninitialised float32 array, on huge pages if it is large."""
    return _cpu.aligned_empty(math.prod(shape)).reshape(shape)


def packed(n: int, k: int, rng: np.random.Generator) -> Floats:
    """Random weights [n, k] as panels."""
    panels = aligned(-(-n // 32), k, 32)
    _cpu.pack_linear(rng.random((n, k), np.float32), panels)
    return panels


def decoder_step(rows: int, layers: int) -> tuple[Callable[[], None], int]:
    """The products of one step over `rows` rows, and the number of weights they read."""
    rng = np.random.default_rng(0)
    weights = [{name: packed(*shape, rng) for name, shape in LAYER_SHAPES.items()} for _ in range(layers)]
    head = packed(VOCAB, HIDDEN, rng)
    x, inner = rng.random((rows, HIDDEN), np.float32), rng.random((rows, INNER), np.float32)
    out = {name: aligned(rows, n) for name, (n, _) in LAYER_SHAPES.items()}
    gated, logits = aligned(rows, INNER), aligned(rows, VOCAB)

    def step() -> None:
        for layer in weights:
            _cpu.linear(x, layer["qkv"], QKV, None, out["qkv"])
            _cpu.linear(x, layer["o"], HIDDEN, None, out["o"])
            _cpu.swiglu_linear(x, layer["gate_up"], INNER, gated)
            _cpu.linear(inner, layer["down"], HIDDEN, None, out["down"])
        _cpu.linear(x, head, VOCAB, None, logits)

    return step, layers * sum(n * k for n, k in LAYER_SHAPES.values()) + VOCAB * HIDDEN


def best_seconds(body: Callable[[], None], seconds: float) -> float:
    """Shortest run of `body` among those that fit into `seconds` (two at least); others use this machine too."""
    body()
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        start = time.perf_counter()
        body()
        times.append(time.perf_counter() - start)
    return min(times)


def report(
    name: str, work: float, body: Callable[[], None], limit: Callable[[], float], unit: str, seconds: float
) -> dict[str, object]:
    """Rate of `body`, which does `work`, and its share of the limit, the higher of those before and after."""
    before = limit()
    rate = work / best_seconds(body, seconds) / 1e9
    peak = max(before, limit())
    print(f"{name:28s} {rate:8.1f} {unit}  of {peak:7.1f} {unit}: {rate / peak:6.1%}", flush=True)
    return {"name": name, "rate": rate, "peak": peak, "unit": unit, "fraction": rate / peak}


def trainer_products(rows: int) -> dict[str, tuple[float, Callable[[], None]]]:
    """The forward and the two backward products of an unpacked layer, by name: (FLOPs, call)."""
    rng = np.random.default_rng(1)
    found: dict[str, tuple[float, Callable[[], None]]] = {}
    for name, (n, k) in LAYER_SHAPES.items():
        x, w, dy = rng.random((rows, k), np.float32), rng.random((n, k), np.float32), rng.random((rows, n), np.float32)
        y, dx, dw = aligned(rows, n), aligned(rows, k), np.zeros((n, k), np.float32)
        flops = 2.0 * rows * n * k
        found[f"unpacked {name} {rows}"] = flops, partial(_cpu.linear_unpacked, x, w, None, y)
        found[f"dX {name} {rows}"] = flops, partial(_cpu.matmul, dy, w, dx)
        found[f"dW {name} {rows}"] = flops, partial(_cpu.matmul, dy, x, dw, trans_a=True, accumulate=True)
    return found


def peak() -> float:
    """GFLOP/s"""
    return _cpu.fma_peak(0.1)


def bandwidth() -> float:
    """GB/s"""
    return _cpu.read_bandwidth(256 << 20, 0.2)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 32, 256])
    parser.add_argument("--trainer-rows", type=int, nargs="*", default=[512])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=_cpu.num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Print a table, or JSON after it."""
    args = parse()
    _cpu.set_num_threads(args.threads)
    results = []
    for rows in args.rows:
        step, weights = decoder_step(rows, args.layers)
        if rows <= 8:
            results.append(report(f"step of {rows} rows", 4.0 * weights, step, bandwidth, "GB/s", args.seconds))
        results.append(report(f"step of {rows} rows", 2.0 * rows * weights, step, peak, "GFLOP/s", args.seconds))
        del step
    for rows in args.trainer_rows:
        for name, (flops, call) in trainer_products(rows).items():
            results.append(report(name, flops, call, peak, "GFLOP/s", args.seconds / 4))
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
