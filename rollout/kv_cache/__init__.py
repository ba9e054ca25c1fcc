"""Bookkeeping of paged KV blocks: who holds which block, and which blocks can be shared. The tensors live elsewhere.

`block_pool` owns reference counts and the free blocks, `prefix_cache` the map from contents to blocks, `manager` the
block tables of requests; only the manager is meant for other parts. Pure Python: nothing here imports a device library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerokl.rollout.kv_cache.manager import KVCacheManager as KVCacheManager

_EXPORTS = {"KVCacheManager": "zerokl.rollout.kv_cache.manager"}

__all__ = ["KVCacheManager"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
