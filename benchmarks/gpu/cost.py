"""Part `cost` of run_all.py: what exactness costs, and what log-probabilities cost, in the same engine.

Each is a pair of engines in one process that take turns with the same prompts, the first one changing from pair to
pair: ours against ours with the fastest way to compute each product (`choices`), and against ours that returns tokens
alone (`tokens_only`). A cost is the ratio of what the two took in a pair, less 1: the median over pairs, with an
interval from order statistics.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import paddle
from choices import Choices, Measured
from gemm_times import measure, wide_entries
from load_shape import PROMPT, SAMPLES
from pairs import costs, take_turns
from row_table import table
from step_times import TimedWorker
from variants import FastestProducts, TokensOnly, engines_use
from workload import load, make_engine, prompts

from models import model_folder
from zerokl.kernels.gpu.ops import GpuOps
from zerokl.kernels.gpu.packed import Dtype
from zerokl.kernels.gpu.step_arrays import bucket
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.sampling_params import SamplingParams

Row = dict[str, Any]
MakeOps = Callable[[Dtype], GpuOps]

BLOCK = 16
"""Tokens of a block of keys and values."""
MOST_PREFILL = 8192


@dataclass(frozen=True, slots=True)
class Side:
    """One of two engines."""

    engine: RolloutEngine
    worker: TimedWorker
    tokens: int
    """New ones of each sequence."""

    def take_turn(self, sequences: int, seed: int) -> Row:
        """See `pairs.Side`."""
        self.worker.take(sequences)
        seconds = load(self.engine, sequences, self.tokens, seed)
        return self.worker.take(sequences) | {"seconds": seconds}


def cost_rows(models: Sequence[str], sizes: Sequence[int], folder: Path, pairs: int, tokens: int) -> list[Row]:
    """A row for each product, then one for each cost and figure, of calls of so many new tokens a sequence.

    Raises PartRefusedError without cuBLASLt.
    """
    return [row for name in models for row in _of_model(name, sizes, folder, pairs, tokens)]


def _of_model(name: str, sizes: Sequence[int], folder: Path, pairs: int, tokens: int) -> Iterator[Row]:
    path = model_folder(name, folder / name)
    config = ModelConfig.from_json(str(path))
    row_counts = sorted({bucket(size) for size in sizes} | {_prefill_rows(size) for size in sizes})
    measured = measure(config, row_counts)
    paddle.device.cuda.empty_cache()
    products = [{"model": name, **one.row()} for one in measured]
    print(table(products), flush=True)
    yield from products
    make_side = partial(_side, path, max(sizes), tokens)
    with make_side() as plain:
        for what, make_ops in _variants(config, measured, row_counts).items():
            with make_side(make_ops) as other:
                differing = values_that_differ(plain.engine, other.engine)
                for sequences in sizes:
                    for row in costs(what, take_turns(plain, other, sequences, pairs)):
                        made = {"model": name, "sequences": sequences, **row, **differing}
                        print(json.dumps(made), flush=True)
                        yield made


def _prefill_rows(sequences: int) -> int:
    return bucket(min(MOST_PREFILL, sequences // SAMPLES * PROMPT))


def _variants(config: ModelConfig, measured: Sequence[Measured], row_counts: Sequence[int]) -> dict[str, MakeOps]:
    choices, wide = Choices(measured), wide_entries(config, row_counts)
    return {
        "exactness": lambda dtype: FastestProducts(choices, wide, dtype),
        "logprobs": lambda dtype: TokensOnly(dtype=dtype),
    }


@contextlib.contextmanager
def _side(path: Path, sequences: int, tokens: int, make_ops: MakeOps | None = None) -> Iterator[Side]:
    num_blocks = sequences * (tokens // BLOCK + 2) + sequences // SAMPLES * PROMPT // BLOCK
    options: Row = {"num_blocks": num_blocks, "block_size": BLOCK, "weight_slots": 1, "max_num_seqs": sequences}
    options["max_num_batched_tokens"] = MOST_PREFILL  # two engines of B leave no memory for more
    with contextlib.nullcontext() if make_ops is None else engines_use(make_ops):
        engine = make_engine(path, **options)
    with engine:
        yield Side(engine, TimedWorker.latest, tokens)


def values_that_differ(one: RolloutEngine, other: RolloutEngine) -> Row:
    """Tokens and log-probabilities, of 8 samples of 32 tokens: what shows that the two compute alike, or do not."""
    asked = prompts(1, one.model_config.vocab_size, 3)
    params = SamplingParams(n=SAMPLES, max_tokens=32, ignore_eos=True, seed=3)
    pairs = list(zip(one.generate(asked, params), other.generate(asked, params), strict=True))
    return {
        "tokens_differ": sum(int((a.token_ids != b.token_ids).sum()) for a, b in pairs),
        "logprobs_differ": sum(int((a.logprobs != b.logprobs).sum()) for a, b in pairs),
    }
