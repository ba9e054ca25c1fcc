"""Reference counts of KV blocks and the order in which free ones are handed out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping


class BlockPool:
    """`num_blocks` blocks with ids from 0. Each is in one of three states:

        used   one or more references
        free   no reference, content worthless
        idle   no reference, content known to the prefix cache: handed out last, longest idle first

    Every operation is O(1). `on_evict` is called with an idle block that is about to lose its content.
    """

    __slots__ = ("_free", "_idle", "_on_evict", "_references", "num_blocks")

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be >= 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        # Ordered by the moment of going idle; a plain dict would make taking the oldest O(n).
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Blocks without a reference whose content is still of use."""
        return len(self._idle)

    def is_used(self, block: int) -> bool:
        """Whether the block has a reference."""
        return self._references[block] > 0

    def num_references(self, block: int) -> int:
        """References to the block; 0 for a free or idle one."""
        return self._references[block]

    def allocate(self) -> int:
        """A block with one reference. The caller has made sure that `num_free` is above 0."""
        assert self.num_free > 0, "allocation from an exhausted pool"
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._on_evict(block)
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reference to a used or idle block."""
        if self._references[block] == 0:
            del self._idle[block]
        self._references[block] += 1

    def release(self, block: int, *, keep: bool) -> None:
        """One reference less; the last one makes the block idle (`keep`) or free."""
        assert self._references[block] > 0, f"block {block} is released more often than it was taken"
        self._references[block] -= 1
        if self._references[block] > 0:
            return
        if keep:
            self._idle[block] = None
        else:
            self._free.append(block)

    def discard_idle(self) -> None:
        """Turn every idle block into a free one, without calling `on_evict`."""
        self._free.extend(self._idle)
        self._idle.clear()

    def check_integrity(self, references: Mapping[int, int]) -> None:
        """Assert that each block is in exactly one state and that `references` (block -> count) are all there are."""
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & idle, f"blocks both free and idle: {sorted(free & idle)}"
        for block, count in enumerate(self._references):
            expected = references.get(block, 0)
            assert count == expected, f"block {block} counts {count} references, its users hold {expected}"
            assert (count == 0) == (block in free or block in idle), (
                f"block {block} with {count} references is misplaced"
            )
        used = sum(count > 0 for count in self._references)
        assert used + len(free) + len(idle) == self.num_blocks, "blocks got lost"
