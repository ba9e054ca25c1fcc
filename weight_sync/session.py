"""The receiving half of an update: begin(version, manifest) -> stage(bucket)* -> verify -> commit -> publish, or abort.

A complete set may be packed while it arrives: `arriving` and `verify_read` take the places of `stage` and `verify`. One
that a device copies by itself is told by its checksums: `begin_placed`, `verify_placed`.

A session is one update. Nothing that it does before `commit` can be seen from outside, and whatever raises before has
aborted it: there is no state in which a part of an update serves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

from zerokl.weight_sync.arrivals import ArrivingTensors
from zerokl.weight_sync.errors import (
    ChecksumError,
    IncompleteUpdateError,
    ParentMismatchError,
    ProtocolError,
    VersionOrderError,
)
from zerokl.weight_sync.live_weights import LiveWeights
from zerokl.weight_sync.manifest import XXH3, Manifest
from zerokl.weight_sync.staged_tensors import StagedTensors
from zerokl.weight_sync.transport import DEFAULT_BUCKET_BYTES, Bucket, Lease
from zerokl.weight_sync.views import WideTensors
from zerokl.weight_sync.whole_tensors import WholeTensors

State = Literal["idle", "staging", "arriving", "placing", "verified", "committed", "published", "aborted"]


class UpdateSession:
    """One update of a model whose tensors are `expected`, name -> shape; `optional` ones may be there as well.

    Without `live` only complete sets are taken. Of a complete set the data of the tensors in `read` is looked at (None:
    of all): for the others, which some other rank reads, the manifest's checksums are taken for granted. Of a delta all
    that came is verified, and other tensors than `read` that came in ranges are passed over. Calls come from one thread
    at a time.
    """

    def __init__(
        self,
        expected: Mapping[str, tuple[int, ...]],
        live: LiveWeights | None = None,
        optional: Mapping[str, tuple[int, ...]] | None = None,
        *,
        read: Collection[str] | None = None,
    ) -> None:
        self.state: State = "idle"
        self.checksums: dict[str, int] = {}
        """Of the new set's bytes in `dtype`, once verified; empty where they are not known."""
        self.dtype = "float32"
        """Element type of `checksums`: float32 or bfloat16."""
        self._expected = expected
        self._optional = optional or {}
        self._live = live
        self._read = read
        self._manifest: Manifest | None = None
        self._staged: StagedTensors | None = None
        self._arriving: ArrivingTensors | None = None

    @property
    def manifest(self) -> Manifest:
        """What is being staged. Raises ProtocolError before `begin`."""
        if self._manifest is None:
            raise ProtocolError("the update has not begun: there is no manifest yet")
        return self._manifest

    def begin(self, version: int, manifest: Manifest) -> None:
        """Check the manifest against the model and, of a delta, the parent. Raises ManifestError, ParentMismatchError.

        `version` is the one that the update shall have; it replaces the manifest's.
        """
        self._enter("begin", "idle")
        with _aborting(self):
            if type(version) is not int or version < 0:
                raise VersionOrderError(f"version must be an integer from 0, got {version!r}")
            self._check_parent(manifest)
            self.check_fit(manifest)
            self._manifest = manifest
            self._staged = StagedTensors(manifest)
            self.state = "staging"

    def check_fit(self, manifest: Manifest) -> None:
        """Raise ManifestError unless the model's tensors are there, and no others, each in its shape."""
        names = {spec.name for spec in manifest.tensors}
        manifest.require({**self._expected, **{k: v for k, v in self._optional.items() if k in names}})

    def begin_placed(self, manifest: Manifest) -> None:
        """In place of `begin` and `stage`, for a complete set that a device copies by itself.

        That it fits the model was checked, by `check_fit`, when its tensors were first met.
        """
        self._enter("begin_placed", "idle")
        assert manifest.parent is None, "a delta is staged"
        self._manifest = manifest
        self.state = "placing"

    def stage(self, bucket: Bucket) -> None:
        """Take pieces of tensors. Raises ManifestError for a piece that is nowhere in the manifest or came before."""
        self._enter("stage", "staging")
        assert self._staged is not None, "of this state"
        with _aborting(self):
            for piece in bucket.pieces:
                self._staged.take(piece, lasting=bucket.lasting)

    def verify(self) -> WideTensors:
        """The tensors, by name, float32 on access, after their checksums and the result's were found as published.

        Of a delta, those that it changes. Raises IncompleteUpdateError, ChecksumError, ParentMismatchError.
        """
        self._enter("verify", "staging")
        staged, specs = self._staged, self.manifest.tensors
        assert staged is not None, "of this state"
        with _aborting(self):
            staged.check_complete()
            for spec in specs:
                if self._read is None or self.manifest.parent is not None or spec.name in self._read:
                    self._compare(spec.name, staged.checksum(spec), spec.checksum)
            whole = WholeTensors(self.manifest, self._live, self._read)
            tensors = whole.of(staged)
            self._note_result(whole, tensors)
            self.state = "verified"
            return tensors

    def arriving(self, buckets: Iterable[Bucket]) -> ArrivingTensors:
        """In place of `stage`, for a complete set: the expected tensors, which are checked as they are read.

        What reads them must make no use of them before `verify_read`.
        """
        self._enter("arriving", "staging")
        assert self.manifest.parent is None, "a delta is staged"
        with _aborting(self):
            self._arriving = ArrivingTensors(self.manifest, buckets, self._expected.keys(), self._read)
            self.state = "arriving"
            return self._arriving

    def verify_read(self) -> None:
        """Check what was not read of the tensors of `arriving`. Raises IncompleteUpdateError, ChecksumError."""
        self._enter("verify_read", "arriving")
        assert self._arriving is not None, "of this state"
        with _aborting(self):
            self._arriving.finish()
            self._note_checksums()
            self.state = "verified"

    def verify_placed(self, published: Mapping[str, int], placed: Mapping[str, int]) -> None:
        """After `begin_placed`: compare checksums, by name, with those of what came to its place.

        Raises IncompleteUpdateError, ChecksumError.
        """
        self._enter("verify_placed", "placing")
        with _aborting(self):
            for name in self._expected:
                if name not in placed:
                    raise IncompleteUpdateError(f"version {self.manifest.version}: tensor {name!r} did not arrive")
            for name, actual in placed.items():
                self._compare(name, actual, published[name])
            self.state = "verified"

    def commit(self, flip: Callable[[], None]) -> None:
        """Let the new version serve: `flip` does, in one step. If it raises, the update is aborted."""
        self._enter("commit", "verified")
        with _aborting(self):
            flip()
            self.state = "committed"

    def publish(self) -> int:
        """Name the version to the world; returns it."""
        self._enter("publish", "committed")
        self.state = "published"
        self._release()
        return self.manifest.version

    def abort(self) -> None:
        """Forget what was staged. Idempotent, and possible until the commit; raises ProtocolError after it."""
        if self.state in ("committed", "published"):
            raise ProtocolError(f"abort of version {self.manifest.version}, which is {self.state}")
        self.state = "aborted"
        self._release()

    def release(self) -> None:
        """Drop the verified tensors once they are packed, so that their lease can end."""
        self._release()

    # -- inside -------------------------------------------------------------------------------------------------------
    def _enter(self, step: str, needed: State) -> None:
        if self.state != needed:
            raise ProtocolError(f"{step} needs an update that is {needed}, this one is {self.state}")

    def _release(self) -> None:
        if self._staged is not None:
            self._staged.clear()
        if self._arriving is not None:
            self._arriving.release()

    def _check_parent(self, manifest: Manifest) -> None:
        if manifest.parent is None:
            return
        if self._live is None:
            raise ParentMismatchError(f"version {manifest.version} is a delta, but no complete set is live")
        if manifest.parent != self._live.version:
            raise ParentMismatchError(
                f"version {manifest.version} is a delta to version {manifest.parent}, "
                f"but version {self._live.version} is live"
            )
        self._live = self._live.in_dtype(manifest.result_dtype)

    def _compare(self, name: str, actual: int, published: int) -> None:
        if actual != published:
            raise ChecksumError(
                f"tensor {name!r} of version {self.manifest.version}: checksum {actual:016x} is not the "
                f"manifest's {published:016x}; it was damaged or overwritten by a later publication"
            )

    def _note_checksums(self) -> None:
        """Of a complete set, where all tensors are of one type that a delta may have."""
        if self.manifest.checksum_kind != XXH3:
            return
        dtypes = {spec.dtype for spec in self.manifest.tensors}
        if dtypes <= {"float32"} or dtypes <= {"bfloat16"}:
            self.dtype = "bfloat16" if "bfloat16" in dtypes else "float32"
            self.checksums = {spec.name: spec.checksum for spec in self.manifest.tensors}

    def _note_result(self, whole: WholeTensors, tensors: WideTensors) -> None:
        """Checksums of the set that this update makes."""
        if self.manifest.parent is None:
            self._note_checksums()
        else:
            self.checksums = whole.checksums(tensors, self._expected, self._optional)
            self.dtype = self.manifest.result_dtype


def receive(
    session: UpdateSession, version: int, lease: Lease, bucket_bytes: int = DEFAULT_BUCKET_BYTES
) -> WideTensors:
    """The session's steps up to `verify`, over all that a lease gives."""
    session.begin(version, lease.manifest)
    for bucket in lease.buckets(bucket_bytes):
        session.stage(bucket)
        del bucket  # a bucket that lasts holds its lease
    return session.verify()


class _aborting:  # noqa: N801 - reads as a statement
    """Aborts the session when its block raises."""

    def __init__(self, session: UpdateSession) -> None:
        self._session = session

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if error is not None and not isinstance(error, ProtocolError):
            self._session.abort()
