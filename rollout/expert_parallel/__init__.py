"""Ranks that share a model: who holds which experts, and how rows, blocks and weights travel between them."""
