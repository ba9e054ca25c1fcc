"""What the GPU's parts decide without a GPU: choices among products, verdicts on tools' output, the peer's process."""

from __future__ import annotations

import json
import subprocess
import sys
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import run_all
import sanitizer
from choices import Candidate, Choices, Gemm, Measured, gemms_of, our_candidates
from peer import peer_rows
from ranks import num_differing, rank_rows, with_scaling
from refusal import PartRefusedError

from zerokl.kernels.gpu.tiles import Tile
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.synthetic import tiny_config

TILE = Tile(64, 64, 128, 4, 4)
OURS, SPLIT, VENDOR = Candidate("ours"), Candidate("split_k", 4, TILE), Candidate("cublas", proposal=3)
DOWN = Gemm("down", "linear", 1024, 3072)


def test_the_fastest_is_chosen_for_its_rows() -> None:
    few = Measured(DOWN, 256, {OURS: 9e-6, SPLIT: 7e-6, VENDOR: 8e-6})
    many = Measured(DOWN, 8192, {OURS: 9e-5, VENDOR: 8e-5})
    choices = Choices([many, few])
    assert choices.find("linear", 256, 1024, 3072) == choices.find("linear", 16, 1024, 3072) == SPLIT
    assert choices.find("linear", 8192, 1024, 3072) == VENDOR
    # Proposals are for one number of rows; for others it is the vendor's favourite.
    assert choices.find("linear", 512, 1024, 3072) == Candidate("cublas", proposal=0)
    assert choices.find("linear", 8193, 1024, 3072) == OURS
    assert choices.find("swiglu", 256, 1024, 3072) == OURS
    assert few.row() == {
        "gemm": "down", "m": 256, "n": 1024, "k": 3072, "ours_us": 9.0, "split_k_us": 7.0, "cublas_us": 8.0,
        "fastest": "split_k 4 x 64x64x128",
    }  # fmt: skip
    assert Measured(DOWN, 16, {VENDOR: 1e-6, OURS: 1e-6}).fastest == OURS


def test_products_of_a_model_and_what_is_tried_for_them() -> None:
    config = ModelConfig.from_json(tiny_config(hidden_size=1024, intermediate_size=3072, head_dim=64))
    gemms = {gemm.name: gemm for gemm in gemms_of(config)}
    assert (gemms["gate_up"].n, gemms["gate_up"].k) == (6144, 1024)
    assert (gemms["qkv"].n, gemms["o"].k) == ((4 + 2 * 2) * 64, 4 * 64)
    assert our_candidates(gemms["head"], 256) == our_candidates(gemms["down"], 1024) == [OURS]
    tried = our_candidates(gemms["down"], 200)
    assert tried[0] == OURS and {candidate.parts for candidate in tried[1:]} == {2, 3, 4, 6, 8}
    assert all(candidate.tile is not None and candidate.kind == "split_k" for candidate in tried[1:])


MEMCHECK = "....\n9 passed, 12 deselected in 28.00s\n========= ERROR SUMMARY: {} errors\n"
RACECHECK = "9 passed in 3.1s\n========= RACECHECK SUMMARY: {} hazards displayed (0 errors, 0 warnings)\n"


@pytest.mark.parametrize(("tool", "output"), [("memcheck", MEMCHECK), ("racecheck", RACECHECK)])
def test_a_run_is_clean_if_tool_and_tests_say_so(tool: str, output: str) -> None:
    assert sanitizer.read(tool, output.format(0)).clean
    assert sanitizer.read(tool, output.format(2)).findings == 2
    assert not sanitizer.read(tool, output.format(1) + output.format(0)).clean


@pytest.mark.parametrize(
    "output",
    [
        "9 passed in 28.00s\n",  # killed before its summary
        "========= ERROR SUMMARY: 0 errors\n",  # no test ran
        "3 skipped, 4 deselected in 0.1s\n========= ERROR SUMMARY: 0 errors\n",
        "1 failed, 8 passed in 28.00s\n========= ERROR SUMMARY: 0 errors\n",
        "2 passed, 1 error in 28.00s\n========= ERROR SUMMARY: 0 errors\n",
    ],
)
def test_a_run_that_shows_nothing_is_not_clean(output: str) -> None:
    assert not sanitizer.read("memcheck", output).clean


def test_a_tool_that_is_not_there_is_a_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sanitizer, "_folders", lambda: iter([tmp_path]))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(PartRefusedError, match="compute-sanitizer is not on PATH"):
        sanitizer.find_program()
    # As a wheel leaves it.
    (tmp_path / sanitizer.PROGRAM).write_text("#!/bin/sh\n")
    assert sanitizer.find_program() == str(tmp_path / sanitizer.PROGRAM)
    assert subprocess.run([sanitizer.find_program()]).returncode == 0


PEER = """
import subprocess, sys
print("noise"); print('RESULT {"tok_s": 5, "arguments": %d}' % len(sys.argv), flush=True)
if LASTS:
    subprocess.run([sys.executable, "-c", "import threading; threading.Event().wait()"])
sys.exit(STATUS)
"""


@pytest.mark.parametrize(
    ("lasts", "status", "ending"), [(0, 0, None), (0, 3, "exit status 3"), (1, 0, "more than 2 s")]
)
def test_the_peer_gives_what_it_can(tmp_path: Path, lasts: int, status: int, ending: str | None) -> None:
    """One that does not end takes its own processes with it, and leaves the rows it had given."""
    script = tmp_path / "peer.py"
    script.write_text(f"LASTS, STATUS = {lasts}, {status}\n{PEER}")
    rows = peer_rows(script, tmp_path, "A", [8, 256], limit_s=2.0 if lasts else 60.0)
    assert rows[0] == {"peer": True, "tok_s": 5, "arguments": 8}
    assert [row.get("failed") for row in rows[1:]] == ([] if ending is None else [ending])


def test_parts_have_their_sizes_and_the_peer_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all.arguments(["--part", "c"]).sizes == (128,)
    assert run_all.arguments(["--part", "speed_b", "--sizes", "64"]).sizes == (64,)
    assert run_all.arguments(["--part", "cost", "--models", "B"]).models == ("B",)
    for wrong in ("--part nothing", "--part cost --peer x --peer-site y", "--part c --models A"):
        with pytest.raises(SystemExit):
            run_all.arguments(wrong.split())
    error = capsys.readouterr().err
    assert "--peer needs" in error and "--models of part c must be among" in error


def test_a_refused_part_says_so_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The last line is an object that names what is missing, the status is 2."""
    monkeypatch.setattr(sanitizer, "_folders", lambda: iter([]))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(run_all, "log_to_stdout", lambda: None)
    assert run_all.main(["--part", "sanitize", "--json"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert "part sanitize was not run: compute-sanitizer" in lines[-2]
    result = json.loads(lines[-1])
    assert result["rows"] == [] and "not on PATH" in result["refused"]


def test_a_row_that_did_not_pass_fails_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_all, "log_to_stdout", lambda: None)
    for passed in (True, False):
        monkeypatch.setitem(run_all.PARTS, "exact", lambda args, folder, passed=passed: [{"passed": passed}])
        assert run_all.main(["--part", "exact"]) == int(not passed)


def test_speed_of_ranks_is_told_over_one_rank_with_as_many_sequences() -> None:
    speeds = [("in process", 8, 90), ("in process", 8, 100), ("a process", 8, 80), ("2 processes, 2 GPUs", 8, 152)]
    rows = [{"form": form, "per_rank": size, "tok_s": speed} for form, size, speed in speeds]
    scaled = with_scaling([*rows, {"form": "a process", "per_rank": 16, "tok_s": 7}])
    assert [row.get("over_in_process") for row in scaled] == [0.9, 1.0, 0.8, 1.52, None]
    assert [row.get("over_a_process") for row in scaled] == [1.125, 1.25, 1.0, 1.9, 1.0]
    one, other = [np.array([1.0, 2.0]), np.array([3])], [np.array([1.0, 2.5]), np.array([3])]
    assert (num_differing(one, one), num_differing(one, other)) == (0, 1)


def test_ranks_without_a_gpu_are_a_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bindings = ModuleType("cuda.bindings")
    absent = IntEnum("Error", {"cudaErrorNoDevice": 100}).cudaErrorNoDevice  # type: ignore[attr-defined]
    bindings.runtime = SimpleNamespace(cudaGetDeviceCount=lambda: (absent, None))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    with pytest.raises(PartRefusedError, match=r"no GPU that CUDA can use \(cudaErrorNoDevice\)"):
        rank_rows(tmp_path, "A", (8,), 1)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(PartRefusedError, match="cuda-bindings is not installed"):
        rank_rows(tmp_path, "A", (8,), 1)
    assert list(tmp_path.iterdir()) == []
