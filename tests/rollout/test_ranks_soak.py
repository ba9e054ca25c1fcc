"""Random ranks, roles, windows and pools under random traffic of several threads: the bits of one plain rank."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exactness_harness import differing
from leftovers import children_of, segments_of
from ranks_engine import on_ranks
from span_replay import differences
from tiny_engine import tiny_tensors, wait_until

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import EngineAsleepError
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.synthetic import random_tensors
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.residents import Residents
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.step_plan import Handover

VOCAB = 96
NUM_CLIENTS = 3
CALLS_PER_CLIENT = 20
MAX_UPDATES = 8


@dataclass
class Seen:
    """What a client asked for and got."""

    rollouts: list[Rollout] = field(default_factory=list)
    scores: list[tuple[list[int], Any]] = field(default_factory=list)
    pinned_scores: list[tuple[list[int], Any]] = field(default_factory=list)


def random_ranks(random: np.random.Generator, is_moe: bool) -> dict[str, Any]:
    """Options of an engine over up to four ranks, with a pool that is often too small for all."""
    sizes = [(2, 1), (2, 2), (4, 1), (1, 2)] if is_moe else [(1, 2), (1, 3), (1, 4)]
    experts, models = sizes[int(random.integers(len(sizes)))]
    size = experts * models
    roles = [str(role) for role in random.choice(["mixed", "prefill", "decode"], size)]
    if random.integers(2) or not {"mixed", "prefill"} & set(roles) or not {"mixed", "decode"} & set(roles):
        roles = ["prefill", *["decode"] * (size - 1)] if random.integers(2) else ["mixed"] * size
    options: dict[str, Any] = {
        "expert_parallel_size": experts,
        "data_parallel_size": models,
        "rank_roles": roles,
        "batched_token_timeout": float(random.choice([0.0, 0.002, 0.02])),
        "num_blocks": int(random.integers(12, 40)),
        "max_num_seqs": int(random.integers(1, 9)),
        "max_num_batched_tokens": int(random.choice([1, 7, 40, 300])),
        "enable_prefix_caching": bool(random.integers(2)),
    }
    if is_moe:
        options["return_routing"] = str(random.choice(["none", "output", "all"]))
        options["expert_rebalance_interval"] = [None, 1, 5][int(random.integers(3))]
        options["num_redundant_experts"] = 0 if experts == 1 else experts * int(random.integers(2))
    return options


def client(engine: RolloutEngine, number: int, seed: int, seen: Seen) -> None:
    """Generates and scores; some calls are aborted on the way."""
    random = np.random.default_rng([seed, number])
    common = np.random.default_rng(seed).integers(0, VOCAB, 60).tolist()
    for call in range(CALLS_PER_CLIENT):
        prompts = []
        for _ in range(int(random.integers(1, 4))):
            shared = common[: int(random.choice([0, 8, 24, 40]))]
            prompts.append(shared + random.integers(0, VOCAB, random.integers(1, 12)).tolist())
        params = [
            SamplingParams(
                n=int(random.integers(1, 4)),
                max_tokens=int(random.choice([1, 2, 20])),
                seed=int(random.integers(1 << 30)),
                ignore_eos=True,
            )
            for _ in prompts
        ]
        if seen.rollouts and random.integers(4) == 0:
            tokens = whole(seen.rollouts[int(random.integers(len(seen.rollouts)))])
            if len(tokens) > 1:
                policy = "reference" if random.integers(2) else "policy"
                (score,) = awake(lambda tokens=tokens, policy=policy: engine.score([tokens], policy=policy))
                (seen.pinned_scores if policy == "reference" else seen.scores).append((tokens, score))
            continue
        names = [f"client{number}-{call}-{index}" for index in range(len(prompts))]
        steps = engine.metrics()["steps"]
        aborter = None
        if random.integers(4) == 0:
            after = steps + int(random.integers(0, 12))

            def abort(after: float = after, names: list[str] = names) -> None:
                wait_until(lambda: engine.metrics()["steps"] >= after or engine.metrics()["waiting"] == 0)
                engine.abort(names[-1])

            aborter = threading.Thread(target=abort)
            aborter.start()
        seen.rollouts += awake(
            lambda prompts=prompts, params=params, names=names: engine.generate(prompts, params, request_ids=names)
        )
        if aborter is not None:
            aborter.join()


def awake(call: Callable[[], Any]) -> Any:
    """The call's result, tried again while the engine is asleep."""
    results: list[Any] = []

    def succeeds() -> bool:
        try:
            results.append(call())
        except EngineAsleepError:
            return False
        return True

    wait_until(succeeds)
    return results[0]


def operator(engine: RolloutEngine, seed: int, tensors_of: Callable[[int], Any], done: threading.Event) -> None:
    """Updates the weights, moves experts, forgets prefixes, and puts the engine to sleep, until `done` or bored."""
    random = np.random.default_rng([seed, 99])
    version = 0
    while version < MAX_UPDATES and not done.wait(float(random.uniform(0.0, 0.06))):
        action = int(random.integers(8))
        if action < 4:
            version += 1
            mode = str(random.choice(["wait", "keep", "in_place", "abort"]))
            staleness = None if mode in ("wait", "abort") or random.integers(2) else 1
            engine.update_weights(tensors_of(version), mode=mode, max_staleness=staleness)
        elif action == 4:
            engine.rebalance_experts()
        elif action == 5:
            engine.reset_prefix_cache()
        elif action == 6:
            engine.sleep(["kv_cache"] if random.integers(2) else None)
            engine.wake_up()
        else:
            engine.pin_weights("other")
            engine.drop_weights("other")


def soak(folder: Path, seed: int, is_moe: bool) -> tuple[dict[str, float], int]:
    """Run a random engine and compare all that it gave; its metrics, and the number of values that differ."""
    random = np.random.default_rng(seed)
    options = random_ranks(random, is_moe)
    print(options)  # shown where the test fails
    model = ModelConfig.from_json(str(folder))

    def tensors_of(version: int) -> Any:
        return random_tensors(model, version, gain=2.0) if is_moe else tiny_tensors(version)

    seen = [Seen() for _ in range(NUM_CLIENTS)]
    errors: list[BaseException] = []
    done = threading.Event()

    def guarded(work: Callable[..., None], *given: Any) -> threading.Thread:
        def run() -> None:
            try:
                work(*given)
            except BaseException as error:  # noqa: BLE001 - shown by the test
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    with on_ranks(folder, **options) as engine:
        engine.pin_weights("reference")
        clients = [guarded(client, engine, number, seed, one) for number, one in enumerate(seen)]
        changes = guarded(operator, engine, seed, tensors_of, done)
        for thread in clients:
            thread.join(120)
        done.set()
        changes.join(30)
        assert not any(thread.is_alive() for thread in [*clients, changes]), "a call hangs"
        if errors:
            raise errors[0]
        engine._scheduler.check_integrity()
        metrics = engine.metrics()
        assert metrics["free_blocks"] == metrics["total_blocks"] and not engine._scheduler.requests
        last = engine.get_weight_version()
    routing = options.get("return_routing", "none")
    with on_ranks(folder, num_blocks=512, return_routing=routing) as plain:
        return metrics, num_differing(plain, seen, last, tensors_of)


def num_differing(plain: RolloutEngine, seen: Sequence[Seen], last: int, tensors_of: Callable[[int], Any]) -> int:
    """Values that the plain engine, brought to each version in turn, does not give."""
    rollouts = [rollout for one in seen for rollout in one.rollouts if not rollout.num_kept_updates]
    scores = [score for one in seen for score in one.scores]
    unexplained = set(range(len(scores)))
    count = 0
    for version in range(last + 1):
        if version:
            plain.update_weights(tensors_of(version))
        else:
            for tokens, score in (score for one in seen for score in one.pinned_scores):
                count += differing(score, plain.score([tokens])[0])
        count += sum(one.count for one in differences(plain, rollouts, version))
        same = plain.score([tokens for tokens, _ in scores]) if scores else []
        unexplained -= {index for index, (_, score) in enumerate(scores) if differing(score, same[index]) == 0}
    return count + len(unexplained)


def whole(rollout: Rollout) -> list[int]:
    """Prompt and output."""
    tokens: list[int] = np.concatenate([rollout.prompt_token_ids, rollout.token_ids]).tolist()
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(8, 60))])
def test_random_traffic_on_random_ranks(tiny_model: Path, moe_model: Path, seed: int) -> None:
    children = children_of(os.getpid())
    metrics, differ = soak(moe_model if seed % 2 else tiny_model, seed, bool(seed % 2))
    assert differ == 0 and metrics["steps"] > 0
    assert children_of(os.getpid()) == children and segments_of(os.getpid()) == []


@pytest.mark.slow
def test_negative_control_blocks_handed_over_in_a_wrong_order_are_seen(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handovers = Residents.handovers

    def reversed_blocks(self: Residents, step: int) -> tuple[Handover, ...]:
        moves = handovers(self, step)
        return tuple(move._replace(source_blocks=move.source_blocks[::-1]) for move in moves)

    monkeypatch.setattr(Residents, "handovers", reversed_blocks)
    metrics, differ = soak(tiny_model, 4, is_moe=False)
    assert metrics["handovers"] > 0 and differ > 0
