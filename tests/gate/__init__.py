"""The KL gate: scheduler variants, each held against the trainer's forward. `benchmarks/kl_gate.py` runs it whole."""
