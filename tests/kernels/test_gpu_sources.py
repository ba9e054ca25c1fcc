"""What the GPU worker asks of Paddle: memory, copies and streams, and no computation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

ROOT = Path(__file__).resolve().parents[2]  # an installed room may have a folder of its extension alone first
SOURCES = [*(ROOT / "kernels/gpu").glob("*.py"), *(ROOT / "rollout").rglob("*.py")]
TRAINER = [ROOT / "integrations" / f"policy_{name}.py" for name in ("forward", "gpu", "model")]
"""What a `PolicyModel` on a GPU runs beside these."""
ALLOWED = re.compile(
    r"paddle\.(empty|to_tensor|get_device|set_device|CUDAPlace|device\.is_compiled_with_cuda|device\.cuda\.(current_stream"
    r"|device_count|empty_cache|get_device_capability))$"
)
ALLOWED_IN_TRAINER = re.compile(
    r"paddle\.(Tensor|float32|get_device|is_grad_enabled|nn\.(Layer|initializer\.Initializer))$"
)


def names_of_paddle(source: str) -> list[str]:
    """As they stand in code, strings and comments left out."""
    return re.findall(r"\bpaddle\.[\w.]+", re.sub(r'"""(.|\n)*?"""|#.*|"[^"\n]*"', "", source))


def computations(source: str) -> list[str]:
    """Names of Paddle that are not on the list."""
    return [name for name in names_of_paddle(source) if not ALLOWED.match(name)]


def missing(names: Iterable[str]) -> set[str]:
    """Those of dotted names that the installed Paddle does not have."""

    def is_there(name: str) -> bool:
        owner: Any = paddle
        for part in name.split(".")[1:]:
            if not hasattr(owner, part):
                return False
            owner = getattr(owner, part)
        return True

    return {name for name in names if not is_there(name)}


def test_the_gpu_worker_uses_no_operator_of_paddle():
    assert {path.parent.name for path in SOURCES} >= {"gpu", "rollout"}, "the control: these are what is read"
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


def test_the_installed_paddle_has_every_name_that_is_used():
    used = {name for path in SOURCES for name in names_of_paddle(path.read_text())}
    assert "paddle.device.cuda.current_stream" in used
    assert missing(used) == set()
    assert missing(["paddle.empty", "paddle.device.cuda.no_such_name"]) == {"paddle.device.cuda.no_such_name"}


def test_tensors_of_the_installed_paddle_are_what_the_kernels_take_them_for():
    """Patterns become bfloat16 and come back, types have the names that kernels go by, and pieces are views: what any
    Paddle from 2.6 on must do, here on the CPU.
    """
    patterns = np.array([[0x3F80, 0x4000, 0xC040]], np.uint16)
    tensor = paddle.to_tensor(patterns, place=paddle.CPUPlace())
    assert str(tensor.dtype).rpartition(".")[2] == "bfloat16"
    np.testing.assert_array_equal(np.asarray(tensor.numpy()), patterns)
    rows, columns = tensor.shape
    assert (rows, columns) == (1, 3)
    for name, size in (("bfloat16", 2), ("float32", 4), ("int32", 4), ("int64", 8)):
        whole = paddle.empty([24], name)
        assert str(whole.dtype).rpartition(".")[2] == name
        piece = whole[8:20]
        assert piece.data_ptr() == whole.data_ptr() + 8 * size
        assert piece.reshape([3, 4]).data_ptr() == piece.data_ptr() and piece.reshape([3, 4]).is_contiguous()


def test_streams_of_the_installed_paddle_have_handles():
    if not paddle.device.is_compiled_with_cuda():
        pytest.skip("needs Paddle's GPU build")
    stream = paddle.base.core.CUDAStream
    assert hasattr(stream, "cuda_stream") and hasattr(stream, "synchronize")


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
