"""Log lines of a server process: JSON, one a line, with ids, without prompts."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from server_process import address_of, server_process

from zerokl.rollout.client import RolloutClient
from zerokl.rollout.errors import reason_of
from zerokl.rollout.observe.logs import JsonFormatter, TextFormatter
from zerokl.rollout.sampling_params import SamplingParams

SECRET = "a very secret prompt"
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, seed=1)


def record(event: str, exc_info: Any = None, **extra: Any) -> logging.LogRecord:
    line = logging.LogRecord("zerokl.x", logging.WARNING, "file.py", 1, event, (), exc_info)
    vars(line).update(extra)
    return line


def test_the_two_forms_of_a_line() -> None:
    line = record("it happened", request_id="a b", rank=3, seconds=0.123456789, odd=Path("x"), level="mine")
    parsed = json.loads(JsonFormatter().format(line))
    assert parsed.pop("time").endswith("Z")
    expected = {"level": "warning", "logger": "zerokl.x", "event": "it happened", "request_id": "a b", "rank": 3}
    assert parsed == {**expected, "seconds": 0.123456789, "odd": "x"}, "what every line has cannot be overwritten"
    text = TextFormatter().format(line)
    assert text.endswith('WARNING zerokl.x: it happened request_id="a b" rank=3 seconds=0.123457 odd=x level=mine')
    broken = TextFormatter().format(record("x", request_id="one\nFORGED line"))
    assert "\n" not in broken, "a client's id cannot begin a line of its own"
    try:
        raise OSError("broken")
    except OSError:
        failed = record("x", sys.exc_info())
    assert "OSError: broken" in json.loads(JsonFormatter().format(failed))["exception"]
    assert "\n" not in JsonFormatter().format(failed) and "OSError: broken" in TextFormatter().format(failed)


def test_a_reason_leaves_the_value_out() -> None:
    error = ValueError(f"token_ids[0] must be token ids: scoring takes no text, got {SECRET!r}")
    assert reason_of(error) == "ValueError: token_ids[0] must be token ids: scoring takes no text"


def test_a_servers_lines_tell_each_requests_life(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--log-format", "json", "--log-level", "debug", "--set", "max_num_seqs=1")
    with server_process(tiny_model, f"ipc://{tmp_path}/socket", *options) as server:
        with RolloutClient(address_of(server), name="me") as client:
            rollout, _ = client.generate([SECRET, SECRET], PARAMS, request_ids=["one", "two"])
            with pytest.raises(ValueError, match="over max_model_len"):
                client.generate(SECRET, SamplingParams(max_tokens=9999), request_ids=["long"])
            client.pause_generation("abort")
            client.resume_generation()
        server.terminate()
        _, err = server.communicate(timeout=20)
    lines = [json.loads(line) for line in err.splitlines()]
    assert all({"time", "level", "logger", "event"} <= set(line) for line in lines)
    assert all(line["logger"].startswith("zerokl.") for line in lines)
    life = [line for line in lines if line.get("request_id") == "one/0"]
    stations = ["request received", "request admitted", "first token", "request finished"]
    assert [line["event"] for line in life] == stations
    assert life[-1]["reason"] == "length" and life[-1]["num_output_tokens"] == 6 and life[-1]["version"] == 0
    (admitted,) = [line for line in lines if line.get("request_id") == "two/0" and line["event"] == "request admitted"]
    assert admitted["waited_for"] == "slots" and admitted["rank"] == 0
    (rejected,) = [line for line in lines if line["event"] == "call rejected"]
    assert rejected["level"] == "info" and rejected["request_ids"] == ["long"] and rejected["client"] == "me"
    assert "over max_model_len" in rejected["reason"]
    done = [line for line in lines if line["event"] == "call done" and line["kind"] == "generate"]
    assert done[0]["request_ids"] == ["one", "two"]
    for tokens in (rollout.prompt_token_ids, rollout.token_ids):
        assert str(tokens.tolist())[1:-1] not in err
    assert SECRET not in err and str(rollout.text) not in err
