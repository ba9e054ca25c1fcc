"""Products by any candidate, on one stream, with buffers that all of them share: results are used before the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from choices import Candidate, Gemm, our_candidates
from cublas import WORKSPACE_BYTES, Algorithm, Cublas
from split_k import join, split, tile_max

from zerokl.kernels.gpu import matmul, tiles
from zerokl.kernels.gpu.matmul import linear_with_tile_max

Empty = Callable[[Sequence[int], str], Any]

PARTIAL_ENTRIES = 8 * 512 * 28672
"""Float32 sums over parts of K, at most."""


class Products:
    """Tensors are bfloat16, weights [N, K], of gate and up in turn for `swiglu`."""

    def __init__(self, stream: int, empty: Empty, wide_entries: int) -> None:
        """`wide_entries`: of the largest product [M, 2 F] whose SwiGLU a vendor's kernel leaves to us.

        Raises PartRefusedError where there is no cuBLASLt.
        """
        self._cublas = Cublas(stream, empty([WORKSPACE_BYTES // 4], "float32"))
        self._partial = empty([PARTIAL_ENTRIES], "float32")
        self._wide = empty([wide_entries], "bfloat16")
        self._algorithms: dict[tuple[int, int, int, str], list[Algorithm]] = {}

    def candidates(self, gemm: Gemm, rows: int) -> list[Candidate]:
        """All that can be tried."""
        out_type = "float32" if gemm.op == "head" else "bfloat16"
        proposed = len(self._proposals(rows, gemm.n, gemm.k, out_type))
        return our_candidates(gemm, rows) + [Candidate("cublas", proposal=number) for number in range(proposed)]

    def linear(self, candidate: Candidate, x: Any, weight: Any, out: Any) -> None:
        """out [M, N] = x weight^T."""
        if candidate.kind == "ours":
            matmul.linear(x, weight, None, out)
        elif candidate.kind == "cublas":
            self._vendor(candidate, x, weight, out)
        else:
            self._split(candidate, x, weight, out, swiglu=False)

    def swiglu(self, candidate: Candidate, x: Any, weight: Any, out: Any) -> None:
        """out [M, F] = silu(x gate^T) * (x up^T)."""
        if candidate.kind == "ours":
            matmul.swiglu(x, weight, out)
        elif candidate.kind == "cublas":
            rows, n = x.shape[0], weight.shape[0]
            wide = self._wide[: rows * n].reshape([rows, n])
            self._vendor(candidate, x, weight, wide)
            join(wide, out, rows * n, 1, swiglu=True)
        else:
            self._split(candidate, x, weight, out, swiglu=True)

    def head(self, candidate: Candidate, x: Any, weight: Any, logits: Any, maxima: Any, tile: tiles.Tile) -> None:
        """logits [R, V] float32 = x weight^T, and the largest of each row in each `tile.BLOCK_N` columns."""
        if candidate.kind == "ours":
            linear_with_tile_max(x, weight, logits, maxima, tile=tile)
        else:
            self._vendor(candidate, x, weight, logits)
            tile_max(logits, maxima, tile.BLOCK_N)

    def _vendor(self, candidate: Candidate, x: Any, weight: Any, out: Any) -> None:
        (rows, k), n = x.shape, weight.shape[0]
        proposals = self._proposals(rows, n, k, matmul.dtype_of(out))
        self._cublas.product(x, weight, out, proposals[candidate.proposal])

    def _proposals(self, rows: int, n: int, k: int, out_type: str) -> list[Algorithm]:
        key = (rows, n, k, out_type)
        if key not in self._algorithms:
            self._algorithms[key] = self._cublas.algorithms(*key)
        return self._algorithms[key]

    def _split(self, candidate: Candidate, x: Any, weight: Any, out: Any, *, swiglu: bool) -> None:
        size = x.shape[0] * weight.shape[0]
        assert candidate.tile is not None and candidate.parts * size <= PARTIAL_ENTRIES
        split(x, weight, self._partial, candidate.parts, candidate.tile)
        join(self._partial, out, size, candidate.parts, swiglu=swiglu)
