"""Ranks in processes around a tiny Llama model, without an engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from zerokl.kernels.ops import SampleResult, StepInputs, neutral_sampling
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, step_inputs, tiny_config
from zerokl.rollout.ranks import Ranks
from zerokl.rollout.step_order import StepOrder
from zerokl.rollout.weight_source import FolderWeights
from zerokl.rollout.worker_link import RankProcesses

CONTENT = tiny_config("LlamaForCausalLM")
MODEL = ModelConfig.from_json(CONTENT)


def process_config(folder: Path, **changes: Any) -> EngineConfig:
    """Options for the model, which is written to `folder`."""
    save_pretrained(folder, CONTENT, random_tensors(MODEL, 0))
    return EngineConfig(model=str(folder), num_blocks=8, max_model_len=128, num_threads=1, worker="process", **changes)


def loaded(config: EngineConfig) -> RankProcesses:
    """Ranks with the folder's weights live."""
    ranks = RankProcesses(config)
    ranks.stage_weights(FolderWeights(path=config.model), 0)
    ranks.commit_weights()
    return ranks


def a_step(policy: str = "policy") -> StepInputs:
    """A prompt of 19 tokens with a row for each of them."""
    tokens = np.arange(1, 20, dtype=np.int32)
    rows = np.arange(19, dtype=np.int32)
    sampling = dataclasses.replace(neutral_sampling(19), seed=rows.astype(np.uint64), want_raw=True)
    return step_inputs([tokens], [0], [[5, 3]], 16, policy=policy, logit_rows=rows, sampling=sampling, step=3)


def sample(worker: Ranks, step: StepInputs) -> SampleResult:
    """What one rank makes of a step."""
    (result,) = worker.execute([StepOrder(inputs=step)])
    return result.sampled
