"""Modules of benchmarks and benchmarks/gpu are imported by their own names, as their scripts import each other."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "gpu")]
