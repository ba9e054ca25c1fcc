"""Block pool, prefix cache and manager: conservation, sharing, eviction order, epochs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerokl.rollout.kv_cache.block_pool import BlockPool
from zerokl.rollout.kv_cache.manager import KVCacheManager
from zerokl.rollout.kv_cache.prefix_cache import PrefixCache, block_key, root_key
from zerokl.rollout.request import Request
from zerokl.rollout.sampling_params import SamplingParams


def make(request_id: str, tokens, group: str | None = None) -> Request:
    return Request.generate(request_id, np.asarray(tokens, np.int32), SamplingParams(), seed=0, group_id=group)


def match(manager: KVCacheManager, request: Request, epoch: int) -> list[int]:
    return manager.match(request, manager.prefix_keys(request, epoch))


def fits(manager: KVCacheManager, request: Request, matched: list[int], reserve: int) -> bool:
    """Whether a scheduler would admit the request and leave `reserve` blocks free."""
    new_blocks = manager.blocks_for(request.compute_target) - len(matched)
    return new_blocks + manager.num_unused(matched, set()) + reserve <= manager.num_free_blocks


def admit(manager: KVCacheManager, request: Request, epoch: int = 1) -> int:
    """Admit and compute a whole request; the number of tokens that came from the cache."""
    keys = manager.prefix_keys(request, epoch)
    matched = manager.match(request, keys)
    assert fits(manager, request, matched, reserve=0)
    manager.adopt_keys(request, keys)
    manager.share(matched)
    manager.admit(request, matched)
    start = request.num_computed_tokens
    request.num_computed_tokens = request.compute_target
    manager.publish(request)
    return start


def test_pool_hands_out_free_blocks_before_idle_ones_and_the_longest_idle_first():
    evicted: list[int] = []
    pool = BlockPool(4, evicted.append)
    blocks = [pool.allocate() for _ in range(4)]
    assert sorted(blocks) == [0, 1, 2, 3] and pool.num_free == 0
    for block in (blocks[2], blocks[0]):
        pool.release(block, keep=True)
    pool.release(blocks[1], keep=False)
    assert (pool.num_free, pool.num_idle) == (3, 2)
    assert pool.allocate() == blocks[1] and evicted == []
    assert pool.allocate() == blocks[2] and evicted == [blocks[2]]
    pool.share(blocks[0])
    assert pool.num_free == 0
    pool.share(blocks[0])
    pool.release(blocks[0], keep=True)
    assert pool.is_used(blocks[0])


def test_pool_refuses_misuse():
    with pytest.raises(ValueError, match="num_blocks must be >= 1, got 0"):
        BlockPool(0, lambda block: None)
    pool = BlockPool(1, lambda block: None)
    block = pool.allocate()
    with pytest.raises(AssertionError, match="exhausted"):
        pool.allocate()
    pool.release(block, keep=False)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(block, keep=False)
    with pytest.raises(AssertionError, match="counts 0 references, its users hold 1"):
        pool.check_integrity({block: 1})


def test_prefix_cache_compares_tokens_and_keys_depend_on_everything_before():
    cache = PrefixCache()
    root = root_key(1, "")
    key = block_key(root, b"abcd")
    cache.insert(key, 3)
    cache.insert(key, 4)
    assert cache.find(key) == 3 and cache.find(key[:-4] + b"abce") is None and 4 not in cache
    assert key.endswith(b"abcd"), "a key that is found says that the block's own tokens are these"
    assert (
        len({key, block_key(root_key(2, ""), b"abcd"), block_key(root_key(1, "g"), b"abcd"), block_key(key, b"abcd")})
        == 4
    )
    cache.forget(3)
    assert cache.find(key) is None and len(cache) == 0


def test_the_longest_prefix_is_matched_and_a_row_is_left_to_compute():
    manager = KVCacheManager(16, 8)
    admit(manager, make("a", range(24)))
    assert admit(manager, make("b", [*range(16), 99, 98])) == 16
    third = make("c", range(24))
    assert admit(manager, third) == 23  # all blocks are there: the last token alone is computed again, for its row
    assert third.num_published_blocks == 3
    assert admit(manager, make("d", range(25))) == 24
    assert len(match(manager, make("e", [7, *range(1, 24)]), 1)) == 0


def test_shared_blocks_are_the_same_ids():
    manager = KVCacheManager(16, 8)
    first, second = make("a", range(20)), make("b", range(20))
    admit(manager, first)
    admit(manager, second)
    assert first.block_table[:2].tolist() == second.block_table[:2].tolist()
    assert first.block_table[2] != second.block_table[2]
    manager.check_integrity([first, second])
    manager.release(first)
    manager.check_integrity([second])
    assert manager.num_free_blocks == 13 and manager.num_cached_blocks == 2


def test_a_score_request_takes_from_the_cache_only_what_comes_before_its_rows():
    manager = KVCacheManager(16, 8)
    admit(manager, make("a", range(32)))
    for start, blocks in ((1, 0), (7, 0), (8, 1), (9, 1), (23, 2), (24, 3), (25, 3)):
        assert len(match(manager, Request.score("s", list(range(32)), score_start=start), 1)) == blocks, start


def test_blocks_of_another_epoch_are_never_matched():
    manager = KVCacheManager(16, 8)
    admit(manager, make("a", range(24)), epoch=1)
    request = make("b", range(24))
    assert len(match(manager, request, 1)) == 3
    assert len(match(manager, request, 2)) == 0
    assert len(match(manager, request, 1)) == 3


def test_without_caching_only_a_group_shares():
    manager = KVCacheManager(32, 8, enable_prefix_caching=False)
    assert admit(manager, make("a", range(24))) == 0 == admit(manager, make("b", range(24)))
    assert manager.num_cached_blocks == 0
    assert admit(manager, make("g0", range(24), "g")) == 0
    assert admit(manager, make("g1", range(24), "g")) == 23
    assert admit(manager, make("h0", range(24), "h")) == 0


def test_eviction_takes_the_end_of_a_chain_first_and_reset_forgets_all():
    manager = KVCacheManager(4, 8)
    first = make("a", range(25))
    admit(manager, first)
    manager.release(first)
    assert manager.num_cached_blocks == 3 and manager.num_free_blocks == 4
    other = make("b", range(50, 60))
    admit(manager, other)  # takes the free block and the chain's last one
    assert len(match(manager, make("c", range(25)), 1)) == 2
    manager.reset()
    assert manager.num_cached_blocks == 0 and match(manager, make("c", range(25)), 1) == []
    manager.check_integrity([other])
    manager.release(other)
    assert manager.num_free_blocks == 4
    manager.check_integrity([])


def test_idle_blocks_that_a_request_would_wake_count_as_taken():
    manager = KVCacheManager(4, 8)
    first = make("a", range(25))
    admit(manager, first)
    manager.release(first)
    holder = make("h", range(60, 68))
    admit(manager, holder)
    request = make("b", range(33))
    matched = match(manager, request, 1)
    assert len(matched) == 3 and not fits(manager, request, matched, reserve=0)  # 5 blocks are needed, 3 are free
    request = make("c", range(24))
    matched = match(manager, request, 1)
    assert fits(manager, request, matched, reserve=0) and not fits(manager, request, matched, reserve=1)


def test_integrity_notices_a_lost_block():
    manager = KVCacheManager(4, 8)
    request = make("a", range(20))
    admit(manager, request)
    request.num_blocks -= 1
    request.num_computed_tokens = 0
    with pytest.raises(AssertionError, match="references"):
        manager.check_integrity([request])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(["admit", "release", "grow", "reset"]), st.integers(0, 7)), max_size=60),
    st.booleans(),
)
def test_blocks_are_conserved_whatever_happens(actions, caching):
    manager = KVCacheManager(12, 8, caching)
    held: list[Request] = []
    for number, (action, choice) in enumerate(actions):
        if action == "admit":
            request = make(str(number), [choice % 3] * 8 + list(range(choice * 5)), "g" if choice % 2 else None)
            matched = match(manager, request, 1)
            assert len(matched) * 8 < request.num_tokens
            if fits(manager, request, matched, reserve=choice % 2):
                manager.adopt_keys(request, manager.prefix_keys(request, 1))
                manager.share(matched)
                manager.admit(request, matched)
                request.num_computed_tokens = max(request.num_computed_tokens, request.num_tokens - choice)
                manager.publish(request)
                held.append(request)
        elif action == "release" and held:
            manager.release(held.pop(choice % len(held)))
        elif action == "grow" and held and manager.num_free_blocks:
            manager.grow(held[choice % len(held)])
        elif action == "reset":
            manager.reset()
        manager.check_integrity(held)
    for request in held:
        manager.release(request)
    assert manager.num_free_blocks == 12
