"""What the GPU worker asks of Paddle: memory, copies and streams, and no computation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zerokl.integrations
import zerokl.kernels
import zerokl.rollout

ROOMS = [Path(next(iter(room.__path__))) for room in (zerokl.kernels, zerokl.rollout)]
SOURCES = [*(ROOMS[0] / "gpu").glob("*.py"), *ROOMS[1].rglob("*.py")]
TRAINER = [Path(next(iter(zerokl.integrations.__path__))) / f"policy_{name}.py" for name in ("forward", "gpu", "model")]
"""What a `PolicyModel` on a GPU runs beside these."""
ALLOWED = re.compile(
    r"paddle\.(empty|to_tensor|set_device|CUDAPlace|device\.is_compiled_with_cuda|device\.cuda\.(current_stream"
    r"|device_count|empty_cache|get_device_capability))$"
)
ALLOWED_IN_TRAINER = re.compile(
    r"paddle\.(Tensor|float32|get_device|is_grad_enabled|nn\.(Layer|initializer\.Initializer))$"
)


def computations(source: str) -> list[str]:
    """Names of Paddle in code, strings and comments left out, that are not on the list."""
    code = re.sub(r'"""(.|\n)*?"""|#.*|"[^"\n]*"', "", source)
    return [name for name in re.findall(r"\bpaddle\.[\w.]+", code) if not ALLOWED.match(name)]


def test_the_gpu_worker_uses_no_operator_of_paddle():
    assert len(SOURCES) > 50
    assert {path.name: found for path in SOURCES if (found := computations(path.read_text()))} == {}


def test_a_trainers_forward_on_a_gpu_uses_no_operator_of_paddle():
    found = {name for path in TRAINER for name in computations(path.read_text())}
    assert {name for name in found if not ALLOWED_IN_TRAINER.match(name)} == set()
    assert "paddle.nn.initializer.Initializer" in found, "the control: names are found there"


def test_paddle_is_imported_in_two_modules_of_the_gpu_path():
    importing = {path.name for path in SOURCES if re.search(r"^\s*(import|from) paddle\b", path.read_text(), re.M)}
    assert importing <= {"driver.py", "paddle_device.py"}, importing


@pytest.mark.parametrize("line", ["x = paddle.concat([a, b])", "y = paddle.nn.functional.relu(x)", "paddle.zeros([2])"])
def test_an_operator_is_found(line):
    """The control."""
    assert computations(f'"""Talks of paddle.matmul."""\n{line}\n')


WITHOUT_EXTENSION = """
import sys
sys.modules["zerokl.kernels.cpu._cpu"] = None
from zerokl.kernels import dispatch
ops = dispatch.get_ops("reference")
assert not dispatch.embeds_from_head(ops)
assert dispatch.weight_packer(ops, {})[0] is ops
assert "zerokl.kernels.cpu.ops" not in sys.modules
"""


TRAINER_WITHOUT_EXTENSION = """
import sys
sys.modules["zerokl.kernels.cpu._cpu"] = None
import zerokl.integrations.policy_model
import zerokl.kernels.packed_step
assert not {"zerokl.kernels.cpu.ops", "zerokl.kernels.autograd.ops"} & set(sys.modules)
"""


@pytest.mark.parametrize("program", [WITHOUT_EXTENSION, TRAINER_WITHOUT_EXTENSION])
def test_other_devices_place_weights_and_run_forwards_without_the_extension(program):
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, **path})
