"""What is served: a tiny model of each kind on four rank processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks_engine import SMALL, on_ranks, write_moe_model
from tiny_engine import write_tiny_model

from zerokl.rollout.engine import RolloutEngine

_BUSY: dict[str, Any] = SMALL | {
    "num_blocks": 40,  # often too few for all
    "max_num_seqs": 8,
    "max_num_batched_tokens": 48,  # prompts in chunks
    "max_rank_restarts": 1_000_000,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Four ranks of one model."""

    name: str
    options: dict[str, Any]
    """Of EngineConfig."""

    def write(self, folder: Path) -> Path:
        """The model, version 0."""
        folder.mkdir()
        return write_tiny_model(folder) if self.name == "dense" else write_moe_model(folder)

    def plain_engine(self, model: Path) -> RolloutEngine:
        """One rank in this process, with room for all."""
        routing = self.options.get("return_routing", "none")
        return on_ranks(model, num_blocks=2048, max_num_batched_tokens=2048, return_routing=routing)


LAYOUTS = {
    "dense": Layout(name="dense", options=_BUSY | {"data_parallel_size": 4}),
    "moe": Layout(
        name="moe",
        options=_BUSY
        | {
            "expert_parallel_size": 2,
            "data_parallel_size": 2,
            "return_routing": "output",
            "expert_rebalance_interval": 40,
        },
    ),
}
