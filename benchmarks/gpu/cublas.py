"""Matrix products by cuBLASLt, on a stream of the caller's: the vendor's order of sums, for comparison alone.

Paddle's own matmul goes to Paddle's stream, so it would be no part of a graph that is recorded on another; this goes
where it is told, with a workspace that is given, and may be recorded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refusal import PartRefusedError

WORKSPACE_BYTES = 64 << 20
_NAMES = ("libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so")

# cublasLt.h and library_types.h
_COMPUTE_32F, _OP_T = 68, 1
_TYPES = {"float32": 0, "bfloat16": 14}
_DESC_TRANSA, _PREF_MAX_WORKSPACE_BYTES = 3, 1


class Algorithm(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: a way to compute a product of some shape, opaque."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class Cublas:
    """Products y [M, N] = x [M, K] w [N, K]^T of bfloat16 with float32 sums; y is bfloat16 or float32."""

    def __init__(self, stream: int, workspace: Any) -> None:
        """`workspace`: a tensor of WORKSPACE_BYTES that nothing else on the stream holds results in.

        Raises PartRefusedError where there is no cuBLASLt.
        """
        self._lib = _library()
        self._stream, self._workspace = ctypes.c_void_p(stream), workspace
        self._handle = ctypes.c_void_p()
        self._call("cublasLtCreate", ctypes.byref(self._handle))
        self._shapes: dict[tuple[int, int, int, str], tuple[ctypes.c_void_p, ...]] = {}

    def algorithms(self, m: int, n: int, k: int, out_type: str, most: int = 8) -> list[Algorithm]:
        """What its heuristics propose for a shape, their favourite first."""
        operation, w, x, y = self._shape(m, n, k, out_type)
        preference = ctypes.c_void_p()
        self._call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        size = ctypes.c_uint64(WORKSPACE_BYTES)
        self._call(
            "cublasLtMatmulPreferenceSetAttribute", preference, _PREF_MAX_WORKSPACE_BYTES,
            ctypes.byref(size), ctypes.c_size_t(ctypes.sizeof(size)),
        )  # fmt: skip
        found, count = (Algorithm * most)(), ctypes.c_int()
        self._call(
            "cublasLtMatmulAlgoGetHeuristic", self._handle, operation, w, x, y, y, preference, most, found,
            ctypes.byref(count),
        )  # fmt: skip
        self._call("cublasLtMatmulPreferenceDestroy", preference)
        return [found[index] for index in range(count.value) if found[index].state == 0]

    def product(self, x: Any, w: Any, y: Any, algorithm: Algorithm) -> None:
        """Launch y [M, N] = x [M, K] w [N, K]^T."""
        (m, k), n = x.shape, w.shape[0]
        operation, w_layout, x_layout, y_layout = self._shape(m, n, k, _dtype(y))
        one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        pointers = [ctypes.c_void_p(int(tensor.data_ptr())) for tensor in (w, x, y, self._workspace)]
        self._call(
            "cublasLtMatmul", self._handle, operation, ctypes.byref(one), pointers[0], w_layout, pointers[1], x_layout,
            ctypes.byref(zero), pointers[2], y_layout, pointers[2], y_layout, ctypes.byref(algorithm.algo),
            pointers[3], ctypes.c_size_t(WORKSPACE_BYTES), self._stream,
        )  # fmt: skip

    def _shape(self, m: int, n: int, k: int, out_type: str) -> tuple[ctypes.c_void_p, ...]:
        """Operation and layouts of w, x and y. To the library, whose matrices go by columns, w is [K, N], to be
        transposed, x [K, M] and y [N, M].
        """
        key = (m, n, k, out_type)
        if key not in self._shapes:
            operation = ctypes.c_void_p()
            self._call("cublasLtMatmulDescCreate", ctypes.byref(operation), _COMPUTE_32F, _TYPES["float32"])
            transposed = ctypes.c_int32(_OP_T)
            self._call(
                "cublasLtMatmulDescSetAttribute", operation, _DESC_TRANSA, ctypes.byref(transposed),
                ctypes.c_size_t(ctypes.sizeof(transposed)),
            )  # fmt: skip
            sizes = ((k, n, "bfloat16"), (k, m, "bfloat16"), (n, m, out_type))
            self._shapes[key] = (operation, *(self._layout(*size) for size in sizes))
        return self._shapes[key]

    def _layout(self, rows: int, columns: int, dtype: str) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        self._call(
            "cublasLtMatrixLayoutCreate", ctypes.byref(layout), _TYPES[dtype], ctypes.c_uint64(rows),
            ctypes.c_uint64(columns), ctypes.c_int64(rows),
        )  # fmt: skip
        return layout

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._lib, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name}: status {status}")


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).rpartition(".")[2]


def _library() -> ctypes.CDLL:
    tried = [*_NAMES, *(str(path) for path in _packaged())]
    for name in tried:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise PartRefusedError(f"no cuBLASLt: none of {', '.join(tried)} can be loaded")


def _packaged() -> Iterator[Path]:
    """In the packages nvidia-cublas and nvidia-cublas-cu12."""
    try:
        import nvidia
    except ImportError:
        return
    for folder in nvidia.__path__:
        yield from sorted(Path(folder).glob("*/lib/libcublasLt.so.*"))
