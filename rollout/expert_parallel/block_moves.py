"""KV blocks that go from rank to rank before a step's forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.communicator import Communicator, CommunicatorError
from zerokl.kernels.ops import KVPool
from zerokl.rollout.step_order import BlockMove

Floats = NDArray[np.float32]


def move_blocks(
    world: Communicator[NDArray[Any]], pool: KVPool[Floats], sends: Sequence[BlockMove], receives: Sequence[BlockMove]
) -> None:
    """Copy the blocks' keys and values of all layers, bit for bit, by one exchange in which every rank takes part.

    Raises CommunicatorError when a peer sends another number of blocks than `receives` says; nothing is written then.
    """
    layers, _, *_ = pool.keys.shape
    width = 2 * layers * int(np.prod(pool.keys.shape[2:]))
    parts = [np.empty((0, width), np.float32) for _ in range(world.size)]
    for move in sends:
        halves = [np.swapaxes(half[:, move.blocks], 0, 1) for half in (pool.keys, pool.values)]
        parts[move.peer] = np.concatenate([half.reshape(len(move.blocks), -1) for half in halves], axis=1)
    arrived = world.all_to_all(parts)
    expected = {move.peer: move.blocks for move in receives}
    for rank, part in enumerate(arrived):
        if len(part) != len(expected.get(rank, ())):
            raise CommunicatorError(
                f"rank {rank} sent {len(part)} KV blocks where {len(expected.get(rank, ()))} were to come"
            )
    for rank, blocks in expected.items():
        for half, rows in zip((pool.keys, pool.values), np.split(arrived[rank], 2, axis=1), strict=True):
            moved = rows.reshape(len(blocks), layers, *half.shape[2:])
            half[:, blocks] = np.swapaxes(moved, 0, 1)
