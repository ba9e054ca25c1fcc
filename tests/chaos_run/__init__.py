"""Chaos: a real server under random faults, and the verdict on what came back. `benchmarks/chaos.py` runs it whole."""
