"""Modules of benchmarks/gpu are imported by their own names, as its scripts import each other."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))
