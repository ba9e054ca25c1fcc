"""What `rollout-top` shows: frames as text at two widths, and the command against a server that comes and goes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from server_process import address_of, server_process
from tiny_engine import tiny_tensors

from zerokl.rollout.client import RolloutClient
from zerokl.rollout.observe import top
from zerokl.rollout.observe.top import Watcher
from zerokl.rollout.observe.top_view import MAX_RANKS, Frame, Reading
from zerokl.rollout.sampling_params import SamplingParams

PARAMS = SamplingParams(n=4, max_tokens=12, ignore_eos=True, seed=1)

METRICS_OPTIONS = ["--model", "x", "--bind", "tcp://127.0.0.1:0", "--metrics-bind", "127.0.0.1:0"]


def shown(frame: Frame, width: int = 80, *, styled: bool = False) -> str:
    """The frame as a terminal of so many columns has it; with `styled` also its colours."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=width, record=True, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(frame.render())
        return console.export_text(styles=styled)


def row(text: str, name: str) -> list[str]:
    """The words after a row's name, up to the panel's edge."""
    (line,) = [line for line in text.splitlines() if f" {name} " in line]
    return line.partition(f" {name} ")[2].partition("│")[0].split()


def reading(telemetry: Any, seconds: float) -> Reading:
    return Reading(telemetry=telemetry, seconds=seconds)


@pytest.mark.parametrize("width", [80, 120])
def test_a_frame_has_the_servers_numbers(client: RolloutClient, width: int) -> None:
    before = client.telemetry()
    rollouts = client.generate(["a", "hello"], PARAMS)
    client.update_weights(tiny_tensors(1))
    client.report_trainer_logprobs(rollouts, [one.policy_logprobs for one in rollouts])
    client.pin_weights("start")
    now = client.telemetry()
    text = shown(Frame(endpoint="tcp://x", now=reading(now, 3.0), before=reading(before, 1.0)), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width and "…" not in text, "nothing is cut"
    assert lines[0].split() == ["rollout-top", "running", "version", "1", "48", "tokens/s", "1", "clients", "tcp://x"]
    rank = next(line for line in lines if line.split()[:2] == ["0", "mixed"]).split()
    assert rank[2:4] == ["idle", "0"] and rank[-2:] == ["48", str(now["health"]["ranks"][0]["pid"])]
    assert row(text, "stop, length, abort") == ["0", "8", "0"]
    assert row(text, "updates, failed") == ["1", "0"] and row(text, "pinned") == ["start", "1"]
    assert row(text, "tokens by version 0") == ["96"]
    assert row(text, "k3 mean") == ["0.0"] and row(text, "differing logprobs") == ["0", "of", "96"]
    assert len(row(text, "queue wait p50, p99")) == 4, "two durations with their units"


def test_an_alarm_is_red_and_exactness_is_not(client: RolloutClient) -> None:
    rollouts = client.generate("a", PARAMS)
    logprobs = [one.policy_logprobs.copy() for one in rollouts]
    client.report_trainer_logprobs(rollouts, logprobs)
    exact = Frame(endpoint="x", now=reading(client.telemetry(), 1.0))
    logprobs[0][2] = np.nextafter(logprobs[0][2], np.float32(0))
    client.report_trainer_logprobs(rollouts, logprobs)
    alarm = Frame(endpoint="x", now=reading(client.telemetry(), 1.0))
    red = "\x1b[1;31m"
    assert "ALARM" in shown(alarm) and f"{red}mismatch KL ALARM" in shown(alarm, styled=True).replace(" mis", "mis")
    assert "ALARM" not in shown(exact) and red not in shown(exact, styled=True)


def test_many_ranks_fit(client: RolloutClient) -> None:
    now = copy.deepcopy(client.telemetry())
    one = now["health"]["ranks"][0]
    ranks = [{**one, "rank": rank, "role": "decode", "running": rank % 7} for rank in range(64)]
    ranks[5] |= {"free_blocks": 2, "state": "restarting"}
    now["health"]["ranks"] = ranks
    text = shown(Frame(endpoint="x", now=reading(now, 1.0)))
    assert sum("decode" in line for line in text.splitlines()) == MAX_RANKS and "and 48 more ranks" in text
    assert "restarting" in text and "99%" in text


def test_rates_are_unknown_after_a_restart(client: RolloutClient) -> None:
    empty = client.telemetry()
    client.generate("a", PARAMS)
    frame = Frame(endpoint="x", now=reading(empty, 2.0), before=reading(client.telemetry(), 1.0))
    assert "– tokens/s" in shown(frame)


def run_top(endpoint: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zerokl.rollout.observe.top", endpoint, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env={**os.environ, "COLUMNS": "100"})


def test_the_command_shows_a_server_and_outlives_it(tiny_model: Path, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/socket"
    watcher = Watcher(endpoint, None, None)
    with server_process(tiny_model, endpoint, "--metrics-bind", "127.0.0.1:0") as server:
        with RolloutClient(address_of(server)) as client:
            client.generate("a", PARAMS)
        done = run_top(endpoint, "--once", "--interval", "0.1")
        assert (done.returncode, done.stderr) == (0, "")
        assert "running  version 0  0 tokens/s" in done.stdout and row(done.stdout, "stop, length, abort")[1] == "4"
        assert "\x1b" not in done.stdout, "a pipe gets no escapes"
        assert watcher.read().problem is None
    frame = watcher.read()
    assert frame.problem is not None and frame.now is not None, "the last figures stay, and are said to be old"
    assert "gone" in shown(frame) and "the figures below are old" in shown(frame).replace("\n", " ")
    with server_process(tiny_model, endpoint) as server:
        address_of(server)
        while watcher.read().problem is not None:  # the first call of a new session may hear of the restart
            pass
        assert "running" in shown(watcher.frame)
    watcher.close()


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("rich", "from zerokl.rollout.observe.top import main; main()"),
        (
            "prometheus_client",
            f"from zerokl.rollout.server.main import main; sys.exit(main({METRICS_OPTIONS}))",
        ),
    ],
)
def test_a_missing_extra_is_named(package: str, command: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; {command}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode in (1, 2) and "needs `pip install zerokl[server]`" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_server_and_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(top, "_ANSWER_SECONDS", 0.2)
    assert top.main([f"ipc://{tmp_path}/nobody", "--once"]) == 1
    assert "no server since" in capsys.readouterr().out
    assert top.main(["--interval", "0"]) == 2
    assert top.main(["--client-key", "x"]) == 2
    assert "server_key and client_key must be given both" in capsys.readouterr().err
