"""Fixtures and markers of the whole suite."""

import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A folder of ours named like an installed package (`kernels`) must never win over it: tests import zerokl.* alone.
sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != ROOT]
sys.path.append(str(ROOT / "tests"))
# A shell starts its background jobs with SIGINT ignored; tests of Ctrl-C would wait for ever there.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_folder():
    """The real model's folder, fetched and converted once a checkout (or taken from ZEROKL_SMOLLM2)."""
    from zerokl.integrations.smollm2 import DEFAULT_FOLDER, model_folder

    return model_folder(Path(os.environ.get("ZEROKL_SMOLLM2", ROOT / DEFAULT_FOLDER)))
