"""Part `arrivals` of run_all.py: prompts that arrive all the time, with and without a step ahead.

A fixed number of sequences is in flight: when the 8 samples of a prompt have ended, the next prompt is submitted at
once. Prompts have 64 to 512 tokens, outputs 32 to 448, so that sequences end and join in most steps. A share of the
prompts asks for penalties. The same prompts run with steps launched ahead and with each step's results awaited; tokens
and logprobs of both are compared, and must be equal.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from exact import MakeEngine, compare
from numpy.typing import NDArray

from models import model_folder
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.step_plan import StepPlan
from zerokl.rollout.submission import Submission

Row = dict[str, Any]

SAMPLES = 8
ROUNDS = 4
"""Prompts of a run, in multiples of those in flight."""


class Ask(NamedTuple):
    """A prompt and what is asked for."""

    prompt: NDArray[np.int32]
    params: SamplingParams


def arrival_rows(model: str, sizes: Sequence[int], folder: Path, make_engine: MakeEngine, repeats: int) -> list[Row]:
    """tok/s with and without a step ahead, per number of sequences in flight; then once more with penalties."""
    loads = [*((size, 0.0) for size in sizes), (sizes[-1], 0.25)]
    rows: list[Row] = []
    with make_engine(model_folder(model, folder / model)) as engine:
        for sequences, penalised in loads:  # the share of prompts with penalties
            asks = _asks(ROUNDS * sequences // SAMPLES, engine.model_config.vocab_size, penalised)
            in_flight = sequences // SAMPLES
            _run(engine, asks[: 2 * in_flight], in_flight)
            first: list[Rollout] | None = None
            for ahead in (True, False) * repeats:
                with _counted(ahead) as counts:
                    start = time.perf_counter()
                    rollouts = _run(engine, asks, in_flight)
                    seconds = time.perf_counter() - start
                first = first or rollouts
                values, differing = compare(first, rollouts)
                tokens = sum(len(rollout.token_ids) for rollout in rollouts)
                row: Row = {"model": model, "sequences": sequences, "penalised": penalised, "ahead": ahead}
                row |= {"tok_s": round(tokens / seconds), "seconds": round(seconds, 2), **counts}
                rows.append(row | {"exact_values": values, "differing_values": differing})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def _asks(count: int, vocab: int, penalised: float) -> list[Ask]:
    numbers = np.random.default_rng(30)
    asks = []
    for number in range(count):
        prompt = numbers.integers(10, vocab, int(numbers.integers(64, 513))).astype(np.int32)
        penalty = 0.5 if numbers.random() < penalised else 0.0
        length = int(numbers.integers(32, 449))
        params = SamplingParams(n=SAMPLES, max_tokens=length, ignore_eos=True, seed=number, presence_penalty=penalty)
        asks.append(Ask(prompt, params))
    return asks


def _run(engine: RolloutEngine, asks: list[Ask], in_flight: int) -> list[Rollout]:
    """The rollouts of all prompts, of which so many are in flight at a time; nothing is cached before."""
    engine.reset_prefix_cache()
    ended: SimpleQueue[int] = SimpleQueue()
    submissions: list[Submission[list[Rollout]]] = []
    for number, ask in enumerate(asks):
        if number >= in_flight:
            ended.get()
        submissions.append(engine.submit([ask.prompt], ask.params))
        submissions[-1].future.add_done_callback(lambda _, number=number: ended.put(number))
    rollouts: list[Rollout] = []
    for submission in submissions:
        submission.future.result()
        rollouts += submission.read()
    return rollouts


@contextlib.contextmanager
def _counted(ahead: bool) -> Iterator[dict[str, int]]:
    """Counts steps, and those planned before the results of the last one; without `ahead` there is none of these."""
    counts = {"steps": 0, "steps_ahead": 0}
    plan_ahead: Callable[[Scheduler, StepPlan, float], StepPlan | None] = Scheduler.plan_ahead

    def counting(scheduler: Scheduler, plan: StepPlan, now: float) -> StepPlan | None:
        following = plan_ahead(scheduler, plan, now) if ahead else None
        counts["steps"] += 1
        counts["steps_ahead"] += following is not None
        return following

    with mock.patch.object(Scheduler, "plan_ahead", counting):
        yield counts
