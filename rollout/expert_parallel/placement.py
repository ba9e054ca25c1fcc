"""Which rank holds which expert of each mixture: the first placement, one by load, and the way from one to the other.

Letters: M mixtures, X experts of each, E ranks of an expert group, S slots of a rank. Where E * S is above X some
experts have replicas. Which of them computes a row changes no bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.experts import ExpertMap, SpreadWeights

Ints = NDArray[np.int32]


class ExpertMove(NamedTuple):
    """One expert's weights go from a slot of the old placement to a slot of the new one."""

    mixture: int
    expert: int
    source_rank: int
    source_slot: int
    target_rank: int
    target_slot: int


@dataclass(frozen=True)
class ExpertPlacement:
    """The expert in each slot."""

    experts: Ints
    """[M, E, S]"""
    num_experts: int
    """X"""

    @classmethod
    def initial(cls, num_mixtures: int, num_experts: int, num_ranks: int, num_redundant: int = 0) -> ExpertPlacement:
        """Contiguous shards: rank r holds experts from r * X // E on, as many as it has slots, round the end.

        Without redundant slots these are equal shards; with them a rank's last slots hold what follows its shard.
        Raises ValueError unless X + `num_redundant` divides into E equal parts.
        """
        total = num_experts + num_redundant
        if num_redundant < 0 or total % num_ranks:
            raise ValueError(
                f"expert_parallel_size must divide num_experts + num_redundant_experts, {num_experts} + "
                f"{num_redundant}, got {num_ranks}"
            )
        first = np.arange(num_ranks) * num_experts // num_ranks
        shards = (first[:, None] + np.arange(total // num_ranks)) % num_experts
        return cls(np.repeat(shards[None].astype(np.int32), num_mixtures, axis=0), num_experts)

    def like(self, experts: Any) -> ExpertPlacement:
        """Another placement of the same experts in as many slots. Raises ValueError for anything else."""
        array = np.ascontiguousarray(experts, np.int32)
        if array.shape != self.experts.shape:
            raise ValueError(f"placement must be of shape {list(self.experts.shape)}, got {list(array.shape)}")
        for mixture, slots in enumerate(array):
            if sorted(set(slots.reshape(-1).tolist())) != list(range(self.num_experts)):
                raise ValueError(
                    f"placement[{mixture}] must hold every expert of [0, {self.num_experts}) and no other, "
                    f"got {slots.tolist()}"
                )
        return ExpertPlacement(array, self.num_experts)

    @property
    def num_ranks(self) -> int:
        """E"""
        return int(self.experts.shape[1])

    def held(self, mixture: int, rank: int) -> list[int]:
        """The experts of a rank, by slot."""
        held: list[int] = self.experts[mixture, rank].tolist()
        return held

    def expert_map(self, mixture: int, source: int) -> ExpertMap:
        """Where the tokens of rank `source` go: to a replica at home, else to number (source + expert) of them all."""
        rank, slot = (np.empty(self.num_experts, np.int32) for _ in range(2))
        for expert, places in enumerate(self._places[mixture]):
            at_home = [place for place in places if place[0] == source]
            rank[expert], slot[expert] = at_home[0] if at_home else places[(source + expert) % len(places)]
        return ExpertMap(rank, slot)

    def rank_loads(self, load: NDArray[Any]) -> NDArray[np.float64]:
        """[M, E]: the tokens of each rank under a load [M, X], an expert's shared out evenly to its replicas."""
        mixtures = np.arange(len(self.experts))[:, None, None]
        counts = np.array([[len(places) for places in mixture] for mixture in self._places])
        share = np.asarray(load, np.float64) / counts
        loads: NDArray[np.float64] = share[mixtures, self.experts].sum(axis=2)
        return loads

    def rebalanced(self, load: NDArray[Any]) -> ExpertPlacement:
        """A placement for a load [M, X] (tokens, at least 0) that evens the ranks out (EPLB).

        Redundant slots go one by one to the expert whose replicas have the most each. Replicas are then dealt to the
        ranks in rounds of E, heaviest first, the heaviest of a round to the rank that has least, of those without that
        expert: no rank has more than the mean and one replica's load. A mixture whose fullest rank would not have less
        stays as it is, and in the others experts stay where they can. Deterministic.
        """
        if np.shape(load) != (len(self.experts), self.num_experts) or np.any(np.asarray(load) < 0):
            raise ValueError(f"load must be [{len(self.experts)}, {self.num_experts}], at least 0; got {load!r}")
        new = [self._dealt(mixture, np.asarray(tokens, np.float64)) for mixture, tokens in enumerate(load)]
        placement = self.like(np.array(new, np.int32).reshape(self.experts.shape))
        better = placement.rank_loads(load).max(axis=1) < self.rank_loads(load).max(axis=1)
        return self.like(np.where(better[:, None, None], placement.experts, self.experts))

    @cached_property
    def _places(self) -> list[list[list[tuple[int, int]]]]:
        """By mixture and expert: its places (rank, slot), ascending."""
        places: list[list[list[tuple[int, int]]]] = [[[] for _ in range(self.num_experts)] for _ in self.experts]
        for (mixture, rank, slot), expert in np.ndenumerate(self.experts):
            places[mixture][expert].append((rank, slot))
        return places

    def _dealt(self, mixture: int, tokens: NDArray[np.float64]) -> list[list[int]]:
        _, ranks, slots = self.experts.shape
        counts = np.ones(self.num_experts, np.int64)
        for _ in range(ranks * slots - self.num_experts):
            # A replica more than there are ranks would not take load off any.
            counts[np.argmax(np.where(counts < ranks, tokens / counts, -1.0 / counts))] += 1
        replicas = np.repeat(np.arange(self.num_experts), counts)
        share = (tokens / counts)[replicas]
        order = np.argsort(-share, kind="stable")
        bins: list[list[int]] = [[] for _ in range(ranks)]
        loads = np.zeros(ranks)
        for start in range(0, len(order), ranks):
            free = np.argsort(loads, kind="stable").tolist()
            for expert in replicas[order[start : start + ranks]].tolist():
                # What is left of an expert from the round before comes first here: there is a rank without it.
                which = next((rank for rank in free if expert not in bins[rank]), free[0])
                free.remove(which)
                bins[which].append(expert)
            loads = np.array([sum(tokens[expert] / counts[expert] for expert in some) for some in bins])
        return self._kept_in_place(mixture, bins)

    def _kept_in_place(self, mixture: int, bins: list[list[int]]) -> list[list[int]]:
        """Each bin on a rank of its own, those first that share most with a rank's experts; these keep their slots."""
        old = self.experts[mixture].tolist()
        pairs = [(rank, which) for rank in range(len(old)) for which in range(len(bins))]
        chosen: dict[int, int] = {}
        for rank, which in sorted(pairs, key=lambda pair: -_num_common(old[pair[0]], bins[pair[1]])):
            if rank not in chosen and which not in chosen.values():
                chosen[rank] = which
        return [_in_old_slots(old[rank], bins[chosen[rank]]) for rank in range(len(old))]


def moves(old: ExpertPlacement, new: ExpertPlacement) -> list[list[ExpertMove]]:
    """By mixture, what each slot that changes its expert receives, and from where: from its own rank if it can,
    else from number (target rank) of the old replicas, so that copies come from different ranks."""
    result: list[list[ExpertMove]] = []
    for mixture, slots in enumerate(new.experts):
        changed = []
        for rank, slot in np.argwhere(slots != old.experts[mixture]).tolist():
            expert = int(slots[rank, slot])
            places = old._places[mixture][expert]
            at_home = [place for place in places if place[0] == rank]
            source = at_home[0] if at_home else places[rank % len(places)]
            changed.append(ExpertMove(mixture, expert, *source, rank, slot))
        result.append(changed)
    return result


@dataclass(frozen=True, slots=True)
class RankExperts:
    """One rank's share of a placement: `zerokl.rollout.models.decoder_params.ExpertShare`."""

    placement: ExpertPlacement
    rank: int

    def held(self, mixture: int, num_experts: int) -> Sequence[int]:
        """See `ExpertShare.held`."""
        return self.placement.held(mixture, self.rank)

    def weights(self, mixture: int, packed: Any) -> SpreadWeights:
        """See `ExpertShare.weights`."""
        held = self.placement.held(mixture, self.rank)
        distinct = list(dict.fromkeys(held))
        packed = packed.in_slots([distinct.index(expert) for expert in held])
        return SpreadWeights(packed, self.placement.expert_map(mixture, self.rank))

    def packed(self, weights: SpreadWeights) -> Any:
        """See `ExpertShare.packed`."""
        return weights.packed


def _num_common(old: list[int], new: list[int]) -> int:
    return (Counter(old) & Counter(new)).total()


def _in_old_slots(old: list[int], new: list[int]) -> list[int]:
    """`new` in an order that leaves common experts where they are in `old`."""
    left = list(new)
    placed = [left.pop(left.index(expert)) if expert in left else None for expert in old]
    return [left.pop(0) if expert is None else expert for expert in placed]
