"""The scratch KV pool that the attention of a packed step needs."""

from __future__ import annotations

from typing import Any

from zerokl.kernels.autograd.arrays import empty
from zerokl.kernels.ops import AttentionSpec, KVPool, StepInputs
from zerokl.kernels.packed_step import BLOCK_SIZE, num_blocks


def scratch_pool(inputs: StepInputs, spec: AttentionSpec) -> KVPool[Any]:
    """A pool of one layer with room for the step; its content is whatever the memory held."""
    blocks = num_blocks(inputs)
    keys, _ = empty(1, blocks, spec.num_kv_heads, spec.head_dim, BLOCK_SIZE)
    values, _ = empty(1, blocks, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    return KVPool(keys=keys, values=values, block_size=BLOCK_SIZE)
