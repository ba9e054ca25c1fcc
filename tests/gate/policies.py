"""The policies that the gate samples from: weights in two versions, the trainer's model of each, and the plain runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from exactness_harness import SETTINGS, Job
from numpy.typing import NDArray

from zerokl.integrations.batch import pack_rollouts
from zerokl.integrations.policy_model import PolicyModel
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_config, tiny_moe_config
from zerokl.rollout.outputs import Rollout
from zerokl.weight_sync import WeightPublisher

Key = tuple[int, int]
"""Prompt index and sample index."""
Floats = NDArray[np.float32]

WAYS_TO_SAMPLE = [SETTINGS[name] for name in ("temperature 1", "temperature 0.7", "top-p 0.95", "temperature 0")]
PROMPT_LENGTHS = (1, 5, 17, 40, 63, 64, 100, 103)
COMMON = 70
"""Tokens that the two longest prompts of every eight begin with in common."""
PACK = 5
"""Sequences in one forward of the trainer; the engine's batches are others."""


@dataclass(frozen=True)
class Size:
    """How much is sampled from each policy."""

    prompts: int = 8
    samples: int = 2
    tokens: int = 24


@dataclass
class GatePolicy:
    """One policy: its folder and job, and a trainer's model for each version of the weights."""

    name: str
    job: Job
    trainers: Sequence[PolicyModel]
    plain: list[dict[Key, Rollout]] = field(default_factory=list)
    """The plain run's rollouts, by version."""

    @property
    def is_moe(self) -> bool:
        """Whether the model has mixtures of experts."""
        return self.trainers[0].config.moe is not None

    def publish(self, publisher: WeightPublisher, version: int) -> Any:
        """What `update_weights` takes."""
        return publisher.publish(self.trainers[version].named_arrays(), version=version)

    def trainer_logprobs(self, rollouts: Sequence[Rollout]) -> list[Floats]:
        """The trainer's forward on each rollout's tokens, by the weights that sampled them.

        Where the rollouts have their routing it is replayed.
        """
        logprobs = [np.zeros(len(rollout.token_ids), np.float32) for rollout in rollouts]
        groups: dict[tuple[int, float], list[int]] = {}
        for index, rollout in enumerate(rollouts):
            for _, _, version in rollout.version_spans:
                # At temperature 0 the policy's distribution is the one at 1.
                groups.setdefault((version, rollout.sampling_params.temperature or 1.0), []).append(index)
        for (version, temperature), members in groups.items():
            for start in range(0, len(members), PACK):
                batch = pack_rollouts(rollouts, members[start : start + PACK])
                values, _ = self.trainers[version].logprobs(
                    batch.token_ids, batch.cu_seqlens, temperature, batch.rows, routing=batch.routing
                )
                for index, some in zip(batch.indices, np.split(values.numpy(), batch.cu_rows[1:-1]), strict=True):
                    own = rollouts[index].policy_versions == version
                    logprobs[index][own] = some[own]
        return logprobs


def synthetic_policy(name: str, folder: Path, size: Size) -> GatePolicy:
    """A tiny random model, "dense" (Llama) or "moe" (ERNIE 4.5: shared experts and a correction of the choice)."""
    changes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "eos_token_id": 256}
    content = tiny_moe_config("Ernie4_5_MoeForCausalLM", **changes) if name == "moe" else tiny_config(**changes)
    save_pretrained(folder, content, random_tensors(ModelConfig.from_json(content), gain=2.0))
    return folder_policy(name, folder, size)


def folder_policy(name: str, folder: Path, size: Size) -> GatePolicy:
    """A model folder's policy; version 1 of its weights is version 0 with every value a little off."""
    first = PolicyModel.from_pretrained(folder)
    second = PolicyModel(first.config, perturbed(dict(first.named_arrays())))
    prompts = random_prompts(size.prompts, first.config.vocab_size)
    job = Job(folder=folder, prompts=prompts, n=size.samples, max_tokens=size.tokens)
    return GatePolicy(name, job, (first, second))


def perturbed(tensors: Mapping[str, Floats]) -> dict[str, Floats]:
    """Every value times 1 + noise of 2^-5: another policy of the same kind."""
    random = np.random.default_rng(1)
    return {
        name: values * (1 + random.standard_normal(values.shape, np.float32) / np.float32(32))
        for name, values in tensors.items()
    }


def random_prompts(count: int, vocab_size: int) -> list[NDArray[np.int32]]:
    """Prompts within and beyond one attention split of 64 keys, two of every eight with a long common start."""
    random = np.random.default_rng(7)
    common = random.integers(0, vocab_size, COMMON)
    prompts = []
    for index in range(count):
        prompt = random.integers(0, vocab_size, PROMPT_LENGTHS[index % len(PROMPT_LENGTHS)])
        prompt[:COMMON] = common[: len(prompt)] if len(prompt) > COMMON else prompt[:COMMON]
        prompts.append(prompt.astype(np.int32))
    return prompts
