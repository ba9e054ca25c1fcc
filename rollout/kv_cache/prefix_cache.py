"""Which KV block holds which content: full blocks under a chain of hashes."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

DIGEST_SIZE = 16


def root_key(weight_epoch: int, salt: str) -> bytes:
    """First link of a chain. Keys and values depend on the weights: another epoch is another chain, never a stale hit.

    `salt` splits what must not be shared further.
    """
    content = weight_epoch.to_bytes(8, "little") + salt.encode()
    return hashlib.blake2b(content, digest_size=DIGEST_SIZE, person=b"zerokl-kv-root").digest()


def block_key(parent: bytes, tokens: bytes) -> bytes:
    """Key of a block from the key of the block before it (or `root_key`) and its own token ids as bytes.

    A cryptographic hash: no prompt can be made that hits the blocks of another one.
    """
    return hashlib.blake2b(parent + tokens, digest_size=DIGEST_SIZE, person=b"zerokl-kv-block").digest()


class PrefixKeys(NamedTuple):
    """The chain of keys of one sequence's blocks, as far as they were asked for."""

    root: bytes
    keys: list[bytes]
    contents: list[bytes]
    """The blocks' token ids as bytes, so that asking several caches makes them once."""


class PrefixCache:
    """A one-to-one map between keys and blocks. Blocks enter it once computed and leave it by `forget` or `clear`."""

    __slots__ = ("_block_of", "_content_of")

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._content_of: dict[int, tuple[bytes, bytes]] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block: int) -> bool:
        return block in self._content_of

    def find(self, key: bytes, tokens: bytes) -> int | None:
        """The block under `key`, if its own tokens are `tokens` indeed."""
        block = self._block_of.get(key)
        if block is None or self._content_of[block][1] != tokens:
            return None
        return block

    def insert(self, key: bytes, tokens: bytes, block: int) -> None:
        """Publish a computed block; where equal content is published already, `block` stays private."""
        if key not in self._block_of:
            assert block not in self._content_of, f"block {block} is published twice"
            self._block_of[key] = block
            self._content_of[block] = (key, tokens)

    def forget(self, block: int) -> None:
        """Remove a published block."""
        key, _ = self._content_of.pop(block)
        del self._block_of[key]

    def clear(self) -> None:
        """Remove all published blocks."""
        self._block_of.clear()
        self._content_of.clear()

    def check_integrity(self) -> None:
        """Assert that the two directions of the map agree."""
        assert len(self._block_of) == len(self._content_of)
        for key, block in self._block_of.items():
            assert self._content_of[block][0] == key, f"block {block} is under two keys"
