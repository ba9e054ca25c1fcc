"""Tensors that are read while they arrive, checked in the same pass: a set need not be in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from zerokl.weight_sync.errors import ChecksumError, IncompleteUpdateError, ManifestError
from zerokl.weight_sync.manifest import Manifest
from zerokl.weight_sync.tensor_spec import DTYPES, TensorSpec
from zerokl.weight_sync.transport import Bucket, Piece
from zerokl.weight_sync.views import WIDENED

Bytes = NDArray[np.uint8]

_PIECE_BYTES = 1 << 20
"""Of what nobody reads, checked at once."""
_NOTHING = np.empty(0, np.uint8)


class ArrivingTensor:
    """One tensor as a `zerokl.kernels.row_stream.RowStream`: what is read is hashed on the way.

    Its values are float32; those of bfloat16 are given as they are stored. The read that ends it raises ChecksumError
    if the bytes were not the manifest's.
    """

    def __init__(self, spec: TensorSpec, version: int, more: Callable[[], None], spare: list[Bytes]) -> None:
        self.name = spec.name
        self.shape = spec.shape
        self._spec = spec
        self._version = version
        self._more = more
        self._spare = spare
        self._row_bytes = spec.nbytes // spec.shape[0] if len(spec.shape) == 2 and spec.nbytes else spec.nbytes
        self._digest = xxhash.xxh3_64()
        self._held: Bytes = _NOTHING
        self._base = 0  # of the first byte in _held
        self._window: Bytes | None = None  # the memory of _held where it is ours
        self._borrows = False
        self.is_checked = True
        """Otherwise its bytes are counted and not kept."""
        self.num_arrived = 0
        """Bytes."""
        self.num_read = 0
        """Bytes."""

    def arrive(self, piece: Piece, *, lasting: bool) -> None:
        """Take the next bytes; others than lasting ones are borrowed until `keep`. Raises ManifestError."""
        end = piece.start + len(piece.data)
        if end > self._spec.nbytes:
            raise ManifestError(f"tensor {self.name!r}: bytes {piece.start} to {end} of {self._spec.nbytes}")
        if piece.start != self.num_arrived:
            raise ManifestError(f"tensor {self.name!r}: byte {piece.start} came where {self.num_arrived} was due")
        if not self.is_checked:
            self.num_read = end
        elif self.num_read == self.num_arrived:
            self._give_back()
            self._held, self._base, self._borrows = piece.data, piece.start, not lasting
        else:
            self._append(piece.data)
        self.num_arrived = end

    def keep(self) -> None:
        """Copy what was borrowed and not read."""
        if self._borrows:
            self._borrows = False
            if self.num_read < self.num_arrived:
                self._append(_NOTHING)
            else:
                self._held, self._base = _NOTHING, self.num_arrived

    def wait(self, stop: int) -> None:
        """See `RowStream`. Raises IncompleteUpdateError where the source ends before."""
        while self.num_arrived < self._end_of(stop):
            self._more()

    def read(self, stop: int) -> NDArray[Any]:
        """See `RowStream`."""
        self.wait(stop)
        end = self._end_of(stop)
        taken = self._take(end)
        values = taken.view(DTYPES[self._spec.dtype])
        if self._spec.dtype == "float16":
            values = values.astype(np.float32)
        return values.reshape(-1, self.shape[1]) if len(self.shape) == 2 else values.reshape(1, -1)

    def finish(self) -> None:
        """Check what nobody has read; all has arrived."""
        if self.num_arrived < self._spec.nbytes:
            raise IncompleteUpdateError(
                f"version {self._version}: tensor {self.name!r} did not arrive whole "
                f"({self._spec.nbytes - self.num_arrived} bytes are missing)"
            )
        while self.num_read < self._spec.nbytes:
            self._take(min(self.num_read + _PIECE_BYTES, self._spec.nbytes))
        if not self._spec.nbytes:
            self._check()

    def drain(self) -> None:
        """Check what has arrived, unread: nobody will read it."""
        while self.num_read < self.num_arrived:
            self._take(min(self.num_read + _PIECE_BYTES, self.num_arrived))

    def release(self) -> None:
        """Let go of the source's memory."""
        self._held, self._window = _NOTHING, None

    def _end_of(self, stop: int) -> int:
        return stop * self._row_bytes

    def _take(self, end: int) -> Bytes:
        taken = self._held[self.num_read - self._base : end - self._base]
        with taken.data as view:
            self._digest.update(view)
        self.num_read = end
        if end == self._spec.nbytes:
            self._check()
            self._give_back()  # nobody writes there before the next wait
        return taken

    def _check(self) -> None:
        actual = self._digest.intdigest()
        if actual != self._spec.checksum:
            raise ChecksumError(
                f"tensor {self.name!r} of version {self._version}: checksum {actual:016x} is not the manifest's "
                f"{self._spec.checksum:016x}; it was damaged or overwritten by a later publication"
            )

    def _append(self, data: Bytes) -> None:
        """Hold what is not read, and `data` behind it, in memory of our own."""
        window, place = self._window, self.num_arrived - self._base
        if window is None or place + len(data) > len(window):
            unread = self._held[self.num_read - self._base : place]
            window, place = self._room(len(unread) + len(data)), len(unread)
            window[:place] = unread
            self._give_back()
            self._window, self._base = window, self.num_read
        window[place : place + len(data)] = data
        self._held = window[: place + len(data)]

    def _room(self, size: int) -> Bytes:
        """Spare memory, or new memory with room for what may come."""
        for index, spare in enumerate(self._spare):
            if len(spare) >= size:
                return self._spare.pop(index)
        return np.empty(min(self._spec.nbytes - self.num_read, max(2 * size, _PIECE_BYTES)), np.uint8)

    def _give_back(self) -> None:
        if self._window is not None:
            self._spare.append(self._window)
            self._window = None


class ArrivingTensors(Mapping[str, ArrivingTensor]):
    """The tensors of a complete set by name, over a stream of buckets that is taken up as far as somebody reads.

    In memory are the bucket at hand and what came before it was wanted: little, where the publication's order is that
    of the reads. Tensors that are not `offered` are checked and not shown. The data of those that are not `checked`
    (None: all are) is passed over. Raises ManifestError for an element type that has no exact float32 form.
    """

    def __init__(
        self,
        manifest: Manifest,
        buckets: Iterable[Bucket],
        offered: Collection[str],
        checked: Collection[str] | None = None,
    ) -> None:
        for spec in manifest.tensors:
            if spec.dtype not in WIDENED:
                raise ManifestError(f"tensor {spec.name!r} has dtype {spec.dtype}; must be one of {WIDENED}")
        spare: list[Bytes] = []
        self._version = manifest.version
        self._tensors = {
            spec.name: ArrivingTensor(spec, manifest.version, self._pull, spare) for spec in manifest.tensors
        }
        if checked is not None:
            for name in self._tensors.keys() - set(checked):
                self._tensors[name].is_checked = False
        self._offered = {name: tensor for name, tensor in self._tensors.items() if name in offered}
        self._buckets = iter(buckets)
        self._last: list[ArrivingTensor] = []

    def __getitem__(self, name: str) -> ArrivingTensor:
        return self._offered[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._offered)

    def __len__(self) -> int:
        return len(self._offered)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, without reading data."""
        return {name: tensor.shape for name, tensor in self._offered.items()}

    def finish(self) -> None:
        """Take up the rest of the buckets and check all tensors. Raises IncompleteUpdateError, ChecksumError."""
        for tensor in self._tensors.values():
            tensor.drain()
        while self._take_bucket():
            for tensor in self._last:
                tensor.drain()
        for tensor in self._tensors.values():
            tensor.finish()

    def release(self) -> None:
        """Let go of the source's memory."""
        self._buckets = iter(())
        for tensor in self._tensors.values():
            tensor.release()

    def _pull(self) -> None:
        if not self._take_bucket():
            raise IncompleteUpdateError(f"version {self._version}: the source ended before all tensors were there")

    def _take_bucket(self) -> bool:
        for tensor in self._last:
            tensor.keep()
        self._last = []
        bucket = next(self._buckets, None)
        if bucket is None:
            return False
        for piece in bucket.pieces:
            if piece.name not in self._tensors:
                raise ManifestError(f"tensor {piece.name!r} is not in the manifest of version {self._version}")
            self._tensors[piece.name].arrive(piece, lasting=bucket.lasting)
            self._last.append(self._tensors[piece.name])
        return True
