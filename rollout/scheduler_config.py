"""Options of the scheduler: immutable, checked when made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from zerokl.rollout.validation import check_float, check_int

Role = Literal["mixed", "prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Budgets of each rank and constants of fairness. A bad value raises ValueError naming field, value and bound."""

    max_num_seqs: int
    """Requests that run on a rank at the same time at most."""
    max_num_batched_tokens: int
    """Tokens per step and rank at most, a hard cap."""
    look_ahead: int = 8
    """Waiting requests that lack blocks and may be passed over in one step, to try those behind them."""
    max_overtakes: int = 32
    """Younger requests that may join before one that lacks blocks, over all ranks; after that it comes next."""
    reserved_output_blocks: int = 0
    """KV blocks kept free for the output of each request on a rank when another one joins, as far as it can still
    grow; one for each that runs at least."""
    batched_token_timeout: float = 0.0
    """Seconds that new requests may be held to fill and balance a prefill over several ranks; 0: never."""
    max_group_imbalance: float = 0.25
    """Part of a rank's KV pool by which its expected tokens may exceed those of the least loaded rank with room, for
    samples to stay with the leader of their group; beyond it they move and compute the prompt there."""
    roles: tuple[Role, ...] | None = None
    """One per rank: "prefill" ranks hand requests over to decode-capable ones ("decode", "mixed") once their prompt is
    computed, "decode" ranks take no new ones. None: all "mixed"."""

    def __post_init__(self) -> None:
        check_int("max_num_seqs", self.max_num_seqs, 1)
        check_int("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        check_int("look_ahead", self.look_ahead, 0)
        check_int("max_overtakes", self.max_overtakes, 1)
        check_int("reserved_output_blocks", self.reserved_output_blocks, 0)
        check_float("batched_token_timeout", self.batched_token_timeout, "seconds >= 0", 0.0)
        check_float("max_group_imbalance", self.max_group_imbalance, "a part >= 0", 0.0)
        if self.roles is not None:
            object.__setattr__(self, "roles", check_roles("roles", self.roles))


def check_roles(name: str, roles: Sequence[Role]) -> tuple[Role, ...]:
    """`roles` as a tuple. Raises ValueError unless some rank can prefill and some rank can decode."""
    known = get_args(Role)
    is_sequence = isinstance(roles, Sequence) and not isinstance(roles, str)
    if not is_sequence or not roles or any(role not in known for role in roles):
        raise ValueError(f"{name} must be a sequence of {known}, one per rank, got {roles!r}")
    for missing in ("prefill", "decode"):
        if not set(roles) & {"mixed", missing}:
            raise ValueError(f"{name} must have a rank that can {missing} ('mixed' or {missing!r}), got {roles!r}")
    return tuple(roles)
