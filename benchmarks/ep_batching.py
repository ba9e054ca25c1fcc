"""What the collection window costs and saves: requests that arrive one by one, over ranks that share experts.

    python benchmarks/ep_batching.py --json
    python benchmarks/ep_batching.py --plot docs/ep_batching.png

An open loop: requests of distinct prompts come at random moments (Poisson, seeded) at each rate, whether or not earlier
ones are done. One engine per window stays up; all see the same prompts at the same moments, in turn, and the median
over the rounds counts. Ratios to "no window" are taken within a round, then their median. The time to a request's first
token runs from the moment it was due to the moment the step that gave the token was in at the controller.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from machine_facts import machine_facts
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # the watch on steps is shared with the tests

from gate.step_watch import StepWatch

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_moe_config
from zerokl.rollout.sampling_params import SamplingParams

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64},
    "small": {
        "hidden_size": 256,
        "moe_intermediate_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    },
}
VOCAB_SIZE = 4096


@dataclass(frozen=True)
class Load:
    """The requests of one round: when they are due, and what they ask."""

    due_s: NDArray[np.float64]
    prompts: list[NDArray[np.int32]]
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One round on one engine."""

    tok_s: float
    """New tokens over the time from the first arrival to the last answer."""
    steps: float
    prefill_steps: float
    ttft_p50_ms: float
    ttft_p99_ms: float


class Server:
    """An engine with one window, and the count of its steps."""

    def __init__(self, config: EngineConfig) -> None:
        self.engine = RolloutEngine(config)
        self._watch = StepWatch(self.engine)
        self._num_loads = 0

    def measure(self, load: Load) -> Measured:
        """Serve the load."""
        self._num_loads += 1
        before = self._watch.factors()
        start = perf_counter() + 0.05
        asyncio.run(self._serve(load, start))
        wall = perf_counter() - start - float(load.due_s[0])
        after = self._watch.factors()
        firsts = [self._watch.first_token_at[f"{self._name(index)}/0"] for index in range(len(load.prompts))]
        ttft_ms = 1e3 * (np.array(firsts) - start - load.due_s)
        return Measured(
            tok_s=len(load.prompts) * load.new_tokens / wall,
            steps=after["steps"] - before.get("steps", 0),
            prefill_steps=after["prefill_steps"] - before.get("prefill_steps", 0),
            ttft_p50_ms=float(np.percentile(ttft_ms, 50)),
            ttft_p99_ms=float(np.percentile(ttft_ms, 99)),
        )

    async def _serve(self, load: Load, start: float) -> None:
        await asyncio.gather(*(self._request(load, index, start) for index in range(len(load.prompts))))

    async def _request(self, load: Load, index: int, start: float) -> None:
        await asyncio.sleep(start + load.due_s[index] - perf_counter())
        params = SamplingParams(max_tokens=load.new_tokens, ignore_eos=True, seed=index)
        await self.engine.agenerate(load.prompts[index], params, request_ids=[self._name(index)])

    def _name(self, index: int) -> str:
        return f"load {self._num_loads} request {index}"


def make_load(args: argparse.Namespace, rate: float, seed: int) -> Load:
    random = np.random.default_rng(seed)
    count = max(8, round(rate * args.seconds))
    lengths = random.integers(args.prompt_tokens // 2, 2 * args.prompt_tokens, count)
    prompts = [random.integers(0, VOCAB_SIZE, length).astype(np.int32) for length in lengths]
    return Load(np.cumsum(random.exponential(1 / rate, count)), prompts, args.new_tokens)


def rows_of(args: argparse.Namespace, servers: dict[float, Server], rate: float, seed: int) -> list[dict[str, float]]:
    """A row per window, at one rate of arrival."""
    rounds: list[dict[float, Measured]] = []
    for number in range(args.rounds):
        load = make_load(args, rate, seed + number)
        turn = list(servers)[number % len(servers) :] + list(servers)[: number % len(servers)]
        rounds.append({timeout: servers[timeout].measure(load) for timeout in turn})
    rows = []
    for timeout in servers:
        median = {key: statistics.median(asdict(one[timeout])[key] for one in rounds) for key in asdict(rounds[0][0.0])}
        ratio = statistics.median(one[timeout].tok_s / one[0.0].tok_s for one in rounds)
        saved = statistics.median(one[timeout].prefill_steps / one[0.0].prefill_steps for one in rounds)
        ratios = {"tok_s_ratio": ratio, "prefill_ratio": saved}
        rows.append({"arrival_per_s": rate, "timeout_s": timeout, **median, **ratios})
    return rows


def serve_all(args: argparse.Namespace) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        content = tiny_moe_config(vocab_size=VOCAB_SIZE, max_position_embeddings=1024, **MODELS[args.model])
        save_pretrained(Path(folder), content, random_tensors(ModelConfig.from_json(content)))
        servers = {}
        for timeout in (0.0, *args.timeouts):
            options: dict[str, Any] = {"expert_parallel_size": args.ranks, "batched_token_timeout": timeout}
            servers[timeout] = Server(
                EngineConfig(model=folder, num_blocks=2048, num_threads=1, enable_prefix_caching=False, **options)
            )
            stack.callback(servers[timeout].engine.close)
            servers[timeout].measure(make_load(args, 8 / args.seconds, seed=0))
        rows = []
        for index, rate in enumerate(args.rates):
            rows += rows_of(args, servers, rate, seed=1000 * (index + 1))
            if not args.json:
                tell(rows[-len(servers) :])
        return rows


def tell(rows: list[dict[str, float]]) -> None:
    for row in rows:
        print(
            f"{row['arrival_per_s']:6g}/s  window {1e3 * row['timeout_s']:5g} ms  {row['tok_s']:7.1f} tok/s "
            f"({row['tok_s_ratio']:5.3f})  prefill steps {row['prefill_steps']:4g} ({row['prefill_ratio']:5.3f})  "
            f"first token p50 {row['ttft_p50_ms']:6.1f} ms, p99 {row['ttft_p99_ms']:6.1f} ms"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rates", nargs="+", type=float, default=[5, 10, 20, 40, 80, 120, 160], metavar="PER_S")
    parser.add_argument("--timeouts", nargs="+", type=float, default=[0.01, 0.1], metavar="S", help="besides 0")
    parser.add_argument("--seconds", type=float, default=4.0, help="over which a round's requests arrive")
    parser.add_argument("--prompt-tokens", type=int, default=48, help="from half of it to twice of it")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=None, metavar="PNG")
    args = parser.parse_args()
    rows = serve_all(args)
    if args.plot is not None:
        from ep_batching_plot import plot

        plot(rows, args.plot, machine_facts()["machine"])
    windows = [row for row in rows if row["timeout_s"]]
    facts = {
        "rows": rows,
        "lowest_tok_s_ratio": min(row["tok_s_ratio"] for row in windows),
        "highest_prefill_ratio": max(row["prefill_ratio"] for row in windows),
        "ranks": args.ranks,
        "model": args.model,
    }
    print(json.dumps(facts | machine_facts()))


if __name__ == "__main__":
    main()
