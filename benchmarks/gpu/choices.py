"""Which way to compute a product is the fastest: candidates, their times, and the choice for a number of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from zerokl.kernels.gpu import tiles
from zerokl.kernels.gpu.tiles import Tile
from zerokl.rollout.models.config import ModelConfig

Op = Literal["linear", "swiglu", "head"]
Kind = Literal["ours", "split_k", "cublas"]
KINDS: tuple[Kind, ...] = ("ours", "split_k", "cublas")

MOST_SPLIT_ROWS = 512
"""More rows fill the chip without a split of K."""
_PARTS = (2, 3, 4, 6, 8)
_LEAST_SEGMENT = 256


@dataclass(frozen=True, slots=True)
class Gemm:
    """A product of a model: x [M, K] times a weight [N, K], of gate and up together for `swiglu`."""

    name: str
    op: Op
    n: int
    k: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to compute it: ours as it is, ours with K in parts, or one of the algorithms that cuBLASLt proposes."""

    kind: Kind
    parts: int = 1
    tile: Tile | None = None
    proposal: int = 0

    def label(self) -> str:
        """For a table."""
        if self.kind == "split_k":
            assert self.tile is not None
            return f"split_k {self.parts} x {self.tile.BLOCK_M}x{self.tile.BLOCK_N}x{self.tile.BLOCK_K}"
        return f"cublas {self.proposal}" if self.kind == "cublas" else "ours"


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of every candidate of a product at a number of rows."""

    gemm: Gemm
    rows: int
    seconds: Mapping[Candidate, float]

    @property
    def fastest(self) -> Candidate:
        """Ours where others only draw level."""
        return min(self.seconds, key=lambda candidate: (self.seconds[candidate], KINDS.index(candidate.kind)))

    def row(self) -> dict[str, Any]:
        """Microseconds of the best of each kind, and the fastest of all."""
        best = {
            f"{kind}_us": round(min(times) * 1e6, 2) if times else None
            for kind in KINDS
            for times in [[time for candidate, time in self.seconds.items() if candidate.kind == kind]]
        }
        gemm = self.gemm
        return {"gemm": gemm.name, "m": self.rows, "n": gemm.n, "k": gemm.k, **best, "fastest": self.fastest.label()}


class Choices:
    """The fastest candidates by product and rows."""

    def __init__(self, measured: Sequence[Measured]) -> None:
        self._fastest = {(m.gemm.op, m.gemm.n, m.gemm.k, m.rows): m.fastest for m in measured}
        self._rows = sorted({m.rows for m in measured})

    def find(self, op: Op, rows: int, n: int, k: int) -> Candidate:
        """For the least measured number of rows that is not less. Ours where there is none.

        Another number of rows may have other algorithms: there the vendor's favourite stands for the kind.
        """
        bucket = next((most for most in self._rows if rows <= most), None)
        found = None if bucket is None else self._fastest.get((op, n, k, bucket))
        if found is None:
            return Candidate("ours")
        return Candidate("cublas") if found.kind == "cublas" and rows != bucket else found


def gemms_of(config: ModelConfig) -> list[Gemm]:
    """The products of a dense model."""
    assert config.moe is None, "mixtures have grouped products"
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return [
        Gemm("qkv", "linear", (heads + 2 * kv_heads) * size, hidden),
        Gemm("o", "linear", hidden, heads * size),
        Gemm("gate_up", "swiglu", 2 * inner, hidden),
        Gemm("down", "linear", hidden, inner),
        Gemm("head", "head", config.vocab_size, hidden),
    ]


def our_candidates(gemm: Gemm, rows: int) -> list[Candidate]:
    """Ours as it is, and with K in parts where rows are few: in the tiles of the tables for so many rows."""
    made = [Candidate("ours")]
    if gemm.op == "head" or rows > MOST_SPLIT_ROWS:
        return made
    bound = min(most for most, _, _ in tiles.LINEAR if most is not None and rows <= most)
    shapes = dict.fromkeys(tile for most, _, tile in tiles.LINEAR if most == bound)
    parts = [count for count in _PARTS if gemm.k // count >= _LEAST_SEGMENT]
    return made + [Candidate("split_k", count, tile) for count in parts for tile in shapes]
