"""What a published set of weights consists of: names, shapes, dtypes, places and checksums. Pure data, no I/O.

A manifest travels beside the bytes it describes and is all that a receiver trusts. It is validated whenever one is
made, by code or from the wire: a `Manifest` that exists is well-formed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack  # type: ignore[import-untyped]
import xxhash

from zerokl.weight_sync.device_checksums import CHECKSUM_KIND
from zerokl.weight_sync.errors import ManifestError
from zerokl.weight_sync.tensor_spec import ALIGNMENT, MAX_INT, Spans, TensorSpec, is_integer

if TYPE_CHECKING:
    from zerokl.weight_sync.transport import Lease

FORMAT_VERSION = 7
"""Raised with every change of the encoded form; a receiver refuses any other."""

XXH3 = "xxh3_64"
CHECKSUM_KINDS = (XXH3, CHECKSUM_KIND)
"""xxh3_64 with seed 0 of the tensors' bytes, or `device_checksums.device_checksum` of the tensors."""

_LISTED = 8
"""Names quoted in one error message; the rest is a count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestDiff:
    """How a manifest differs from what a model expects; empty (false) when it does not."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """(name, shape in the manifest, shape expected)"""

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.misshapen)

    def describe(self) -> str:
        """One line that names the first few tensors of each kind."""
        wrong = [f"{name!r} has shape {got}, expected {expected}" for name, got, expected in self.misshapen[:_LISTED]]
        parts = [
            _listing("missing", [repr(name) for name in self.missing[:_LISTED]], len(self.missing)),
            _listing("extra", [repr(name) for name in self.extra[:_LISTED]], len(self.extra)),
            _listing("misshapen", wrong, len(self.misshapen)),
        ]
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The tensors of one version: all of them, or a delta, those that differ from the parent version's.

    Raises ManifestError when tensors repeat, overlap or do not fit.
    """

    version: int
    """Policy version, from 0."""
    tensors: tuple[TensorSpec, ...]
    """By ascending offset."""
    total_bytes: int
    """Size that the segment must have at least."""
    parent: int | None = None
    """Version that this delta applies to; None: the set is complete."""
    result: int | None = None
    """Of a delta: `result_checksum` of the complete set that it must give."""
    result_dtype: str = "float32"
    """Element type in which the tensors of the result are hashed: float32 or bfloat16, that of the publications."""
    inexact: bool = False
    """Whether values were rounded on the way, so that the trainer's differ."""
    checksum_kind: str = XXH3
    """How checksums are made: one of CHECKSUM_KINDS."""

    def __post_init__(self) -> None:
        require_version(self.version)
        if not is_integer(self.total_bytes, MAX_INT):
            raise ManifestError(f"total_bytes {self.total_bytes!r} is not an integer from 0 to 2**63 - 1")
        if (self.parent is None) != (self.result is None):
            raise ManifestError(f"parent {self.parent!r} and result {self.result!r} belong together")
        if self.parent is not None and not (is_integer(self.parent, MAX_INT) and is_integer(self.result, 2**64 - 1)):
            raise ManifestError(f"parent {self.parent!r}, result {self.result!r} are not a version and a checksum")
        if self.result_dtype not in ("float32", "bfloat16"):
            raise ManifestError(f"result_dtype {self.result_dtype!r} is not float32 or bfloat16")
        if type(self.inexact) is not bool:
            raise ManifestError(f"inexact {self.inexact!r} is not a bool")
        if self.checksum_kind not in CHECKSUM_KINDS:
            raise ManifestError(f"checksum_kind {self.checksum_kind!r:.200} is not one of {CHECKSUM_KINDS}")
        if self.parent is not None and self.checksum_kind != XXH3:
            raise ManifestError(f"checksum_kind must be {XXH3!r} of a delta, got {self.checksum_kind!r}")
        names: set[str] = set()
        end = 0
        for spec in self.tensors:
            if spec.name in names:
                raise ManifestError(f"tensor {spec.name!r} is listed twice")
            if spec.offset < end:
                raise ManifestError(f"tensor {spec.name!r}: offset {spec.offset}, but the one before ends at {end}")
            if spec.spans is not None and self.parent is None:
                raise ManifestError(f"tensor {spec.name!r}: has spans, but the set is no delta")
            names.add(spec.name)
            end = spec.offset + spec.nbytes
            if end > self.total_bytes:
                raise ManifestError(f"tensor {spec.name!r}: ends at byte {end}, beyond total_bytes {self.total_bytes}")

    def with_checksums(self, tensors: tuple[TensorSpec, ...]) -> Manifest:
        """The same with these tensors, which differ from its own in their checksums alone."""
        made = copy.copy(self)
        object.__setattr__(made, "tensors", tensors)  # their places have been checked
        return made

    def with_version(self, version: int) -> Manifest:
        """The same of another version. Raises ManifestError for one that is none."""
        require_version(version)
        made = copy.copy(self)
        object.__setattr__(made, "version", version)  # all else has been checked
        return made

    def diff(self, expected: Mapping[str, tuple[int, ...]]) -> ManifestDiff:
        """Compare names, both ways, and shapes with those of a model."""
        given = {spec.name: spec.shape for spec in self.tensors}
        return ManifestDiff(
            missing=tuple(name for name in expected if name not in given) if self.parent is None else (),
            extra=tuple(name for name in given if name not in expected),
            misshapen=tuple(
                (name, shape, tuple(expected[name]))
                for name, shape in given.items()
                if name in expected and shape != tuple(expected[name])
            ),
        )

    def require(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ManifestError naming the tensors that are missing, extra or misshapen, if any."""
        difference = self.diff(expected)
        if difference:
            raise ManifestError(f"version {self.version} does not fit the model: {difference.describe()}")

    def to_bytes(self) -> bytes:
        """Encode as msgpack [format version, the fields, rows of the fields of each tensor]."""
        rows = [
            (spec.name, spec.dtype, spec.shape, spec.offset, spec.checksum, spec.spans, spec.whole)
            for spec in self.tensors
        ]
        fields = (self.version, self.total_bytes, self.parent, self.result, self.result_dtype, self.inexact)
        encoded: bytes = msgpack.packb((FORMAT_VERSION, *fields, self.checksum_kind, rows))
        return encoded

    @staticmethod
    def from_bytes(encoded: bytes) -> Manifest:
        """Inverse of `to_bytes`. Raises ManifestError for anything else than its output, whatever the bytes."""
        version, total_bytes, parent, result, result_dtype, inexact, kind, rows = unpack(encoded, "manifest", 8)
        if not isinstance(rows, list):
            raise ManifestError("manifest: the tensor table is not a list")
        return Manifest(
            version=version,
            total_bytes=total_bytes,
            parent=parent,
            result=result,
            result_dtype=result_dtype,
            inexact=inexact,
            checksum_kind=kind,
            tensors=tuple(_spec_from_row(row) for row in rows),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWeights:
    """Where a set of weights lies and what it consists of: all that a receiver on this machine needs to open it."""

    segment: str
    """Name of the POSIX shared memory segment."""
    manifest: Manifest

    @property
    def version(self) -> int:
        """The manifest's policy version."""
        return self.manifest.version

    def open(self) -> AbstractContextManager[Lease]:
        """A lease of the segment: see `receiver.lease_published`."""
        from zerokl.weight_sync.receiver import lease_published

        return lease_published(self)

    def to_bytes(self) -> bytes:
        """Encode as msgpack [format version, segment, encoded manifest]."""
        encoded: bytes = msgpack.packb((FORMAT_VERSION, self.segment, self.manifest.to_bytes()))
        return encoded

    @staticmethod
    def from_bytes(encoded: bytes) -> PublishedWeights:
        """Inverse of `to_bytes`. Raises ManifestError for anything else than its output."""
        segment, manifest = unpack(encoded, "published weights", 2)
        if not isinstance(segment, str) or not isinstance(manifest, bytes):
            raise ManifestError("published weights: expected a segment name and an encoded manifest")
        return PublishedWeights(segment=segment, manifest=Manifest.from_bytes(manifest))


def require_version(version: object) -> None:
    """Raise ManifestError unless it is a policy version."""
    if not is_integer(version, MAX_INT):
        raise ManifestError(f"version {version!r} is not an integer from 0 to 2**63 - 1")


def result_checksum(checksums: Mapping[str, int]) -> int:
    """One checksum of a complete set, from those of its tensors' bytes by name, in whatever order."""
    whole = xxhash.xxh3_64()
    for name in sorted(checksums):
        whole.update(msgpack.packb((name, checksums[name])))
    return whole.intdigest()


def plan_layout(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], *, spans: Mapping[str, Spans] | None = None
) -> tuple[tuple[TensorSpec, ...], int]:
    """Place (name, dtype, shape) one after the other, each on a 64-byte boundary; checksums are left 0.

    Of the tensors in `spans` only these elements. Returns the specs and the size of the segment in bytes.
    """
    specs = []
    offset = 0
    for name, dtype, shape in tensors:
        some = None if spans is None else spans.get(name)
        spec = TensorSpec(name=name, dtype=dtype, shape=shape, offset=offset, spans=some)
        specs.append(spec)
        offset += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(specs), offset


def unpack(encoded: bytes, what: str, fields: int) -> list[Any]:
    """Decode a msgpack list [FORMAT_VERSION, field...]; returns the fields."""
    try:
        content = msgpack.unpackb(encoded)
    except (ValueError, msgpack.UnpackException) as error:  # FormatError, ExtraData and bad UTF-8 are ValueErrors
        raise ManifestError(f"{what}: not msgpack: {error}") from error
    if not isinstance(content, list) or not content:
        raise ManifestError(f"{what}: expected a list, got {type(content).__name__}")
    if content[0] != FORMAT_VERSION:
        raise ManifestError(f"{what}: format version {content[0]!r} is not {FORMAT_VERSION}")
    if len(content) != fields + 1:
        raise ManifestError(f"{what}: expected {fields + 1} fields, got {len(content)}")
    return content[1:]


def _spec_from_row(row: Any) -> TensorSpec:
    if not isinstance(row, list) or len(row) != 7 or not isinstance(row[1], str) or not isinstance(row[2], list):
        raise ManifestError(
            f"manifest: {row!r:.200} is not a row of name, dtype, shape, offset, checksum, spans, whole"
        )
    spans = row[5]
    if isinstance(spans, list):
        spans = tuple(tuple(span) if isinstance(span, list) else span for span in spans)
    return TensorSpec(
        name=row[0], dtype=row[1], shape=tuple(row[2]), offset=row[3], checksum=row[4], spans=spans, whole=row[6]
    )


def _listing(kind: str, items: list[str], count: int) -> str:
    if not count:
        return ""
    more = f" and {count - len(items)} more" if count > len(items) else ""
    return f"{kind}: {', '.join(items)}{more}"
