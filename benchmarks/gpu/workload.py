"""The load of every speed part: groups of samples of random prompts, on engines whose steps are timed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from load_shape import OUTPUT, PROMPT, SAMPLES
from numpy.typing import NDArray
from step_times import TimedWorker

from models import model_folder
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.sampling_params import SamplingParams

Row = dict[str, Any]


def prompts(count: int, vocab: int, seed: int) -> list[NDArray[np.int32]]:
    return list(np.random.default_rng(seed).integers(10, vocab, (count, PROMPT)).astype(np.int32))


def make_engine(folder: Path, **options: Any) -> RolloutEngine:
    """An engine of random weights in the shape of a model. 16,384 tokens a step are what vLLM chooses on an H100."""
    defaults: Row = {"device": "gpu", "max_model_len": 2048, "max_num_seqs": 512, "max_num_batched_tokens": 16384}
    make_worker = options.pop("make_worker", TimedWorker)
    return RolloutEngine(EngineConfig(model=str(folder), **(defaults | options)), make_worker=make_worker)


def load(engine: RolloutEngine, sequences: int, tokens: int, seed: int, **params: Any) -> float:
    """Wall seconds of one call."""
    asked = prompts(sequences // SAMPLES, engine.model_config.vocab_size, seed)
    options = SamplingParams(n=SAMPLES, max_tokens=tokens, ignore_eos=True, seed=seed, **params)
    start = time.perf_counter()
    rollouts = engine.generate(asked, options)
    seconds = time.perf_counter() - start
    assert all(len(rollout.token_ids) == tokens for rollout in rollouts)
    return seconds


def speed(model: str, sizes: tuple[int, ...], folder: Path, repeats: int, **options: Any) -> list[Row]:
    """Throughput, span and period at each number of sequences."""
    begun = time.perf_counter()
    rows: list[Row] = []
    with make_engine(model_folder(model, folder / model), **options) as engine:
        load(engine, SAMPLES, 1, 0)
        first = round(time.perf_counter() - begun, 1)
        print(f"{model}: first token after {first} s", flush=True)
        for sequences in sizes:
            load(engine, sequences, 32, 1000 + sequences)
            for repeat in range(repeats):
                TimedWorker.latest.take(sequences)
                seconds = load(engine, sequences, OUTPUT, 2000 + sequences + repeat)
                row = {"model": model, "sequences": sequences, "tok_s": round(sequences * OUTPUT / seconds)}
                rows.append(row | TimedWorker.latest.take(sequences) | {"first_token_s": first})
                print(json.dumps(rows[-1]), flush=True)
    return rows
