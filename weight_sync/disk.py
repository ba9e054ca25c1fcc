"""Weights in a safetensors file: written beside its place and renamed, so that a reader sees a whole file or none.

The file is one that any safetensors reader takes; the manifest is in its metadata.
"""

from __future__ import annotations

import base64
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from zerokl.weight_sync.checksums import checksum_of
from zerokl.weight_sync.errors import DiskFullError, ManifestError, SegmentMissingError, SegmentTruncatedError
from zerokl.weight_sync.manifest import Manifest, plan_layout
from zerokl.weight_sync.shared_memory import Fill, check_rounding, fill
from zerokl.weight_sync.tensor_spec import TensorSpec
from zerokl.weight_sync.transport import DEFAULT_BUCKET_BYTES, Bucket, Piece

_METADATA_KEY = "zerokl_manifest"
_STORED = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"} | {
    f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (64, 32, 16, 8)
}
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_WRITE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFile:
    """A set of weights in a file, as a `Publication`."""

    path: str
    version: int

    @contextmanager
    def open(self) -> Iterator[FileLease]:
        """Open the file. Raises SegmentMissingError, SegmentTruncatedError, or ManifestError when it is another's."""
        try:
            stream = Path(self.path).open("rb", buffering=0)  # noqa: SIM115 - closed below
        except FileNotFoundError:
            raise SegmentMissingError(f"{self.path}: no such file") from None
        with stream:
            manifest, starts = _read_header(self.path, stream)
            if manifest.version != self.version:
                raise ManifestError(f"{self.path} holds version {manifest.version}, not {self.version}")
            yield FileLease(self.path, stream, manifest, starts)


class FileLease:
    """An open file: it stays as it is, even when another takes its name."""

    def __init__(self, path: str, stream: BinaryIO, manifest: Manifest, starts: Mapping[str, int]) -> None:
        self.manifest = manifest
        self._path = path
        self._stream = stream
        self._starts = starts

    def buckets(self, bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> Iterator[Bucket]:
        """Pieces of at most `bucket_bytes`, one a bucket, in memory that is used again."""
        if type(bucket_bytes) is not int or bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be an integer from 1, got {bucket_bytes!r}")
        largest = max((spec.nbytes for spec in self.manifest.tensors), default=0)
        buffer = np.empty(min(bucket_bytes, largest), np.uint8)
        for spec in self.manifest.tensors:
            for start in range(0, spec.nbytes, bucket_bytes):
                part = buffer[: min(bucket_bytes, spec.nbytes - start)]
                self._fill(part, self._starts[spec.name] + start, spec.name)
                yield Bucket(pieces=(Piece(name=spec.name, start=start, data=part),))

    def _fill(self, part: NDArray[np.uint8], offset: int, name: str) -> None:
        done = 0
        while done < len(part):
            count = os.preadv(self._stream.fileno(), [part.data[done:]], offset + done)
            if not count:
                raise SegmentTruncatedError(f"{self._path}: ends inside tensor {name!r}")
            done += count


def publish_file(
    path: str | Path,
    tensors: Mapping[str, NDArray[Any]] | Iterable[tuple[str, NDArray[Any]]],
    version: int,
    *,
    dtype: Literal["bfloat16"] | None = None,
    inexact: bool = True,
    fill: Fill = fill,
) -> PublishedFile:
    """Write arrays by name to `path`, which is replaced at once when all is on disk.

    `dtype`, `inexact` and `fill` are as in `WeightPublisher`; values are rounded a tensor at a time. Raises
    ManifestError for what cannot be published, DiskFullError; a file that was at `path` is then as it was.
    """
    path = Path(path)
    arrays = {name: np.ascontiguousarray(array) for name, array in dict(tensors).items()}
    check_rounding(dtype, arrays.items())
    specs, total_bytes = plan_layout((name, dtype or array.dtype.name, array.shape) for name, array in arrays.items())
    specs = tuple(spec.with_checksum(_stored(arrays[spec.name], dtype, fill)[1]) for spec in specs)
    header = _header(Manifest(version=version, tensors=specs, total_bytes=total_bytes, inexact=bool(dtype) and inexact))
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb", buffering=0) as stream:
            _write(stream, memoryview(len(header).to_bytes(8, "little") + header))
            for array in arrays.values():
                _write(stream, _bytes(_stored(array, dtype, fill)[0] if dtype else array))
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(FileNotFoundError):
            partial.unlink()
        if error.errno not in _FULL:
            raise
        raise DiskFullError(f"cannot write {total_bytes} bytes to {path}: {os.strerror(error.errno)}") from error
    return PublishedFile(path=str(path), version=version)


def _stored(array: NDArray[Any], dtype: str | None, fill: Fill) -> tuple[NDArray[Any], int]:
    """The array as the file has it, and its checksum."""
    if dtype is None:
        return array, checksum_of(array)
    patterns = np.empty(array.size, np.uint16)
    return patterns, fill(array.reshape(-1), patterns)


def _write(stream: BinaryIO, chunk: memoryview) -> None:
    for start in range(0, len(chunk), _WRITE_BYTES):
        part = chunk[start : start + _WRITE_BYTES]
        while len(part):
            part = part[stream.write(part) :]


def _bytes(array: NDArray[Any]) -> memoryview:
    view: memoryview = array.reshape(-1).view(np.uint8).data
    return view


def _header(manifest: Manifest) -> bytes:
    entries: dict[str, Any] = {
        "__metadata__": {_METADATA_KEY: base64.b64encode(manifest.to_bytes()).decode(), "format": "pt"}
    }
    offset = 0
    for spec in manifest.tensors:
        offsets = [offset, offset + spec.nbytes]
        entries[spec.name] = {"dtype": _STORED[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        offset += spec.nbytes
    header = json.dumps(entries).encode()
    return header + b" " * (-len(header) % 8)


def _read_header(path: str, stream: BinaryIO) -> tuple[Manifest, dict[str, int]]:
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise SegmentTruncatedError(f"{path}: header of {length} bytes in a file of {size}")
    try:
        encoded = json.loads(stream.read(length))["__metadata__"][_METADATA_KEY]
        manifest = Manifest.from_bytes(base64.b64decode(encoded, validate=True))
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{path}: holds no manifest of zerokl.weight_sync: {error!r:.200}") from error
    starts = dict(zip((spec.name for spec in manifest.tensors), _starts(manifest.tensors, 8 + length), strict=True))
    end = 8 + length + sum(spec.nbytes for spec in manifest.tensors)
    if end != size:
        raise SegmentTruncatedError(f"{path}: has {size} bytes, its manifest says {end}")
    return manifest, starts


def _starts(specs: Iterable[TensorSpec], start: int) -> Iterator[int]:
    for spec in specs:
        yield start
        start += spec.nbytes
