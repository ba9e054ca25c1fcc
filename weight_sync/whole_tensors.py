"""What the tensors of a publication come to: whole, over those of the live set where a delta has ranges of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.weight_sync.errors import ManifestError, ParentMismatchError
from zerokl.weight_sync.live_weights import LiveWeights, checksum_as
from zerokl.weight_sync.manifest import Manifest, result_checksum
from zerokl.weight_sync.staged_tensors import StagedTensors
from zerokl.weight_sync.tensor_spec import TensorSpec
from zerokl.weight_sync.views import WideTensors, widen


class WholeTensors:
    """Makes them of what is staged of one manifest. `live` is the parent of a delta, checked to be that.

    Of the tensors in `read` (None: of all) ranges can be put into the rest, which is here.
    """

    def __init__(self, manifest: Manifest, live: LiveWeights | None, read: Collection[str] | None) -> None:
        self._manifest = manifest
        self._live = live
        self._read = read

    def of(self, staged: StagedTensors) -> WideTensors:
        """By name, float32 on access; of a delta those that it changes, and of these those whose rest is here.

        Raises ManifestError for ranges of a type that no live set has.
        """
        specs = self._manifest.tensors
        arrays = {spec.name: self._array(spec, staged) for spec in specs if not self._is_elsewhere(spec)}
        return WideTensors(arrays, {spec.name: _dtype_of(spec) for spec in specs})

    def checksums(self, tensors: WideTensors, names: Collection[str], optional: Collection[str]) -> dict[str, int]:
        """Of the set that a delta makes of the live one: of the tensors `names`, and the `optional` ones that are live.

        `tensors` are those of `of`. Raises ParentMismatchError unless together they are what the manifest says.
        """
        live, manifest = self._live, self._manifest
        assert live is not None, "the parent of a delta is checked at the start"
        known = {spec.name: self._checksum(spec, tensors) for spec in manifest.tensors}
        rest = {name: live.checksum(name) for name in names if name not in known}
        more = {name: value for name, value in live.checksums.items() if name in optional}
        checksums = {**rest, **more, **known}
        actual = result_checksum(checksums)
        if actual != manifest.result:
            raise ParentMismatchError(
                f"version {manifest.version}: applied to version {manifest.parent} as it is here, the delta "
                f"gives a set of checksum {actual:016x}, its publisher has {manifest.result:016x}"
            )
        return checksums

    def _array(self, spec: TensorSpec, staged: StagedTensors) -> NDArray[Any]:
        stored = staged.elements(spec)
        if spec.spans is None:
            return stored.reshape(spec.shape)
        assert self._live is not None, "a span outside of a delta"
        if spec.dtype not in ("float32", "bfloat16"):
            raise ManifestError(f"tensor {spec.name!r}: spans must be of float32 or bfloat16, got {spec.dtype}")
        whole = np.array(self._live.tensors[spec.name], np.float32, order="C")
        flat, values = whole.reshape(-1), widen(stored, spec.dtype)
        place = 0
        for start, stop in spec.spans:
            flat[start:stop] = values[place : place + stop - start]
            place += stop - start
        return whole

    def _is_elsewhere(self, spec: TensorSpec) -> bool:
        """Whether it is a range of a tensor of which only another rank has the rest."""
        return spec.spans is not None and self._read is not None and spec.name not in self._read

    def _checksum(self, spec: TensorSpec, tensors: WideTensors) -> int:
        """Of a tensor of the result."""
        if self._is_elsewhere(spec):
            return spec.whole  # the rank that has the rest computes it; a false one gives another result here
        dtype = self._manifest.result_dtype
        if spec.spans is None and spec.dtype == dtype:
            return spec.checksum
        return checksum_as(dtype, spec.name, tensors[spec.name])


def _dtype_of(spec: TensorSpec) -> str:
    """Of the array: tensors made of spans are float32."""
    return spec.dtype if spec.spans is None else "float32"
