"""Two breaches of the promise, which the gate must find: kernels that are not batch invariant, and a lost KV block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

from ordinary_ops import OrdinaryOps, engines_use

from gate.measure import Variant, run_variant
from gate.policies import GatePolicy
from gate.variants import ONE_RANK
from zerokl.rollout import engine as engine_module
from zerokl.rollout.kv_cache import KVCacheManager
from zerokl.rollout.request import Request

FEW_ROWS = 4


class ForgetfulKVCache(KVCacheManager):
    """Loses extensions: the new block is paid for, but the row's table goes on with the block before, a stale one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._lost: dict[str, list[tuple[int, int]]] = {}

    def grow(self, request: Request) -> None:
        super().grow(request)
        last = request.num_blocks - 1
        self._lost.setdefault(request.request_id, []).append((last, int(request.block_table[last])))
        request.block_table[last] = request.block_table[last - 1]

    def publish(self, request: Request) -> None:
        """Nothing: the prefix cache's own assertions would end the engine before any figure is taken."""

    def release(self, request: Request) -> None:
        for index, block in self._lost.pop(request.request_id, []):
            request.block_table[index] = block
        super().release(request)


@contextmanager
def lost_extensions() -> Iterator[None]:
    """Engines that are made inside have a `ForgetfulKVCache`."""
    with mock.patch.object(engine_module, "KVCacheManager", ForgetfulKVCache):
        yield


@dataclass(frozen=True, kw_only=True)
class Control:
    """A breach, and the variants under which the gate looks for it."""

    name: str
    breach: Callable[[], AbstractContextManager[None]]
    variants: tuple[Variant, ...]


@dataclass(frozen=True, kw_only=True)
class ControlReport:
    """What the gate says of a breach; the figures are the worst among the variants."""

    name: str
    caught: bool
    caught_by: list[str]
    """Variants whose logprobs are not the trainer's."""
    passed_by: list[str]
    """Variants that do not see the breach."""
    k3_kl_max: float
    differing_logprobs: int
    differing_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def _named(*names: str) -> tuple[Variant, ...]:
    return tuple(variant for variant in ONE_RANK if variant.name in names)


_SMALL_BLOCKS = Variant(name="small blocks", options={"block_size": 8})

CONTROLS = [
    Control(
        name="ordinary matrix products",
        breach=lambda: engines_use(lambda num_threads: OrdinaryOps(num_threads=num_threads)),
        variants=_named("plain", "one request at a time", "token budget 16"),
    ),
    Control(
        name=f"other products below {FEW_ROWS} rows",
        breach=lambda: engines_use(lambda num_threads: OrdinaryOps(num_threads=num_threads, below_rows=FEW_ROWS)),
        variants=_named("plain", "one request at a time"),
    ),
    Control(name="a dropped block extension", breach=lost_extensions, variants=(_SMALL_BLOCKS,)),
]


def run_control(policy: GatePolicy, control: Control) -> ControlReport:
    """The gate's own comparison under the breach."""
    with control.breach():
        reports = {variant.name: run_variant(policy, variant) for variant in control.variants}
    caught_by = [name for name, report in reports.items() if report.k3_kl_max > 0 and report.differing_logprobs > 0]
    return ControlReport(
        name=f"{policy.name}: {control.name}",
        caught=bool(caught_by),
        caught_by=caught_by,
        passed_by=[name for name in reports if name not in caught_by],
        k3_kl_max=max(report.k3_kl_max for report in reports.values()),
        differing_logprobs=max(report.differing_logprobs for report in reports.values()),
        differing_tokens=max(report.differing_tokens for report in reports.values()),
    )
