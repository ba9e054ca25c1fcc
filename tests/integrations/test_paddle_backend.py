"""The check of the installed Paddle, with the package metadata replaced."""

from importlib import metadata

import pytest

from zerokl.integrations import paddle_backend


@pytest.fixture
def installed(monkeypatch):
    """Pretend that exactly the given distributions are installed."""

    def pretend(**versions):
        names = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(name):
            if name not in names:
                raise metadata.PackageNotFoundError(name)
            return names[name]

        monkeypatch.setattr(paddle_backend.metadata, "version", version)

    return pretend


def test_the_real_installation_imports():
    assert paddle_backend.import_paddle().__name__ == "paddle"


@pytest.mark.parametrize(
    "versions",
    [
        {"numpy": "2.4.6", "paddlepaddle": "3.3.1"},
        {"numpy": "2.4.6", "paddlepaddle_gpu": "3.0.0"},
        {"numpy": "1.26.4", "paddlepaddle_gpu": "2.6.2"},
        {"numpy": "1.26.4", "paddlepaddle": "3.0.0b1"},
    ],
)
def test_good_installations(installed, versions):
    installed(**versions)
    paddle_backend.check_installation()


def test_neither_extra(installed):
    installed(numpy="2.4.6")
    with pytest.raises(ImportError, match=r"zerokl\[cpu\].*zerokl\[gpu\]"):
        paddle_backend.import_paddle()


def test_both_extras(installed):
    installed(numpy="2.4.6", paddlepaddle="3.3.1", paddlepaddle_gpu="3.3.1")
    with pytest.raises(ImportError, match=r"both installed.*pip uninstall paddlepaddle paddlepaddle-gpu"):
        paddle_backend.import_paddle()


def test_old_paddle_under_numpy_2(installed):
    installed(numpy="2.0.0", paddlepaddle_gpu="2.6.2")
    with pytest.raises(ImportError, match=r"paddlepaddle-gpu 2\.6\.2 .* NumPy 2\.0\.0.*numpy<2"):
        paddle_backend.import_paddle()
