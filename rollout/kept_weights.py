"""The engine's own copy of the weights, for ranks that are started anew.

Of the model's folder it keeps the path alone; whatever came by an update it keeps in shared memory of its own, as it
was published, because a trainer overwrites its publications and arrays, and may delete its folders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from zerokl.rollout.control import POLICY
from zerokl.rollout.errors import WorkerError
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.layout import EMBED, LM_HEAD, expected_tensors
from zerokl.rollout.models.loader import open_tensors
from zerokl.rollout.weight_source import (
    DeviceWeights,
    FolderWeights,
    SharedWeights,
    TensorWeights,
    WeightSource,
    as_array,
)
from zerokl.weight_sync import (
    PublishedDeviceWeights,
    PublishedFile,
    PublishedShards,
    PublishedWeights,
    WeightPublisher,
    open_published,
)
from zerokl.weight_sync.device_host import copied_to_host
from zerokl.weight_sync.device_memory import ReadableMemory
from zerokl.weight_sync.live_weights import LiveWeights
from zerokl.weight_sync.manifest import Manifest
from zerokl.weight_sync.receiver import lease_published
from zerokl.weight_sync.session import UpdateSession, receive
from zerokl.weight_sync.tensor_spec import TensorSpec
from zerokl.weight_sync.views import Overlay, WideTensors

_Stamp = tuple[tuple[str, int, int, int], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeptSet:
    """One set of weights that any rank can stage."""

    version: int
    source: FolderWeights | SharedWeights
    stamp: _Stamp = ()
    """Of a folder: its files, their sizes and times."""
    publisher: WeightPublisher | None = None
    """Whose segment the set is in; None for a folder."""

    def check(self) -> None:
        """Raise WorkerError for a folder that is not as it was."""
        if isinstance(self.source, FolderWeights) and _stamp(self.source.path) != self.stamp:
            raise WorkerError(
                f"a rank cannot be started anew: {self.source.path}, where its weights came from, has changed since"
            )


class KeptWeights:
    """What each name of `WeightSets` stands for, and what is staged. Memory: one set for each that differs."""

    def __init__(self, config: ModelConfig, device_memory: Callable[[], ReadableMemory]) -> None:
        """`device_memory` makes what publications in a GPU's memory are copied by, once the first of them comes."""
        self._config = config
        self._device_memory = cache(device_memory)
        self._sets: dict[str, KeptSet] = {}
        self._spare: list[WeightPublisher] = []
        self.staged: KeptSet | None = None

    def keep(self, source: WeightSource, version: int) -> KeptSet:
        """Copy a set that is about to be staged, in place of what was staged before.

        Raises ValueError for a source that cannot be read.
        """
        self.forget_staged()
        if isinstance(source, FolderWeights) and not self._sets:
            path = str(Path(source.path).absolute())
            self.staged = KeptSet(version=version, source=FolderWeights(path=path), stamp=_stamp(path))
            return self.staged
        publisher = self._spare.pop() if self._spare else WeightPublisher("kept", buffers=1)
        try:
            published = self._copy(publisher, source, version)
        except BaseException:
            publisher.close()
            raise
        self.staged = KeptSet(version=version, source=SharedWeights(published=published), publisher=publisher)
        return self.staged

    def commit(self) -> None:
        """What was staged is the policy's now."""
        assert self.staged is not None, "nothing is staged"
        old = self._sets.get(POLICY)
        self._sets[POLICY], self.staged = self.staged, None
        self._release(old)

    def forget_staged(self, *, is_read: bool = False) -> None:
        """Nothing is staged. `is_read`: somebody may still read it, so that its memory cannot be used again."""
        old, self.staged = self.staged, None
        self._release(old, reuse=not is_read)

    def pin(self, name: str) -> None:
        """The policy's set has another name too."""
        old = self._sets.get(name)
        self._sets[name] = self._sets[POLICY]
        self._release(old)

    def drop(self, name: str) -> None:
        """Forget a name."""
        self._release(self._sets.pop(name))

    def drop_all(self) -> None:
        """The ranks have dropped all sets, and what was staged."""
        self.forget_staged()
        for name in list(self._sets):
            self.drop(name)

    def in_order(self) -> list[tuple[KeptSet, list[str]]]:
        """Each set with the names it is pinned under, the policy's last; checked by `KeptSet.check`."""
        kept = list(dict.fromkeys(self._sets.values()))
        live = self._sets.get(POLICY)
        kept.sort(key=lambda one: one is live)
        pins = [(name, one) for name, one in self._sets.items() if name != POLICY]
        for one in kept:
            one.check()
        return [(one, [name for name, other in pins if other is one]) for one in kept]

    def free_spare(self) -> None:
        """Free the memory that is kept for the next set."""
        while self._spare:
            self._spare.pop().close()

    def close(self) -> None:
        """Free all; idempotent."""
        self.drop_all()
        self.free_spare()

    def _release(self, old: KeptSet | None, *, reuse: bool = True) -> None:
        """Free a set that nothing stands for any more; the memory of one such is kept for the next."""
        if old is None or old.publisher is None or old is self.staged or old in self._sets.values():
            return
        if reuse and not self._spare:
            self._spare.append(old.publisher)
        else:
            old.publisher.close()

    # -- copies --------------------------------------------------------------------------------------------------------
    def _copy(self, publisher: WeightPublisher, source: WeightSource, version: int) -> PublishedWeights:
        if isinstance(source, TensorWeights):
            return publisher.publish(((n, as_array(n, tensor)) for n, tensor in source.tensors.items()), version)
        if isinstance(source, FolderWeights):
            return publisher.publish(open_tensors(source.path, self._config), version)
        if isinstance(source, DeviceWeights):
            return publisher.publish_stored(self._from_device(source.published), version)
        published = source.published
        if isinstance(published, PublishedShards):
            with published.verified() as tensors:
                return publisher.publish(tensors, version)
        if isinstance(published, PublishedWeights) and published.manifest.parent is None:
            return publisher.republish(published)
        return self._whole(publisher, published, version, source.bucket_bytes)

    def _from_device(self, published: PublishedDeviceWeights) -> list[tuple[TensorSpec, NDArray[Any]]]:
        """In a thread of its own: the current GPU of the caller's, which may be a trainer's, stays what it is."""
        with ThreadPoolExecutor(1, "zerokl-kept") as thread:
            return thread.submit(lambda: copied_to_host(published, self._device_memory())).result()

    def _whole(
        self, publisher: WeightPublisher, published: PublishedWeights | PublishedFile, version: int, bucket_bytes: int
    ) -> PublishedWeights:
        """What a file or a delta comes to."""
        expected = expected_tensors(self._config)
        opened = published.open() if isinstance(published, PublishedFile) else lease_published(published)
        with opened as lease, self._live(lease.manifest) as live:
            session = UpdateSession(expected, live, {LM_HEAD: expected[EMBED]})
            try:
                # No name here for the tensors: they hold the leases for as long as they live.
                return _publish(publisher, session, receive(session, version, lease, bucket_bytes), live)
            finally:
                session.release()

    @contextmanager
    def _live(self, manifest: Manifest) -> Iterator[LiveWeights | None]:
        """The policy's set, as a delta needs it; None for what is none, or where there is no policy's set."""
        kept = self._sets.get(POLICY)
        if manifest.parent is None or kept is None:
            yield None
        elif isinstance(kept.source, FolderWeights):
            kept.check()
            yield LiveWeights(version=kept.version, tensors=open_tensors(kept.source.path, self._config))
        else:
            assert isinstance(kept.source.published, PublishedWeights), "the engine's own"
            specs = kept.source.published.manifest.tensors
            with open_published(kept.source.published) as stored:
                tensors = WideTensors(stored, {spec.name: spec.dtype for spec in specs})
                yield LiveWeights(version=kept.version, tensors=tensors)


def _publish(
    publisher: WeightPublisher, session: UpdateSession, tensors: WideTensors, live: LiveWeights | None
) -> PublishedWeights:
    """The tensors of a verified session, over the live ones, in the type that a delta to them is to have."""
    whole = tensors if live is None else Overlay(tensors, live.tensors)
    rounded: Literal["bfloat16"] | None = "bfloat16" if session.dtype == "bfloat16" else None
    return publisher.publish(whole, session.manifest.version, dtype=rounded, inexact=session.manifest.inexact)


def _stamp(folder: str) -> _Stamp:
    files = sorted(Path(folder).glob("*.safetensors"))
    return tuple((path.name, (stat := path.stat()).st_size, stat.st_mtime_ns, stat.st_ino) for path in files)
