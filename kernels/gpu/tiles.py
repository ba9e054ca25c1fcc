"""Tile shapes of the kernels by number of rows: speed only, never bits (docs/numerics.md, "On a GPU").

A tile decides which outputs one program computes and how the operands are fetched; each output is summed over K in
steps of 16 in sequence whatever the tile. The entries are the fastest of `benchmarks/gpu_tiles.py` on an H100.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows, columns and inputs of a program's block; warps; stages of the load pipeline.

    With `tma` blocks are fetched by the bulk copy engine (where rows start at multiples of 16 bytes). With `persistent`
    too, a program for each multiprocessor takes one block after the other and fetches for the next one while it stores:
    there must be memory for what is fetched and what is stored at once, which float32 outputs leave not.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    tma: bool = False
    persistent: bool = False

    def options(self) -> dict[str, int]:
        """As keyword arguments of a kernel launch."""
        return {name: value for name, value in asdict(self).items() if name not in ("tma", "persistent")}


# (largest number of rows, largest N, tile); the first entry that fits serves. None: no bound.
_Table = tuple[tuple[int | None, int | None, Tile], ...]

LINEAR: _Table = (
    (16, 8192, Tile(16, 32, 256, 4, 4)),
    (16, None, Tile(16, 64, 256, 4, 3)),
    (32, 4096, Tile(32, 16, 256, 4, 4)),
    (32, None, Tile(32, 32, 256, 4, 3)),
    (64, 2048, Tile(64, 16, 128, 4, 4)),
    (64, None, Tile(64, 32, 128, 4, 4, tma=True)),
    (128, 2048, Tile(64, 32, 128, 4, 4)),
    (128, 4096, Tile(64, 64, 128, 4, 4, tma=True)),
    (128, None, Tile(128, 64, 128, 4, 4, tma=True)),
    (256, 2048, Tile(64, 64, 128, 4, 4, tma=True)),
    (256, 4096, Tile(64, 128, 64, 4, 6, tma=True)),
    (256, None, Tile(128, 128, 64, 4, 5, tma=True)),
    (512, 2048, Tile(64, 64, 128, 4, 4, tma=True)),
    (512, 4096, Tile(128, 128, 64, 4, 5, tma=True)),
    (512, None, Tile(256, 128, 64, 8, 4, tma=True)),
    (None, 512, Tile(128, 128, 64, 8, 4, tma=True)),
    (4096, 1024, Tile(128, 128, 64, 8, 4, tma=True)),
    (None, None, Tile(128, 256, 64, 8, 3, tma=True, persistent=True)),
)

# N counts the columns of gate and up together.
SWIGLU: _Table = (
    (16, None, Tile(16, 64, 128, 4, 5)),
    (32, None, Tile(32, 32, 256, 4, 3)),
    (64, 8192, Tile(64, 32, 128, 4, 4, tma=True)),
    (64, None, Tile(64, 64, 128, 4, 3, tma=True)),
    (128, 8192, Tile(64, 64, 64, 4, 5)),
    (128, None, Tile(128, 64, 64, 8, 4, tma=True)),
    (256, 8192, Tile(64, 128, 64, 4, 4, tma=True)),
    (256, None, Tile(128, 256, 64, 8, 4, tma=True)),
    (512, 8192, Tile(256, 128, 64, 8, 4, tma=True)),
    (512, None, Tile(128, 128, 64, 8, 5, tma=True, persistent=True)),
    (None, None, Tile(128, 256, 64, 8, 3, tma=True, persistent=True)),
)

LM_HEAD: _Table = (
    (16, None, Tile(16, 128, 128, 4, 3)),
    (32, None, Tile(32, 64, 128, 4, 4)),
    (64, None, Tile(64, 128, 128, 4, 3, tma=True)),
    (128, None, Tile(64, 128, 64, 4, 4, tma=True)),
    (None, None, Tile(128, 256, 64, 8, 4, tma=True)),
)

# By the mean number of rows of an expert: one tile serves all experts of a step.
EXPERTS: _Table = (
    (16, None, Tile(16, 64, 128, 4, 4)),
    (32, None, Tile(32, 64, 128, 4, 4)),
    (None, None, Tile(64, 128, 64, 4, 4)),
)

# Products of float32 run outside the tensor cores, a fused step at a time: a small tile that fits the registers.
FLOAT32 = Tile(16, 32, 32, 4, 3)

# Query rows (tokens times heads of a group) of an attention program, with warps and stages.
DECODE_ATTENTION = Tile(16, 0, 0, 4, 2)
PREFILL_ATTENTION = Tile(64, 0, 0, 4, 2)
# The rows of this one follow from the model: see `paged_attention.members_per_tile`.
SHARED_ATTENTION = Tile(0, 0, 0, 4, 2)


def choose(table: _Table, rows: int, outputs: int, dtype: str) -> Tile:
    """The tile for `rows` rows and `outputs` columns of operands of type `dtype`."""
    if dtype == "float32":
        return FLOAT32
    for most_rows, most_outputs, tile in table:
        if (most_rows is None or rows <= most_rows) and (most_outputs is None or outputs <= most_outputs):
            return tile
    raise AssertionError("the last entry of a table has no bounds")
