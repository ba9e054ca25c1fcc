"""What is installed equals what is in the folders, every module imports, and none of them brings torch."""

import importlib
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("rollout", "weight_sync", "kernels", "integrations")
NEEDS_GPU = ("zerokl.kernels.gpu", "zerokl.integrations.policy_gpu")  # import Triton, which only the gpu extra installs


def module_names():
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(("zerokl", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def test_every_room_is_installed_from_this_checkout():
    for room in ROOMS:
        module = importlib.import_module(f"zerokl.{room}")
        assert Path(module.__file__).resolve() == ROOT / room / "__init__.py"
        assert (ROOT / room / "py.typed").exists()


def test_every_folder_of_a_room_is_a_package():
    for room in ROOMS:
        for folder in {path.parent for path in (ROOT / room).rglob("*.py")}:
            assert (folder / "__init__.py").exists(), folder


def test_every_environment_variable_is_in_the_documentation():
    page = (ROOT / "docs" / "architecture.md").read_text()
    sources = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    names = {name for path in sources for name in re.findall(r"\bZEROKL_[A-Z0-9_]+", path.read_text())}
    assert len(names) >= 2
    assert not [name for name in names if f"| `{name}` |" not in page]


def test_all_modules_import_without_torch():
    names = [name for name in module_names() if not name.startswith(NEEDS_GPU)]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c",
    code],
                          capture_output=True, text=True, cwd="/")  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_importing_a_room_is_light(room):
    """A room's __init__ is lazy: importing it loads neither the extension nor Paddle."""
    code = (
        f"import sys, zerokl.{room}\n"
        "heavy = {'paddle', 'triton', 'zmq', 'safetensors', 'zerokl.kernels.cpu._cpu'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_version_is_known():
    assert version("zerokl").count(".") == 2
    assert version("zerokl") in (ROOT / "CHANGELOG.md").read_text()
