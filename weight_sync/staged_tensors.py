"""The bytes of a set's tensors as they come in pieces, in order within each tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from zerokl.weight_sync.checksums import checksum_of
from zerokl.weight_sync.errors import IncompleteUpdateError, ManifestError
from zerokl.weight_sync.manifest import Manifest
from zerokl.weight_sync.tensor_spec import DTYPES, TensorSpec
from zerokl.weight_sync.transport import Piece


class StagedTensors:
    """What has come of the tensors of a manifest. A piece that lasts and is a whole tensor is kept without a copy."""

    def __init__(self, manifest: Manifest) -> None:
        self._version = manifest.version
        self._specs = {spec.name: spec for spec in manifest.tensors}
        self._missing = {spec.name: spec.nbytes for spec in manifest.tensors}
        self._stored: dict[str, NDArray[Any]] = {}

    def take(self, piece: Piece, *, lasting: bool) -> None:
        """Raises ManifestError for a piece that is nowhere in the manifest, or not the next one of its tensor."""
        spec = self._specs.get(piece.name)
        if spec is None:
            raise ManifestError(f"tensor {piece.name!r} is not in the manifest of version {self._version}")
        end = piece.start + len(piece.data)
        if not 0 <= piece.start <= end <= spec.nbytes:
            raise ManifestError(f"tensor {piece.name!r}: bytes {piece.start} to {end} of {spec.nbytes} do not exist")
        if lasting and len(piece.data) == spec.nbytes and piece.name not in self._stored:
            self._stored[piece.name] = piece.data
        else:
            done = spec.nbytes - self._missing[piece.name]
            if piece.start != done:
                raise ManifestError(f"tensor {piece.name!r}: byte {piece.start} came where {done} was due")
            if piece.name not in self._stored:
                self._stored[piece.name] = np.empty(spec.nbytes, np.uint8)
            self._stored[piece.name][piece.start : end] = piece.data
        self._missing[piece.name] = spec.nbytes - end

    def check_complete(self) -> None:
        """Raise IncompleteUpdateError naming a tensor of which bytes are missing, if there is one."""
        missing = [name for name, count in self._missing.items() if count or name not in self._stored]
        missing = [name for name in missing if self._specs[name].nbytes]
        if missing:
            raise IncompleteUpdateError(
                f"version {self._version}: {len(missing)} tensors did not arrive whole, "
                f"the first of them {missing[0]!r} ({self._missing[missing[0]]} bytes are missing)"
            )

    def checksum(self, spec: TensorSpec) -> int:
        """xxh3_64 of what has come of a tensor."""
        stored = self._stored.get(spec.name)
        return xxhash.xxh3_64_intdigest(b"") if stored is None else checksum_of(stored)

    def elements(self, spec: TensorSpec) -> NDArray[Any]:
        """[n] of the tensor's type: what has come of it, in C order."""
        return self._stored.get(spec.name, np.empty(0, np.uint8)).view(DTYPES[spec.dtype])

    def clear(self) -> None:
        """Let go of all bytes."""
        self._stored.clear()
