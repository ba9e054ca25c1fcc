"""Micro-benchmark of the CPU ops other than matrix products: time, GB/s, GFLOP/s, at SmolLM2-135M's shapes.

    python benchmarks/micro_ops.py [--tokens 32 2048] [--threads N] [--seconds 0.1] [--json]

Bytes are those of the arguments, each counted once; they may lie in a cache, so GB/s can exceed the memory's. Attention
FLOPs are 4 x head size per visible query-key pair and head, 10 x in the backward pass. Decode has one token of 32
sequences over 100 keys each and goes round the caches of 30 layers, as a step does; prefill has sequences of 64 tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
from machine_facts import machine_facts
from numpy.typing import NDArray

from zerokl.kernels.cpu import _cpu

Floats = NDArray[np.float32]
Call = Callable[[], None]

HIDDEN, INNER, VOCAB = 576, 1536, 49152
HEADS, KV_HEADS, DIM, BLOCK = 9, 3, 64, 16
LAYERS, DECODE_SEQUENCES, CONTEXT, PREFILL = 30, 32, 100, 64
EPS, SCALE = 1e-5, DIM**-0.5


def floats(*shape: int) -> Floats:
    """Ordinary numbers; the same for the same shape."""
    numbers: Floats = np.random.default_rng(0).random(shape, np.float32)
    numbers -= np.float32(0.5)
    return numbers


def row_ops(tokens: int) -> dict[str, tuple[int, Call]]:
    """Name -> (floats moved, call) over `tokens` rows."""
    x, y, w, out, dx = (
        floats(tokens, HIDDEN),
        floats(tokens, HIDDEN),
        floats(HIDDEN),
        *np.empty((2, tokens, HIDDEN), np.float32),
    )
    gate, up, hidden, dgate = floats(tokens, INNER), floats(tokens, INNER), *np.empty((2, tokens, INNER), np.float32)
    table, inv, dw = floats(VOCAB, HIDDEN), np.ones(tokens, np.float32), np.empty(HIDDEN, np.float32)
    ids = np.random.default_rng(1).integers(0, VOCAB, tokens).astype(np.int32)
    rows = np.arange(tokens, dtype=np.int32)
    return {
        "embedding": (2 * x.size, lambda: _cpu.embedding(ids, table, out)),
        "embedding_backward": (3 * x.size, lambda: _cpu.embedding_backward(ids, y, table)),
        "gather_rows": (2 * x.size, lambda: _cpu.gather_rows(x, rows, out)),
        "rms_norm": (2 * x.size, lambda: _cpu.rms_norm(x, w, EPS, out, None)),
        "add_rms_norm": (4 * x.size, lambda: _cpu.add_rms_norm(x, y, w, EPS, dx, out, None)),
        "rms_norm_backward": (3 * x.size, lambda: _cpu.rms_norm_backward(y, x, w, inv, dx, dw)),
        "swiglu": (3 * gate.size, lambda: _cpu.swiglu(gate, up, hidden)),
        "swiglu_backward": (5 * gate.size, lambda: _cpu.swiglu_backward(gate, gate, up, dgate, hidden)),
    }


def cache_ops(tokens: int) -> dict[str, tuple[int, Call]]:
    """Name -> (floats moved, call) of the way into the cache."""
    blocks = -(-tokens // BLOCK)
    keys, values = floats(blocks, KV_HEADS, DIM, BLOCK), floats(blocks, KV_HEADS, BLOCK, DIM)
    qkv, q, k = floats(tokens, (HEADS + 2 * KV_HEADS) * DIM), floats(tokens, HEADS, DIM), floats(tokens, KV_HEADS, DIM)
    out, table, norm = np.empty_like(q), floats(4096, 2, DIM // 2), floats(DIM)
    positions, slots = np.arange(tokens, dtype=np.int32), np.arange(tokens, dtype=np.int32)

    def fused(weight: Floats | None) -> Call:
        caches = (keys, values)
        return lambda: _cpu.qkv_to_cache(
            qkv, HEADS, KV_HEADS, weight, weight, EPS, positions, table, False, slots, *caches, out
        )

    return {
        "rope half": (2 * q.size, lambda: _cpu.rope(q, positions, table, False, False, out)),
        "rope interleaved": (2 * q.size, lambda: _cpu.rope(q, positions, table, True, False, out)),
        "kv_write": (4 * k.size, lambda: _cpu.kv_write(k, k, slots, keys, values)),
        "qkv_to_cache": (2 * qkv.size, fused(None)),
        "qkv_to_cache, q/k norms": (2 * qkv.size, fused(norm)),
    }


def paged_attention(sequences: int, new_tokens: int, context: int, layers: int) -> tuple[float, float, Call]:
    """FLOPs and bytes of keys and values of one layer, and a call that takes the layers in turn."""
    width = -(-context // BLOCK)
    keys = np.empty((layers, sequences * width, KV_HEADS, DIM, BLOCK), np.float32)
    values = np.empty((layers, sequences * width, KV_HEADS, BLOCK, DIM), np.float32)
    keys[:], values[:] = floats(*keys.shape[1:]), floats(*values.shape[1:])
    tables = np.random.default_rng(0).permutation(sequences * width).astype(np.int32).reshape(sequences, width)
    q = floats(sequences * new_tokens, HEADS, DIM)
    out = np.empty_like(q)
    starts, lens = np.arange(sequences + 1, dtype=np.int32) * new_tokens, np.full(sequences, context, np.int32)
    turn = 0

    def call() -> None:
        nonlocal turn
        _cpu.attention(q, keys[turn], values[turn], tables, starts, lens, SCALE, out)
        turn = (turn + 1) % layers

    pairs = sequences * sum(context - i for i in range(new_tokens))
    return 4.0 * DIM * HEADS * pairs, 8.0 * sequences * context * KV_HEADS * DIM, call


def packed_backward(sequences: int, length: int) -> tuple[float, float, Call]:
    """FLOPs, bytes of the arguments, and the call."""
    q, k = floats(sequences * length, HEADS, DIM), floats(sequences * length, KV_HEADS, DIM)
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(k)
    starts = np.arange(sequences + 1, dtype=np.int32) * length
    pairs = sequences * length * (length + 1) // 2
    return (
        10.0 * DIM * HEADS * pairs,
        4.0 * (4 * q.size + 4 * k.size),
        lambda: _cpu.attention_backward(q, q, k, k, q, starts, SCALE, dq, dk, dv),
    )


def median_seconds(call: Call, seconds: float) -> float:
    """Median run of `call` among those that fit into `seconds`, five at least."""
    call()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def report(
    name: str, tokens: int, seconds: float, gigabytes: float, gigaflops: float | None = None
) -> dict[str, object]:
    """One printed line and JSON row."""
    rate = "" if gigaflops is None else f"{gigaflops / seconds:8.1f} GFLOP/s"
    print(f"{name:26s} {tokens:6d} tokens {seconds * 1e6:10.1f} us {gigabytes / seconds:8.1f} GB/s {rate}", flush=True)
    row: dict[str, object] = {"name": name, "tokens": tokens, "us": seconds * 1e6, "gb_s": gigabytes / seconds}
    return row if gigaflops is None else {**row, "gflop_s": gigaflops / seconds}


def main() -> None:
    """Print a table, or with --json also one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[32, 2048], help="rows of the row-wise ops")
    parser.add_argument("--threads", type=int, default=_cpu.num_threads())
    parser.add_argument("--seconds", type=float, default=0.1, help="measuring time of each op")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    _cpu.set_num_threads(args.threads)
    rows = []
    for tokens in args.tokens:
        for name, (moved, call) in {**row_ops(tokens), **cache_ops(tokens)}.items():
            rows.append(report(name, tokens, median_seconds(call, args.seconds), 4e-9 * moved))
    prefill = 2048 // PREFILL
    attention = {
        "attention decode": (DECODE_SEQUENCES, paged_attention(DECODE_SEQUENCES, 1, CONTEXT, LAYERS)),
        "attention prefill": (2048, paged_attention(prefill, PREFILL, PREFILL, 1)),
        "attention_backward": (2048, packed_backward(prefill, PREFILL)),
    }
    for name, (tokens, (flops, moved_bytes, call)) in attention.items():
        rows.append(report(name, tokens, median_seconds(call, args.seconds), moved_bytes / 1e9, flops / 1e9))
    if args.json:
        print(json.dumps({**machine_facts(), "threads": args.threads, "rows": rows}))


if __name__ == "__main__":
    main()
