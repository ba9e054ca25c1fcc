"""Which KV block holds which content: full blocks under a chain of hashes."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

DIGEST_SIZE = 16

_EMPTY = hashlib.blake2b(digest_size=DIGEST_SIZE, person=b"zerokl-kv-block")
"""Copied for each block, which is faster than making one; never updated."""


def root_key(weight_epoch: int, salt: str) -> bytes:
    """First link of a chain. Keys and values depend on the weights: another epoch is another chain, never a stale hit.

    `salt` splits what must not be shared further.
    """
    content = weight_epoch.to_bytes(8, "little") + salt.encode()
    return hashlib.blake2b(content, digest_size=DIGEST_SIZE, person=b"zerokl-kv-root").digest()


def block_key(parent: bytes, tokens: bytes) -> bytes:
    """Key of a block from the key of the block before it (or `root_key`) and its own token ids as bytes.

    A cryptographic hash of all tokens up to the block's last, so no prompt can be made that hits the blocks of another
    one; then the block's own tokens, so that whoever finds a key has compared them.
    """
    content = _EMPTY.copy()
    content.update(parent[:DIGEST_SIZE] + tokens)
    return content.digest() + tokens


class PrefixKeys(NamedTuple):
    """The chain of keys of one sequence's blocks, as far as they were asked for."""

    root: bytes
    keys: list[bytes]


class PrefixCache:
    """A one-to-one map between keys and blocks. Blocks enter it once computed and leave it by `forget` or `clear`."""

    __slots__ = ("_block_of", "_key_of", "find")

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self.find = self._block_of.get
        """find(key): the block under `key`, or None."""

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block: int) -> bool:
        return block in self._key_of

    def insert(self, key: bytes, block: int) -> None:
        """Publish a computed block; where equal content is published already, `block` stays private."""
        if key not in self._block_of:
            assert block not in self._key_of, f"block {block} is published twice"
            self._block_of[key] = block
            self._key_of[block] = key

    def forget(self, block: int) -> None:
        """Remove a published block."""
        del self._block_of[self._key_of.pop(block)]

    def clear(self) -> None:
        """Remove all published blocks."""
        self._block_of.clear()
        self._key_of.clear()

    def check_integrity(self) -> None:
        """Assert that the two directions of the map agree."""
        assert len(self._block_of) == len(self._key_of)
        for key, block in self._block_of.items():
            assert self._key_of[block] == key, f"block {block} is under two keys"
