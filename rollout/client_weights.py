"""The client's methods about weights: a server gets them by name where it can read them itself, else as arrays."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.client_calls import PendingCall
from zerokl.rollout.control import POLICY
from zerokl.rollout.expert_balance import ExpertLoad
from zerokl.rollout.hooks import Hook, HookName, OnHookError, UpdateEvent, UpdateHooks
from zerokl.rollout.hot_swap import HotSwapping
from zerokl.rollout.in_flight import InFlightOptions, KVMode, OnStale, UpdateMode
from zerokl.rollout.sleep import SleepTag, sleep_level, sleep_tags
from zerokl.rollout.validation import check_bool
from zerokl.rollout.weight_source import (
    DeviceWeights,
    FolderWeights,
    SharedWeights,
    TensorWeights,
    as_array,
    weight_source,
)

if TYPE_CHECKING:
    from zerokl.rollout.engine_weights import Source

_PIECE_BYTES = 4 << 20
_PIECES_IN_FLIGHT = 4


class ClientWeightMethods(HotSwapping, ABC):
    """The part of `RolloutClient` that changes weights."""

    _hooks: UpdateHooks
    _uploads: itertools.count[int]

    @abstractmethod
    def _call(self, kind: str, **body: Any) -> Any:
        """Make a call and wait for its value."""

    @abstractmethod
    def _start(self, call: PendingCall) -> PendingCall:
        """Send a call."""

    def update_weights(
        self,
        source: Source,
        version: int | None = None,
        *,
        mode: UpdateMode = "wait",
        kv: KVMode | None = None,
        max_staleness: int | None = None,
        on_stale: OnStale = "requeue",
        allow_rewind: bool = False,
        bucket_bytes: int | None = None,
    ) -> int:
        """See `RolloutEngine.update_weights`. A publication, file or folder is read by the server, on its machine;
        arrays are sent, 4 MiB at a time.
        """
        options = InFlightOptions(mode=mode, kv=kv, max_staleness=max_staleness, on_stale=on_stale)
        weights, version = weight_source(source, version, bucket_bytes)
        event = UpdateEvent(live_version=self.get_weight_version(), version=version, mode=mode)
        try:
            self._hooks.call("before_update", event)
            fields = self._upload(weights.tensors) if isinstance(weights, TensorWeights) else _source_fields(weights)
            body = {**dataclasses.asdict(options), **fields, "version": version, "allow_rewind": allow_rewind}
            body["bucket_bytes"] = bucket_bytes
            live: int = self._call("update_weights", **body)
        except BaseException as error:
            self._hooks.call("on_failure", dataclasses.replace(event, error=error))
            raise
        self._hooks.call("after_commit", dataclasses.replace(event, live_version=live))
        return live

    async def aupdate_weights(self, source: Source, version: int | None = None, **options: Any) -> int:
        """`update_weights` for coroutines, with its options."""
        return await asyncio.to_thread(lambda: self.update_weights(source, version, **options))

    def add_update_hook(self, name: HookName, hook: Hook, *, on_error: OnHookError | None = None) -> Callable[[], None]:
        """See `RolloutEngine.add_update_hook`. Hooks are this client's and are called for its own updates."""
        return self._hooks.add(name, hook, on_error)

    def pin_weights(self, name: str = "reference") -> int:
        """See `RolloutEngine.pin_weights`."""
        version: int = self._call("pin_weights", name=_text("name", name))
        return version

    def drop_weights(self, name: str) -> None:
        """See `RolloutEngine.drop_weights`."""
        self._call("drop_weights", name=_text("name", name))

    def get_weight_version(self, name: str = POLICY) -> int:
        """See `RolloutEngine.get_weight_version`."""
        version: int = self._call("get_weight_version", name=_text("policy", name))
        return version

    def expert_load(self, *, reset: bool = False) -> ExpertLoad:
        """See `RolloutEngine.expert_load`."""
        value = self._call("expert_load", reset=check_bool("reset", reset))
        last_step, total = (np.array(value[name], np.int64).reshape(value["shape"]) for name in ("last_step", "total"))
        return ExpertLoad(last_step=last_step, total=total)

    def rebalance_experts(self) -> int:
        """See `RolloutEngine.rebalance_experts`."""
        num_moves: int = self._call("rebalance_experts")
        return num_moves

    def sleep(
        self,
        tags: SleepTag | Collection[SleepTag] | None = None,
        level: int = 1,
        *,
        spill_dir: str | Path | None = None,
    ) -> None:
        """See `RolloutEngine.sleep`; `spill_dir` is a folder on the server's machine."""
        folder = None if spill_dir is None else str(spill_dir)
        self._call("sleep", tags=sleep_tags(tags), level=sleep_level(level), spill_dir=folder)

    def wake_up(self, tags: SleepTag | Collection[SleepTag] | None = None) -> list[str]:
        """See `RolloutEngine.wake_up`."""
        away: list[str] = self._call("wake_up", tags=sleep_tags(tags))
        return away

    def _upload(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Send arrays; returns the fields by which update_weights finds them."""
        if not tensors:
            raise ValueError("source must hold the model's tensors: all are missing")
        number = next(self._uploads)
        sent: deque[PendingCall] = deque()
        for pieces, data in _pieces((name, as_array(name, tensor)) for name, tensor in tensors.items()):
            if len(sent) == _PIECES_IN_FLIGHT:
                sent.popleft().future.result()
            sent.append(self._start(PendingCall("upload", {"upload": number, "pieces": pieces}, {"data": data})))
        for call in sent:
            call.future.result()
        return {"source": "upload", "upload": number}


def _pieces(tensors: Iterable[tuple[str, NDArray[Any]]]) -> Iterable[tuple[list[Any], NDArray[np.uint8]]]:
    """([name, dtype, shape, first byte, bytes] ..., their bytes) of about _PIECE_BYTES each."""
    pieces: list[Any] = []
    chunks: list[NDArray[np.uint8]] = []
    total = 0
    for name, array in tensors:
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start = 0
        while start < len(flat) or not start:
            size = min(len(flat) - start, _PIECE_BYTES - total)
            pieces.append([name, array.dtype.name, list(array.shape), start, size])
            chunks.append(flat[start : start + size])
            start, total = start + size, total + size
            if total == _PIECE_BYTES or len(pieces) == 4096:
                yield pieces, np.concatenate(chunks)
                pieces, chunks, total = [], [], 0
            if not len(flat):
                break
    if pieces:
        yield pieces, np.concatenate(chunks)


def _source_fields(source: FolderWeights | SharedWeights | DeviceWeights) -> dict[str, Any]:
    from zerokl.weight_sync import PublishedFile, PublishedShards

    if isinstance(source, FolderWeights):
        return {"source": "folder", "path": str(Path(source.path).absolute())}
    if isinstance(source, DeviceWeights):
        return {"source": "device", "published": source.published.to_bytes()}
    published = source.published
    if isinstance(published, PublishedFile):
        return {"source": "file", "path": str(Path(published.path).absolute()), "version": published.version}
    kind = "shards" if isinstance(published, PublishedShards) else "shared"
    return {"source": kind, "published": published.to_bytes()}


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {value!r}")
    return value
