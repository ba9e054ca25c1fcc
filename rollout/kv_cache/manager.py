"""The one owner of KV blocks: tables of requests, sharing of prefixes, conservation of blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set

import numpy as np

from zerokl.rollout.kv_cache.block_pool import BlockPool
from zerokl.rollout.kv_cache.prefix_cache import PrefixCache, PrefixKeys, block_key, root_key
from zerokl.rollout.request import Request

SPARE_TABLE_ENTRIES = 8


def _nothing(_: Request) -> None: ...


class KVCacheManager:
    """Gives blocks to requests and takes them back. Questions (`match`, `num_...`) change nothing.

    The table of a request, in positions (B = block size):

        |-- matched at admission --|-- computed here --|-- allocated, not computed yet --|
        0                    k * B             num_computed_tokens            num_blocks * B

    The first range is shared and read only. Computation starts at its end, or where it holds all that the request
    knows, at the last token in it, whose row is wanted and whose keys are there: a step does not write what lies in
    published blocks. Full blocks of the second range are published under their content once a step's result is in.
    All tokens known at admission get their blocks at once; afterwards only sampling makes a table grow.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        on_release: Callable[[Request], None] = _nothing,
    ) -> None:
        """With `enable_prefix_caching` off, blocks are shared within a group of samples only.

        `on_release` is told of a request that is about to lose its blocks, whose content is still there.
        """
        self._on_release = on_release
        self.block_size = block_size
        self._enable_prefix_caching = enable_prefix_caching
        self._prefixes = PrefixCache()
        self._pool = BlockPool(num_blocks, on_evict=self._prefixes.forget)

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now, those with cached content included."""
        return self._pool.num_free

    @property
    def num_cached_blocks(self) -> int:
        """Blocks with published content, in use or not."""
        return len(self._prefixes)

    # -- admission ---------------------------------------------------------------------------------
    def prefix_keys(self, request: Request, weight_epoch: int) -> PrefixKeys:
        """Keys of the request's first blocks as far as it knows them, for `match` to go on from.

        Every rank's manager makes the same keys.
        """
        root = root_key(weight_epoch, "" if self._enable_prefix_caching else f"group {request.group_id}")
        return PrefixKeys(root, list(request.block_keys) if request.key_root == root else [])

    def adopt_keys(self, request: Request, prefix: PrefixKeys) -> None:
        """Have the request remember the keys that were made."""
        request.key_root, request.block_keys = prefix.root, prefix.keys

    def match(self, request: Request, prefix: PrefixKeys) -> list[int]:
        """Published blocks with the request's longest cached prefix, up to the first token whose row is wanted.

        Of all that exists only `prefix` changes: it grows by the keys made.
        """
        matched: list[int] = []
        if not self._shares(request):
            return matched
        find, (root, keys) = self._prefixes.find, prefix
        limit = (request.next_row + 1) // self.block_size
        for key in keys[:limit]:
            block = find(key)
            if block is None:
                return matched
            matched.append(block)
        for tokens in self._blocks_of_tokens(request, len(keys), limit):
            keys.append(self._next_key(keys[-1] if keys else root, tokens))
            block = find(keys[-1])
            if block is None:
                return matched
            matched.append(block)
        return matched

    def first_position(self, request: Request, matched: Sequence[int]) -> int:
        """Where the request's computation starts behind matched blocks: at least one row is left to give."""
        return min(len(matched) * self.block_size, request.next_row)

    def num_unused(self, blocks: Sequence[int], besides: Set[int]) -> int:
        """How many of the blocks no request holds, those of `besides` left out."""
        is_used = self._pool.is_used
        return len([block for block in blocks if not is_used(block) and block not in besides])

    def num_released(self, request: Request, dropped: Counter[int]) -> int:
        """Blocks that would come free with the request, were `dropped` (block -> references) given back before it.

        Adds the request's own references to `dropped`.
        """
        num_free = 0
        for block in request.block_table[: request.num_blocks].tolist():
            dropped[block] += 1
            num_free += dropped[block] == self._pool.num_references(block)
        return num_free

    def share(self, matched: Iterable[int]) -> None:
        """Take a reference to each matched block, before any allocation that might evict it."""
        for block in matched:
            self._pool.share(block)

    def admit(self, request: Request, matched: list[int]) -> None:
        """Build the table: matched blocks, shared before, then new ones. What lies before its start is computed."""
        assert request.num_blocks == 0, f"{request.request_id} holds blocks already"
        self._make_table(request, matched)
        request.num_computed_tokens = self.first_position(request, matched)

    def take_over(self, request: Request, matched: list[int]) -> list[int]:
        """Replace the request's table, of another pool, by one of this pool; returns the blocks it held there.

        `matched` blocks are shared before; the others are new and await their content.
        """
        blocks: list[int] = request.block_table[: request.num_blocks].tolist()
        self._make_table(request, matched)
        return blocks

    def _make_table(self, request: Request, matched: list[int]) -> None:
        total = self.blocks_for(request.compute_target)
        fresh = [self._pool.allocate() for _ in range(total - len(matched))]
        request.block_table = np.array(matched + fresh + [0] * SPARE_TABLE_ENTRIES, np.int32)
        request.num_blocks = total
        request.num_published_blocks = len(matched)

    # -- growth and results ------------------------------------------------------------------------
    def grow(self, request: Request) -> None:
        """One more block, which the caller knows to be free, at the end of the table."""
        if request.num_blocks == len(request.block_table):
            request.block_table = np.concatenate([request.block_table, np.zeros_like(request.block_table)])
        request.block_table[request.num_blocks] = self._pool.allocate()
        request.num_blocks += 1

    def publish(self, request: Request) -> None:
        """Make full blocks that were computed since the last call available to others.

        A request with keys and values of earlier weights in its blocks publishes nothing: what it computes from them
        belongs to no epoch.
        """
        num_full = request.num_computed_tokens // self.block_size
        if num_full <= request.num_published_blocks or request.has_older_kv or not self._shares(request):
            return
        keys, first, insert = self._make_keys(request, num_full), request.num_published_blocks, self._prefixes.insert
        for key, block in zip(keys[first:num_full], request.block_table[first:num_full].tolist(), strict=True):
            insert(key, block)
        request.num_published_blocks = num_full

    def keep_older(self, request: Request) -> None:
        """The weights change under a request that keeps its blocks; they stay its own until it lets go of them."""
        request.has_older_kv = True
        request.num_kept_updates += 1

    def release(self, request: Request) -> None:
        """Take all blocks back. Published ones keep their content until they are needed."""
        self._on_release(request)
        self.release_blocks(request.block_table[: request.num_blocks].tolist())
        request.num_blocks = 0
        request.num_published_blocks = 0
        request.has_older_kv = False

    def release_blocks(self, blocks: list[int]) -> None:
        """Take back blocks that `take_over` returned, or a whole table."""
        for block in reversed(blocks):  # the end of a chain goes idle first and is evicted first: its head serves more
            self._pool.release(block, keep=block in self._prefixes)

    # -- sharing -----------------------------------------------------------------------------------
    def shareable_tokens(self, request: Request) -> int:
        """Tokens of the prompt that samples of the request's group can take from one of them; 0 without a group."""
        if request.group_id is None:
            return 0
        return request.num_prompt_tokens // self.block_size * self.block_size

    def reset(self) -> None:
        """Forget all cached prefixes. Requests keep the blocks they hold."""
        self._prefixes.clear()
        self._pool.discard_idle()

    def check_integrity(self, requests: Iterable[Request], held: Iterable[list[int]] = ()) -> None:
        """Assert free + idle + used = all blocks, and that tables and `held` blocks explain every reference."""
        references: Counter[int] = Counter()
        for request in requests:
            blocks = request.block_table[: request.num_blocks].tolist()
            assert len(set(blocks)) == len(blocks), f"{request.request_id} holds a block twice"
            size = request.num_blocks * self.block_size
            assert request.num_computed_tokens <= size, f"{request.request_id} has computed tokens outside its blocks"
            references.update(blocks)
        for blocks in held:
            references.update(blocks)
        self._pool.check_integrity(references)
        self._prefixes.check_integrity()
        idle = sum(block in self._prefixes and not self._pool.is_used(block) for block in range(self.num_blocks))
        assert idle == self._pool.num_idle, "an idle block without content, or content of a free block"

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def _shares(self, request: Request) -> bool:
        return self._enable_prefix_caching or request.group_id is not None

    def _blocks_of_tokens(self, request: Request, begin: int, end: int) -> Iterable[bytes]:
        """Token ids of blocks begin .. end of the request."""
        tokens = request.token_ids[begin * self.block_size : end * self.block_size].tobytes()
        if end == begin + 1:  # as a rule, of a sequence that decodes
            return (tokens,) if tokens else ()
        size = self.block_size * request.token_ids.itemsize
        return (tokens[start : start + size] for start in range(0, len(tokens), size))

    def _make_keys(self, request: Request, end: int) -> list[bytes]:
        """Keys of the request's blocks, at least up to `end`, whose tokens are known."""
        keys = request.block_keys
        if len(keys) < end:
            parent = keys[-1] if keys else request.key_root
            assert parent is not None, f"{request.request_id} was never matched"
            for tokens in self._blocks_of_tokens(request, len(keys), end):
                parent = self._next_key(parent, tokens)
                keys.append(parent)
        return keys

    def _next_key(self, parent: bytes, tokens: bytes) -> bytes:
        return block_key(parent, tokens)
