"""A set of weights of which each trainer rank publishes its own part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgpack  # type: ignore[import-untyped]

from zerokl.weight_sync.errors import ManifestError
from zerokl.weight_sync.manifest import FORMAT_VERSION, PublishedWeights
from zerokl.weight_sync.receiver import lease_published
from zerokl.weight_sync.session import UpdateSession, receive
from zerokl.weight_sync.views import ShardedTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedShards:
    """The ranks' publications of one version, and along which axis each tensor is cut.

    A tensor that `axes` does not name is whole on every rank; rank 0's is taken, and the others must equal it. Raises
    ManifestError for ranks of different versions, and for deltas.
    """

    ranks: tuple[PublishedWeights, ...]
    axes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.ranks:
            raise ManifestError("ranks: there must be at least one shard, got 0")
        for rank, shard in enumerate(self.ranks):
            if shard.version != self.version:
                raise ManifestError(f"rank {rank} published version {shard.version}, rank 0 {self.version}")
            if shard.manifest.parent is not None:
                raise ManifestError(f"rank {rank} published a delta: shards must be complete")
            self._check_whole(rank, shard)

    @property
    def version(self) -> int:
        """Of all ranks."""
        return self.ranks[0].version

    def to_bytes(self) -> bytes:
        """Encode as msgpack [format version, encoded ranks, axes]."""
        ranks = [shard.to_bytes() for shard in self.ranks]
        encoded: bytes = msgpack.packb((FORMAT_VERSION, ranks, dict(self.axes)))
        return encoded

    @staticmethod
    def from_bytes(encoded: bytes) -> PublishedShards:
        """Inverse of `to_bytes`. Raises ManifestError for anything else than its output."""
        try:
            version, ranks, axes = msgpack.unpackb(encoded)
        except (TypeError, ValueError, msgpack.UnpackException) as error:
            raise ManifestError(f"shards: not three msgpack fields: {error}") from error
        if version != FORMAT_VERSION or not isinstance(ranks, list) or not isinstance(axes, dict):
            raise ManifestError(f"shards: {version!r} is not format version {FORMAT_VERSION}, or fields are malformed")
        if not all(isinstance(name, str) and type(axis) is int for name, axis in axes.items()):
            raise ManifestError("shards: axes must map names to integers")
        if not all(isinstance(shard, bytes) for shard in ranks):
            raise ManifestError("shards: ranks must be encoded publications")
        return PublishedShards(ranks=tuple(PublishedWeights.from_bytes(shard) for shard in ranks), axes=axes)

    @contextmanager
    def verified(self) -> Iterator[ShardedTensors]:
        """The whole tensors, joined on access, after every part was found as published. Raises as the ranks' leases."""
        with ExitStack() as leases:
            sessions = []
            try:
                parts: list[Mapping[str, Any]] = []
                for shard in self.ranks:
                    session = UpdateSession({spec.name: spec.shape for spec in shard.manifest.tensors})
                    sessions.append(session)
                    lease = leases.enter_context(lease_published(shard))
                    parts.append(receive(session, self.version, lease))
                yield ShardedTensors(parts, self.axes)
            finally:
                parts = []
                for session in sessions:
                    session.release()

    def _check_whole(self, rank: int, shard: PublishedWeights) -> None:
        first = {spec.name: spec.checksum for spec in self.ranks[0].manifest.tensors if spec.name not in self.axes}
        for spec in shard.manifest.tensors:
            if spec.name in first and spec.checksum != first[spec.name]:
                raise ManifestError(f"tensor {spec.name!r} is not cut, but differs between rank 0 and rank {rank}")
