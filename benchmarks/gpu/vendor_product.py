"""cuBLAS for arrays on the host: a product as ordinary engines have it, for the ordinary forward."""

from __future__ import annotations

import numpy as np
from cublas import WORKSPACE_BYTES, Cublas
from numpy.typing import NDArray

from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.paddle_device import PaddleDevice

Floats = NDArray[np.float32]


class VendorProduct:
    """x [T, K] weight [N, K]^T of bfloat16 values, float32 [T, N]; weights stay on the device once they were used."""

    def __init__(self) -> None:
        """Raises PartRefusedError where there is no cuBLASLt."""
        self._device = PaddleDevice()
        self._cublas = Cublas(int(self._device.stream), self._device.empty([WORKSPACE_BYTES // 4], "float32"))
        self._weights: dict[int, tuple[Floats, Tensor]] = {}
        """By identity, with the array, which so stays what it was."""

    def __call__(self, x: Floats, weight: Floats) -> Floats:
        if id(weight) not in self._weights:
            self._weights[id(weight)] = weight, self._device.put(_patterns(weight))
        (rows, k), n = x.shape, len(weight)
        given, out = self._device.put(_patterns(x)), self._device.empty([rows, n], "float32")
        favourite = self._cublas.algorithms(rows, n, k, "float32", most=1)[0]
        self._cublas.product(given, self._weights[id(weight)][1], out, favourite)
        return np.asarray(self._device.get(out), np.float32)


def _patterns(values: Floats) -> NDArray[np.uint16]:
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
