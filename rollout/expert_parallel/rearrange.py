"""Live experts go from rank to rank, a mixture at a time, until each lies where a new placement wants it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.communicator import Communicator, CommunicatorError
from zerokl.kernels.experts import ExpertMap, SpreadWeights
from zerokl.kernels.ops import DecoderParams
from zerokl.rollout.expert_parallel.placement import ExpertMove, ExpertPlacement, moves

Array = NDArray[Any]
Take = Callable[[tuple[int, ...], "np.dtype[Any]"], Array]
"""Gives an uninitialised array for weights."""


class _HasParams(Protocol):
    @property
    def params(self) -> DecoderParams[Any]: ...


Weights = TypeVar("Weights", bound=_HasParams)


def rearrange(
    group: Communicator[Array],
    sets: dict[str, Weights],
    layers: Sequence[int],
    old: ExpertPlacement,
    new: ExpertPlacement,
    take: Take,
) -> None:
    """Replace each of `sets` (frozen dataclasses with `params`) by one that is placed as `new`; the bits are the same.

    Called by every rank of the group with the same names and placements. `layers` are the mixtures'. What several sets
    have in common on every rank is copied once and stays common. More memory than before is needed for one mixture.
    Raises CommunicatorError where the ranks disagree; after an error in the middle the sets are not to be used.
    """
    names = sorted(sets)
    common = _common_parts(group, [sets[name].params for name in names], layers, names, old, new)
    for mixture, (layer, changed) in enumerate(zip(layers, moves(old, new), strict=True)):
        if not changed:
            continue
        where = new.expert_map(mixture, group.rank)
        done: dict[int, SpreadWeights] = {}
        for name, part in zip(names, common[mixture], strict=True):
            params = sets[name].params
            if part not in done:
                done[part] = _moved(group, _experts(params, layer), changed, where, take)
            sets[name] = replace(sets[name], params=_with_experts(params, layer, done[part]))  # type: ignore[type-var]


def _common_parts(
    group: Communicator[Array],
    params: Sequence[DecoderParams[Any]],
    layers: Sequence[int],
    names: Sequence[str],
    old: ExpertPlacement,
    new: ExpertPlacement,
) -> list[list[int]]:
    """By mixture and set: the first set that has the same weights there, on every rank.

    Deltas may have left a mixture common to two sets on one rank and not on another.
    """
    facts = zlib.crc32(b"".join((",".join(names).encode(), old.experts.tobytes(), new.experts.tobytes())))
    held = [[_experts(one, layer).packed for one in params] for layer in layers]
    table = [p is q for mixture in held for p in mixture for q in mixture]
    mine = np.array([[facts, *table]], np.int64)
    everyone = np.concatenate(group.all_gather(mine))
    if (everyone[:, 0] != facts).any():
        raise CommunicatorError("ranks disagree on the sets of weights or the placements of a rearrangement")
    same = everyone[:, 1:].all(axis=0).reshape(len(layers), len(params), len(params))
    return [[int(np.argmax(row)) for row in mixture] for mixture in same]


def _moved(
    group: Communicator[Array], weights: SpreadWeights, changed: Sequence[ExpertMove], where: ExpertMap, take: Take
) -> SpreadWeights:
    """One mixture's experts of this rank, as `changed` leaves them."""
    packed = weights.packed
    arrays = {field: _exchanged(group, getattr(packed, field), changed, take) for field in ("gate_up", "down")}
    return SpreadWeights(replace(packed, **arrays), where)


def _exchanged(group: Communicator[Array], array: Array, changed: Sequence[ExpertMove], take: Take) -> Array:
    """[S, ...] after the exchange of the slots that change."""
    flat = array.reshape(len(array), -1)
    sent: list[list[int]] = [[] for _ in range(group.size)]
    for move in changed:
        if move.source_rank == group.rank:
            sent[move.target_rank].append(move.source_slot)
    arrived = group.all_to_all([flat[slots] for slots in sent])
    result = take(array.shape, array.dtype)
    np.copyto(result, array)
    position = [0] * group.size
    for move in changed:
        if move.target_rank == group.rank:
            row = arrived[move.source_rank][position[move.source_rank]]
            result[move.target_slot] = row.reshape(array.shape[1:])
            position[move.source_rank] += 1
    return result


def _experts(params: DecoderParams[Any], layer: int) -> SpreadWeights:
    mixture = params.layers[layer].moe
    assert mixture is not None, "a mixture without experts"
    experts: SpreadWeights = mixture.experts
    return experts


def _with_experts(params: DecoderParams[Any], layer: int, experts: SpreadWeights) -> DecoderParams[Any]:
    layers = list(params.layers)
    mixture = layers[layer].moe
    assert mixture is not None, "a mixture without experts"
    layers[layer] = replace(layers[layer], moe=replace(mixture, experts=experts))
    return replace(params, layers=tuple(layers))
