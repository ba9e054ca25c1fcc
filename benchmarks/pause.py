"""How long `pause_generation` takes to hold, against one decode step.

    python benchmarks/pause.py --json

32 sequences decode on a model of random weights (as large as SmolLM2-135M, or --tiny); pauses of mode "keep" and
"abort" come at random moments, and are lifted at once. The floor is the rest of the step that is running: half a step
on average, one step at most. `over_step_p99_ms` is p99 of the pause less the median decode step of the same run; the
project holds it below 20 ms. `after_step_p99_ms` is what is the pause's own: the time from the end of the step that it
found. Steps that are themselves slower than the median count in the former alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine_facts import machine_facts
from weight_models import MODELS

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_config
from zerokl.rollout.sampling_params import SamplingParams

SEQUENCES = 32


def model(tiny: bool) -> dict[str, Any]:
    if tiny:
        return tiny_config(vocab_size=300, max_position_embeddings=4096, eos_token_id=None)
    return {**MODELS["135m"], "max_position_embeddings": 4096, "tie_word_embeddings": False, "eos_token_id": None}


def decode(engine: RolloutEngine) -> Any:
    """32 sequences that have begun to decode."""
    prompts = [[number, 1, 2, 3] for number in range(SEQUENCES)]
    call = engine.submit(prompts, SamplingParams(max_tokens=2000, ignore_eos=True, seed=1))
    wait_steps(engine, 2)
    return call


def wait_steps(engine: RolloutEngine, count: int) -> list[float]:
    """Wait for the ends of so many steps; when each was."""
    ends: list[float] = []
    enough = threading.Event()

    def tick() -> None:
        ends.append(time.perf_counter())
        if len(ends) >= count:
            enough.set()

    stop = engine.watch_steps(tick)
    enough.wait()
    stop()
    return ends[:count]


def stop(engine: RolloutEngine, call: Any) -> None:
    engine.abort_all()
    call.future.result()


def measure_step(engine: RolloutEngine) -> float:
    """Seconds of a decode step."""
    call = decode(engine)
    seconds = float(np.median(np.diff(wait_steps(engine, 30))))
    stop(engine, call)
    return seconds


def measure(engine: RolloutEngine, mode: Any, count: int, step: float) -> tuple[list[float], list[float]]:
    """(seconds of each pause, seconds of it after the end of the step that it found); they come at random moments."""
    rng, waiting = np.random.default_rng(0), threading.Event()
    pauses: list[float] = []
    after: list[float] = []
    ends: list[float] = [0.0]
    unwatch = engine.watch_steps(lambda: ends.append(time.perf_counter()))
    call = decode(engine)
    for _ in range(count):
        if mode == "abort" and pauses:
            call = decode(engine)
        waiting.wait(step * float(rng.uniform(0.0, 1.0)))
        start = time.perf_counter()
        engine.pause_generation(mode)
        held = time.perf_counter()
        pauses.append(held - start)
        after.append(held - max(start, ends[-1]))
        engine.resume_generation()
        if mode == "keep":
            wait_steps(engine, 1)
        else:
            call.future.result()
    unwatch()
    stop(engine, call)
    return pauses, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, whose steps take a millisecond or two")
    parser.add_argument("--pauses", type=int, default=200, help="of each mode")
    args = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="zerokl-pause-") as folder:
        content = model(args.tiny)
        save_pretrained(Path(folder), content, random_tensors(ModelConfig.from_json(content), 0))
        with RolloutEngine(EngineConfig(model=folder, num_blocks=16_384, block_size=16, max_num_seqs=64)) as engine:
            step = measure_step(engine)
            figures["step_ms"] = 1000 * step
            for mode in ("keep", "abort"):
                pauses, after = measure(engine, mode, args.pauses, step)
                for name, share in (("p50", 0.5), ("p99", 0.99)):
                    figures[f"{mode}_{name}_ms"] = 1000 * float(np.quantile(pauses, share))
                figures[f"{mode}_after_step_p99_ms"] = 1000 * float(np.quantile(after, 0.99))
                figures[f"{mode}_over_step_p99_ms"] = figures[f"{mode}_p99_ms"] - 1000 * step
    figures["over_step_p99_ms"] = max(figures[f"{mode}_over_step_p99_ms"] for mode in ("keep", "abort"))
    for name, value in figures.items():
        print(f"{name:24} {value:10.3f}")
    if args.json:
        print(json.dumps({**figures, **machine_facts()}))


if __name__ == "__main__":
    main()
