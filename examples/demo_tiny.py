"""The same loop on a tiny random model with a toy task that it visibly learns in about a minute.

    make demo-tiny                (GRPO)
    make demo-tiny ALGO=ppo       (PPO with a value head)

The task: go on repeating the token that the prompt ends with. The reward is the fraction of generated tokens that are
right, so chance is 1 in 16.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from run_display import RunDisplay, exit_status, print_verdict

from zerokl.integrations.grpo_trainer import GRPOConfig, GRPOTrainer
from zerokl.integrations.policy_model import PolicyModel
from zerokl.integrations.ppo_trainer import PPOConfig, PPOTrainer
from zerokl.integrations.trainer import PolicyTrainer
from zerokl.kernels.dispatch import fill_weights
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_config
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.weight_sync.publisher import WeightPublisher

VOCABULARY = 16
PROMPT_TOKENS = 3
OUTPUT_TOKENS = 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", choices=["grpo", "ppo"], default="grpo")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--prompts", type=int, default=64, help="prompts per step")
    parser.add_argument("--samples", type=int, default=8, help="answers per prompt")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def reward(rollout: Rollout) -> float:
    """Fraction of the generated tokens that repeat the prompt's last one."""
    return float(np.mean(rollout.token_ids == rollout.prompt_token_ids[-1]))


def make_model(folder: Path, seed: int) -> None:
    """A Llama of two layers with random weights, as a model folder."""
    content = tiny_config(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, head_dim=8, eos_token_id=None)
    save_pretrained(folder, content, random_tensors(ModelConfig.from_json(content), seed))


def make_trainer(
    algo: str, policy: PolicyModel, engine: RolloutEngine, publisher: WeightPublisher, n: int
) -> PolicyTrainer:
    params = SamplingParams(n=n, max_tokens=OUTPUT_TOKENS)
    if algo == "ppo":
        ppo = PPOConfig(sampling_params=params, learning_rate=5e-3, micro_batch_tokens=4096, epochs=2)
        return PPOTrainer(policy, engine, publisher, reward, ppo)
    grpo = GRPOConfig(sampling_params=params, learning_rate=3e-3, micro_batch_tokens=4096)
    return GRPOTrainer(policy, engine, publisher, reward, grpo)


def main() -> int:
    args = arguments()
    rng = np.random.default_rng(args.seed)
    display = RunDisplay(f"{args.algo.upper()}, tiny model, CPU", args.steps)
    with tempfile.TemporaryDirectory(prefix="zerokl-tiny-") as scratch:
        folder = Path(scratch)
        make_model(folder, args.seed)
        config = EngineConfig(model=str(folder), kv_cache_bytes=8 << 20, max_num_seqs=256, seed=args.seed)
        with RolloutEngine(config) as engine, WeightPublisher(fill=fill_weights) as publisher, display:
            policy = PolicyModel.from_pretrained(folder)
            trainer = make_trainer(args.algo, policy, engine, publisher, args.samples)
            trainer.on_phase = display.phase
            for _ in range(args.steps):
                prompts = rng.integers(0, VOCABULARY, (args.prompts, PROMPT_TOKENS)).tolist()
                display.add(trainer.step(prompts))
    display.finish()
    rewards = [report.reward_mean for report in display.reports]
    print(f"mean reward {rewards[0]:.3f} in the first step, {np.mean(rewards[-10:]):.3f} over the last ten")
    return print_verdict(display.reports)


if __name__ == "__main__":
    sys.exit(exit_status(main))
