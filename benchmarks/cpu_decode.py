"""Decode and prefill speed of the engine on the real SmolLM2-135M-Instruct, against this machine's own peaks.

    python benchmarks/cpu_decode.py --json

32 distinct prompts of 64 tokens, 64 new tokens each, float32, no cache hits. FLOPs are 2 x parameters used per token
(attention not counted); a prefill token that needs no logits does not use the LM head. Floors: FLOPs over the FMA peak
at 32 sequences, weight bytes over the read bandwidth at one. Peaks are measured before and after each part and their
best is taken, so that a busy neighbour cannot flatter the fractions. The run is repeated and the median run is
reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from machine_facts import machine_facts

from zerokl.integrations.smollm2 import model_folder
from zerokl.kernels.cpu import _cpu
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.layout import expected_tensors
from zerokl.rollout.sampling_params import SamplingParams


@dataclass(frozen=True)
class Cost:
    """FLOPs of one token through the layers and through the LM head, and bytes of all weights read by a decode step."""

    layers: float
    head: float
    weight_bytes: float


def model_cost(config: ModelConfig) -> Cost:
    sizes = {name: int(np.prod(shape)) for name, shape in expected_tensors(config).items()}
    layers = sum(size for name, size in sizes.items() if ".layers." in name)
    head = config.vocab_size * config.hidden_size
    return Cost(2.0 * layers, 2.0 * head, 4.0 * (layers + head))


def timed(engine: RolloutEngine, prompts: list[list[int]], new_tokens: int) -> float:
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, seed=1)
    start = perf_counter()
    engine.generate(prompts, params)
    return perf_counter() - start


def distinct_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(100, vocab_size, (count, length)).tolist()


def measure(args: argparse.Namespace) -> dict[str, float]:
    folder = str(args.model or model_folder())
    cost = model_cost(ModelConfig.from_json(folder))
    config = EngineConfig(model=folder, max_model_len=256, num_threads=args.threads, max_num_seqs=args.sequences)
    rows = []
    with RolloutEngine(config) as engine:
        vocab = engine.model_config.vocab_size
        timed(engine, distinct_prompts(2, 16, vocab, 0), 4)
        for run in range(args.runs):
            prompts = distinct_prompts(args.sequences, args.prompt_tokens, vocab, 10 + run)
            single = distinct_prompts(1, args.prompt_tokens, vocab, 100 + run)
            peak, bandwidth = _cpu.fma_peak(0.3), _cpu.read_bandwidth(512 << 20, 0.3)
            prefill = timed(engine, distinct_prompts(args.sequences, args.prompt_tokens, vocab, 50 + run), 1)
            whole = timed(engine, prompts, args.new_tokens)
            one_first, one = timed(engine, single, 1), timed(engine, [single[0][::-1]], args.new_tokens)
            peak, bandwidth = max(peak, _cpu.fma_peak(0.3)), max(bandwidth, _cpu.read_bandwidth(512 << 20, 0.3))
            rows.append(figures(args, cost, prefill, whole, one - one_first, peak, bandwidth))
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def figures(
    args: argparse.Namespace, cost: Cost, prefill: float, whole: float, single: float, peak: float, bandwidth: float
) -> dict[str, float]:
    n, prompt, new = args.sequences, args.prompt_tokens, args.new_tokens
    decode = whole - prefill
    decode_flops = n * (new - 1) * (cost.layers + cost.head)
    prefill_flops = n * (prompt * cost.layers + cost.head)
    return {
        "decode_tok_s": n * (new - 1) / decode,
        "prefill_tok_s": n * prompt / prefill,
        "total_tok_s": n * new / whole,
        "fma_peak_gflops": peak,
        "decode_fma_fraction": decode_flops / decode / peak / 1e9,
        "prefill_fma_fraction": prefill_flops / prefill / peak / 1e9,
        "bandwidth_gb_s": bandwidth,
        "single_tok_s": (new - 1) / single,
        "single_bandwidth_fraction": (new - 1) * cost.weight_bytes / single / bandwidth / 1e9,
        "floor_total_s": (decode_flops + prefill_flops) / peak / 1e9,
        "total_s": whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--model", default=None)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    result = measure(args)
    if not args.json:
        for key, value in result.items():
            print(f"{key:28s} {value:10.3f}")
    print(json.dumps({**{key: round(value, 4) for key, value in result.items()}, **machine_facts()}))


if __name__ == "__main__":
    main()
