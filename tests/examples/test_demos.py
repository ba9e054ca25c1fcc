"""The demos as a user runs them, cut short, and the parts that decide their verdict."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from leftovers import segments_of

from zerokl.integrations.report import StepReport
from zerokl.rollout.kl import kl_report

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def run(script, *arguments, cwd):
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}  # as a user has it
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_tiny_demo_ends_with_the_verdict_and_leaves_log_and_plot(tmp_path, algo):
    done = run("demo_tiny.py", "--algo", algo, "--steps", "3", "--prompts", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "mismatch k3_kl_mean 0.0"
    (folder,) = (tmp_path / "runs").iterdir()
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [step["policy_version"] for step in steps] == [1, 2, 3]
    assert steps[0]["reference"]["k3_kl_mean"] == 0.0 < steps[2]["reference"]["k3_kl_mean"]
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_ends_a_demo_with_one_line_and_leaves_nothing(tmp_path):
    command = [sys.executable, str(EXAMPLES / "demo_tiny.py")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment["TMPDIR"] = str(tmp_path)
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as demo:
        assert demo.stdout.readline().startswith(b"step 0")
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does
        _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert errors.endswith(b"interrupted\n") and b"Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert segments_of(demo.pid) == []


@pytest.mark.slow
def test_demo_on_the_real_model(tmp_path, smollm2_folder):
    done = run(
        "demo.py", "--model", str(smollm2_folder), "--steps", "2", "--prompts", "2", "--samples", "2", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "mismatch k3_kl_mean 0.0"
    assert "peak RSS" in done.stdout


def report(trainer_logprob):
    """A step whose trainer saw `trainer_logprob` where the rollout said -1."""
    return StepReport(
        step=0,
        policy_version=1,
        sync_seconds=0.1,
        rollout_seconds=1.0,
        rollout_tokens=2,
        cached_tokens=0,
        reward_mean=0.5,
        reward_std=0.5,
        mismatch=kl_report([trainer_logprob, -2.0], [-1.0, -2.0]),
        reference=kl_report([-1.0, -2.0], [-1.0, -2.0]),
        entropy=1.0,
        loss=0.0,
        train_seconds=1.0,
    )


def test_any_differing_bit_fails_the_run(examples_on_path, capsys):
    from run_display import print_verdict

    assert print_verdict([report(-1.0), report(-1.0)]) == 0
    assert capsys.readouterr().out == "mismatch k3_kl_mean 0.0\n"
    assert print_verdict([report(-1.0), report(-1.0000001)]) == 1
    assert capsys.readouterr().out != "mismatch k3_kl_mean 0.0\n"


def test_arithmetic_reward(examples_on_path):
    from arithmetic import questions, reward

    assert [reward(text, 12) for text in ("12", " 12.", "11", "7 + 5 = 12", "12 or 13", "twelve", "")] == [
        1,
        1,
        0.1,
        0.5,
        0,
        0,
        0,
    ]
    asked = questions(24, seed=0)
    assert asked == questions(24, seed=0)
    assert len({question.text for question in asked}) == 24
    assert all(eval(q.text.removeprefix("What is ").rstrip("?")) == q.answer for q in asked)
