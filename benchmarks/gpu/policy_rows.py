"""The trainer's forward on the GPU against rollouts, bit for bit: part `policy` of run_all.py, and a share of `exact`.

Engine and `PolicyModel` have the same random weights, or those of SmolLM2. Rollouts are decoded in batches of 1, 8, 256
and 512, then the engine goes and the trainer's packed forward scores what they said. Prompts have 256 tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import paddle
from numpy.typing import NDArray

from models import RandomTensors, model_folder, smollm2_folder
from zerokl.integrations.batch import pack_rollouts
from zerokl.integrations.policy_model import PolicyModel
from zerokl.kernels.gpu import paged_attention
from zerokl.kernels.gpu.paddle_device import PaddleDevice
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.routing import replay_arrays
from zerokl.rollout.routing_capture import RoutingCapture
from zerokl.rollout.sampling_params import SamplingParams

Counts = tuple[int, int]
MakeEngine = Callable[..., RolloutEngine]
MakePolicy = Callable[[], PolicyModel]

PROMPT, TOKENS = 256, 64
BATCHES = (1, 8, 256, 512)
SEQUENCES_AT_ONCE = {"A": 256, "B": 64, "M": 256, "SmolLM2": 256}
"""Of a packed forward, at most: what fits beside float32 parameters on an 80 GB card."""


def policy_rows(folder: Path, make_engine: MakeEngine, models: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Values compared and values that differ, per model and comparison; models of SEQUENCES_AT_ONCE."""
    for model in models:
        if model == "SmolLM2":
            yield from _smollm2(folder)
            continue
        path = model_folder(model, folder / f"policy-{model}")
        routing: dict[str, Any] = {"return_routing": "all"} if model == "M" else {}
        with make_engine(path, **routing) as engine:
            decoded = _decode(engine)
        config = ModelConfig.from_json(path)
        yield from _rows(model, decoded, lambda config=config: _random_policy(config))


def _smollm2(folder: Path) -> Iterator[dict[str, Any]]:
    path = smollm2_folder(folder)
    if path is None:
        return
    for dtype in ("bfloat16", "float32"):
        options: dict[str, Any] = {"max_model_len": 2048, "max_num_seqs": 512, "kv_cache_bytes": 4 << 30}
        with RolloutEngine(EngineConfig(model=str(path), device="gpu", dtype=dtype, **options)) as engine:
            decoded = _decode(engine)

        def make(dtype: str = dtype) -> PolicyModel:
            return PolicyModel.from_pretrained(path, device="gpu", dtype=dtype)

        yield from _rows("SmolLM2", decoded, make, f", {dtype}")


def _random_policy(config: ModelConfig) -> PolicyModel:
    tensors = RandomTensors(PaddleDevice(), config, version=0)
    return PolicyModel(config, tensors, device="gpu", dtype="bfloat16")


def _decode(engine: RolloutEngine) -> dict[int, list[Rollout]]:
    """Rollouts by the number that was decoded at once."""
    prompts = np.random.default_rng(20).integers(10, engine.model_config.vocab_size, (64, PROMPT)).astype(np.int32)
    decoded = {}
    for batch in BATCHES:
        samples = min(8, batch)
        params = SamplingParams(n=samples, max_tokens=TOKENS, ignore_eos=True, seed=21)
        decoded[batch] = engine.generate(list(prompts[: batch // samples]), params)
    return decoded


def _rows(model: str, decoded: dict[int, list[Rollout]], make: MakePolicy, note: str = "") -> Iterator[dict[str, Any]]:
    policy, at_once = make(), SEQUENCES_AT_ONCE[model]

    def row(check: str, counts: Counts) -> dict[str, Any]:
        return {"model": model, "check": check + note, "exact_values": counts[0], "differing_values": counts[1]}

    for batch, rollouts in decoded.items():
        yield row(f"PolicyModel, decoded {batch} at once", _compare(policy, rollouts, at_once))
    many = decoded[BATCHES[-2]]
    few = many[:8]
    yield row("PolicyModel, 1 sequence at a time", _compare(policy, few, 1))
    if few[0].routing is not None:
        yield row("routing of PolicyModel", _compare_routing(policy, many))
        yield row("PolicyModel, routing replayed", _compare(policy, many, at_once, replays=True))
    with _other_splits():
        yield row("control: PolicyModel in splits of 32 keys, must differ", _compare(policy, few, 8))
    _nudge(policy)
    yield row("control: PolicyModel with one weight nudged, must differ", _compare(policy, few, 8))


def _compare(policy: PolicyModel, rollouts: list[Rollout], at_once: int, *, replays: bool = False) -> Counts:
    """Policy logprobs and entropies of packed forwards, and those that are not the rollouts'."""
    values = differing = 0
    for first in range(0, len(rollouts), at_once):
        some = rollouts[first : first + at_once]
        batch = pack_rollouts(some)
        routing, weights = replay_arrays(some) if replays else (None, None)
        with paddle.no_grad():
            results = policy.logprobs(
                batch.token_ids, batch.cu_seqlens, rows=batch.rows, routing=routing, routing_weights=weights
            )
        for name, result in zip(("policy_logprobs", "entropy"), results, strict=True):
            expected = np.concatenate([getattr(rollout, name) for rollout in some])
            got = result.numpy()
            assert not np.isnan(got).any()
            values, differing = values + len(got), differing + int((got != expected).sum())
    return values, differing


def _compare_routing(policy: PolicyModel, rollouts: list[Rollout]) -> Counts:
    """Expert ids and gate weights of a packed forward, and those that are not the rollouts'."""
    batch = pack_rollouts(rollouts)
    plain, moe = policy._forward.ops, policy.config.moe
    assert moe is not None
    capture: RoutingCapture[Any] = RoutingCapture(plain, moe, plain.device.get)
    policy._forward.ops = capture.recording_ops
    with paddle.no_grad():
        policy.logprobs(batch.token_ids, batch.cu_seqlens, rows=batch.rows)
    policy._forward.ops = plain
    taken = capture.take()
    experts, weights = replay_arrays(rollouts)
    given = experts >= 0
    pairs: list[tuple[NDArray[Any], NDArray[Any]]] = [(experts, taken.experts), (weights, taken.weights)]
    return 2 * int(given.sum()), sum(int((one != other)[given].sum()) for one, other in pairs)


def _nudge(policy: PolicyModel) -> None:
    parameter = policy.named_tensors()["model.norm.weight"]
    values = parameter.numpy().copy()
    values[3] *= np.float32(1.01)
    parameter.set_value(values)


@contextlib.contextmanager
def _other_splits() -> Iterator[None]:
    with mock.patch.dict(paged_attention.attention.__kwdefaults__, {"split": 32}):
        yield
