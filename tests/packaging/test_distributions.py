"""The wheel and the sdist: what they hold, and that they work in an environment of their own."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("rollout", "weight_sync", "kernels", "integrations")

pytestmark = [pytest.mark.package, pytest.mark.slow]


def run(*command, cwd=ROOT):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def clean_source(tmp_path_factory):
    """The tracked and new files of the checkout, as a fresh clone would have them."""
    target = tmp_path_factory.mktemp("source")
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target


@pytest.fixture(scope="module")
def distributions(clean_source, tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, clean_source)
    run(sys.executable, "-m", "pip", "install", "--quiet", "build")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, clean_source)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_wheel_holds_every_python_file_and_no_source(distributions):
    names = set(zipfile.ZipFile(distributions[0]).namelist())
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            assert f"zerokl/{path.relative_to(ROOT)}" in names
        assert f"zerokl/{room}/py.typed" in names
    assert not [name for name in names if name.endswith((".cpp", ".h", "CMakeLists.txt"))]
    assert len([name for name in names if name.endswith(".so")]) == 1
    assert not [name for name in names if not name.startswith(("zerokl/", "zerokl-"))], (
        "something outside the namespace"
    )


def test_sdist_holds_what_a_build_needs(distributions):
    with tarfile.open(distributions[1]) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for needed in (
        "pyproject.toml",
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
        "kernels/csrc/module.cpp",
        "rollout/engine.py",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith(("models/", "runs/", ".venv/", "build/"))]


SMOKE = """
import pathlib, tempfile, zerokl.kernels
from zerokl.rollout import EngineConfig, RolloutEngine, SamplingParams
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_config
assert "site-packages" in zerokl.kernels.__file__
folder = pathlib.Path(tempfile.mkdtemp())
save_pretrained(folder, tiny_config(), random_tensors(ModelConfig.from_json(tiny_config())))
with RolloutEngine(EngineConfig(model=str(folder), worker="process")) as engine:
    (rollout,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
    (scores,) = engine.score([rollout])
    assert (scores == rollout.policy_logprobs).all()
try:
    import zerokl.integrations.policy_model as m
    m.PolicyModel(ModelConfig.from_json(tiny_config()))
    raise SystemExit("PolicyModel must need Paddle")
except ImportError as error:
    assert "zerokl[cpu]" in str(error), error
print("ok")
"""


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installed_apart_it_generates_without_paddle(distributions, tmp_path, kind):
    """A fresh environment without Paddle: the engine runs, and the trainer's part says which extra is missing."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    run(python, "-m", "pip", "install", "--quiet", distributions[0 if kind == "wheel" else 1])
    (tmp_path / "smoke.py").write_text(SMOKE)
    assert run(python, tmp_path / "smoke.py", cwd=tmp_path).strip() == "ok"
