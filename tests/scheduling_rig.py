"""A scheduler without devices: a model made of hashes per rank that reads its past through block tables, and checks.

The fake model's keys and values are chained hashes kept in a paged pool, so any slip of bookkeeping (a lost block,
stale or uncomputed content, a wrong position, row or history) changes the tokens. `expected` states what must come out,
without scheduler, pool or plan.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zerokl.kernels.ops import SampleResult, StepInputs
from zerokl.rollout.kv_cache import KVCacheManager
from zerokl.rollout.request import Request
from zerokl.rollout.results import Origin, cells_of, make_rows
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.scheduler_config import Role, SchedulerConfig
from zerokl.rollout.step_inputs import build_step_orders
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.step_plan import Hold, PlanEntry, StepPlan

VOCAB = 50
MASK = (1 << 64) - 1


def mix(*words: int) -> int:
    """A 64-bit hash of integers (the finaliser of SplitMix64, applied in a chain)."""
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = (state ^ (word & MASK)) * 0xBF58476D1CE4E5B9 & MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
        state ^= state >> 31
    return state


def draw(past: int, banned: Iterable[int], seed: int, sample_index: int, position: int) -> int:
    """The next token after a past, never a banned one."""
    token = mix(past, seed, sample_index, position) % VOCAB
    barred = set(banned)
    while token in barred:
        token = (token + 1) % VOCAB
    return token


def figure(past: int, token: int) -> np.float32:
    """The "logprob" of a token after a past."""
    return np.float32(-(mix(past, token, 7) % 10**6) / 1e5)


def record(request: Request, result: SampleResult, first_row: int, num_rows: int, origin: Origin) -> None:
    """Give a request rows first_row .. first_row + num_rows of a step's result."""
    rows = make_rows(result, origin)
    if request.kind == "generate":
        assert num_rows == 1
        request.take_token(int(result.tokens[first_row]), cells_of(rows)[first_row])
    else:
        request.take_rows(rows[first_row : first_row + num_rows])


def history_hash(tokens: Sequence[int], counts: Sequence[int]) -> int:
    """Free of order, as penalties are."""
    return sum(mix(token, count, 3) for token, count in zip(tokens, counts, strict=True)) & MASK


class FakeModel:
    """Runs one rank's `StepInputs`; `weights` maps weight set names to an integer that stands for their values."""

    def __init__(self, num_blocks: int, block_size: int, weights: dict[str, int]) -> None:
        self.weights = weights
        self.pool = [[mix(block, offset, 11) for offset in range(block_size)] for block in range(num_blocks)]
        self.block_size = block_size
        self.num_computed = 0

    def execute(self, inputs: StepInputs) -> SampleResult:
        """Write every token's entry, then read whole pasts for the rows wanted."""
        slots = [slot for slot in inputs.slot_mapping.tolist() if slot >= 0]
        assert len(set(slots)) == len(slots), "two tokens of a step share a slot"
        pasts: dict[int, int] = {}
        wanted = set(inputs.logit_rows.tolist())
        for index, table in enumerate(inputs.block_tables.tolist()):
            begin, end = inputs.seq_starts[index : index + 2].tolist()
            assert end > begin and inputs.positions[end - 1] + 1 == inputs.context_lens[index]
            pasts |= self._run_sequence(inputs, table, range(begin, end), wanted)
        self.num_computed += len(inputs.token_ids)
        batch = inputs.sampling
        tokens, figures = [], []
        for row, index in enumerate(inputs.logit_rows.tolist()):
            past = mix(pasts[index], self._history(inputs, row))
            token = int(batch.forced[row])
            if token < 0:
                span = slice(batch.bias_start[row], batch.bias_start[row + 1])
                banned = batch.bias_token[span][np.isneginf(batch.bias_value[span])].tolist()
                key = (int(batch.seed[row]), int(batch.sample_index[row]), int(batch.position[row]))
                token = draw(past, banned, *key)
            tokens.append(token)
            figures.append(figure(past, token))
        values = np.array(figures, np.float32)
        raw = values * 4 if batch.want_raw else None
        return SampleResult(
            tokens=np.array(tokens, np.int32),
            logprobs=values,
            policy_logprobs=values * 2,
            entropy=values * 3,
            raw_logprobs=raw,
        )

    def _run_sequence(self, inputs: StepInputs, table: list[int], span: range, wanted: set[int]) -> dict[int, int]:
        """Entries chain through the pool, as hidden states of later layers do; a past sums over all it attends to."""
        pasts = {}
        weights = self.weights[inputs.policy]
        for index in span:
            position = int(inputs.positions[index])
            before = self._read(table, position - 1) if position else 0
            entry = mix(before, int(inputs.token_ids[index]), position, weights)
            block, offset = divmod(int(inputs.slot_mapping[index]), self.block_size)
            if block >= 0:
                self.pool[block][offset] = entry
            else:
                assert self._read(table, position) == entry, "a token that is not written is not there"
        for index in wanted.intersection(span):
            position = int(inputs.positions[index])
            pasts[index] = sum(self._read(table, past) for past in range(position + 1)) & MASK
        return pasts

    def _read(self, table: list[int], position: int) -> int:
        return self.pool[table[position // self.block_size]][position % self.block_size]

    def _history(self, inputs: StepInputs, row: int) -> int:
        batch = inputs.sampling
        span = slice(batch.history_start[row], batch.history_start[row + 1])
        return history_hash(batch.history_token[span].tolist(), batch.history_count[span].tolist())


def expected(request: Request, weights: int) -> tuple[list[int], list[np.float32]]:
    """Output tokens and figures of a request run to its end, from its tokens, parameters and weights alone."""
    params, start = request.sampling_params, request.num_prompt_tokens
    known = request.token_ids.tolist() if request.kind == "score" else request.prompt_token_ids.tolist()
    tokens, outputs, figures = known[:start], [], []
    stops = request.sampling.stop_ids
    chain, past = 0, 0
    for position in range(start + (len(known) - start or params.max_tokens)):
        if position >= start:
            full_past = mix(past & MASK, _expected_history(params, tokens[:start], outputs))
            biased = {token for token, value in (params.logit_bias or {}).items() if value == -np.inf}
            banned = biased | (stops if len(outputs) < params.min_tokens else set())
            forced = position < len(known)
            token = known[position] if forced else draw(full_past, banned, request.seed, request.sample_index, position)
            tokens.append(token)
            outputs.append(token)
            figures.append(figure(full_past, token))
            if not forced and token in stops:
                break
        chain = mix(chain, tokens[position], position, weights)
        past += chain
    return outputs, figures


def _expected_history(params: SamplingParams, prompt: list[int], outputs: list[int]) -> int:
    if not params.uses_penalties:
        return 0
    distinct = sorted(set(prompt) | set(outputs))
    return history_hash(distinct, [outputs.count(token) for token in distinct])


@dataclass
class Rig:
    """A scheduler, and KV cache and fake model of each rank, run step by step with every invariant checked."""

    num_blocks: int = 64
    block_size: int = 8
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 64
    enable_prefix_caching: bool = True
    look_ahead: int = 8
    max_overtakes: int = 32
    reserved_output_blocks: int = 0
    num_ranks: int = 1
    batched_token_timeout: float = 0.0
    max_group_imbalance: float = 0.25
    roles: tuple[Role, ...] | None = None
    weights: dict[str, int] = field(default_factory=lambda: {"policy": 1})
    manager: Callable[[int, int, bool], KVCacheManager] = KVCacheManager
    moves_blocks: bool = True
    """Off: handed over blocks are not copied, a planted fault."""
    check: bool = True
    """Off for broken managers, whose output is to show the fault."""

    def __post_init__(self) -> None:
        self.kv_caches = [
            self.manager(self.num_blocks, self.block_size, self.enable_prefix_caching) for _ in range(self.num_ranks)
        ]
        self.config = SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            look_ahead=self.look_ahead,
            max_overtakes=self.max_overtakes,
            reserved_output_blocks=self.reserved_output_blocks,
            batched_token_timeout=self.batched_token_timeout,
            max_group_imbalance=self.max_group_imbalance,
            roles=self.roles,
        )
        self.scheduler = Scheduler(self.config, self.kv_caches, clock=lambda: self.now)
        self.models = [FakeModel(self.num_blocks, self.block_size, self.weights) for _ in range(self.num_ranks)]
        for epoch, name in enumerate(self.weights, 1):
            self.scheduler.set_weights(name, epoch=epoch, version=10 * epoch)
        self.now = 0.0
        self.finished: dict[str, Request] = {}
        self.plans: list[StepPlan] = []
        self.holds: list[Hold] = []

    @property
    def kv_cache(self) -> KVCacheManager:
        """The first rank's."""
        return self.kv_caches[0]

    @property
    def num_computed(self) -> int:
        """Tokens that all models have run."""
        return sum(model.num_computed for model in self.models)

    def add(self, *requests: Request) -> None:
        """Requests that arrive now."""
        for request in requests:
            self.scheduler.add(request, self.now)

    def plan(self) -> StepPlan | Hold | None:
        """What the scheduler plans now."""
        return self.scheduler.plan(self.now)

    def next_plan(self) -> StepPlan | None:
        """The next plan with something to compute; the clock moves on where new requests are held."""
        plan = self.plan()
        if isinstance(plan, Hold):
            assert self.num_ranks > 1 and plan.until > self.now, plan
            self.holds.append(plan)
            self.now = plan.until
            plan = self.plan()
        assert not isinstance(plan, Hold), "held beyond the deadline"
        return plan

    def step(self) -> StepPlan | None:
        """Plan, run and apply one step."""
        plan = self.next_plan()
        if plan is None:
            assert not self.scheduler.requests and self.scheduler.num_waiting == 0 == self.scheduler.num_running
            return None
        self.plans.append(plan)
        if self.check:
            self.check_plan(plan)
        for request in self.scheduler.update(plan, self.execute(self.orders(plan))):
            self.keep(request)
        if self.check:
            self.scheduler.check_integrity()
        return plan

    def orders(self, plan: StepPlan) -> list[StepOrder]:
        """What the plan tells each rank."""
        return build_step_orders(plan, self.scheduler.requests, self.block_size)

    def execute(self, orders: Sequence[StepOrder]) -> list[StepResult]:
        """Copy the blocks that are handed over, then run each rank's part."""
        sent: dict[tuple[int, int], list[list[int]]] = {}
        for rank, order in enumerate(orders):
            for move in order.sends:
                sent[rank, move.peer] = [self.models[rank].pool[block].copy() for block in move.blocks.tolist()]
        assert all(order.has_moves == bool(sent) for order in orders)
        for rank, order in enumerate(orders):
            for move in order.receives:
                entries = sent.pop((move.peer, rank))
                assert len(entries) == len(move.blocks)
                for block, content in zip(move.blocks.tolist(), entries, strict=True):
                    if self.moves_blocks:
                        self.models[rank].pool[block] = content
        assert not sent, "blocks are sent to nobody"
        return [
            StepResult(sampled=model.execute(order.inputs)) for model, order in zip(self.models, orders, strict=True)
        ]

    def keep(self, request: Request) -> None:
        """Take a finished request over; each may finish once."""
        assert request.request_id not in self.finished and request.is_finished and request.num_blocks == 0
        self.finished[request.request_id] = request

    def run(self, requests: Iterable[Request] = (), max_steps: int = 20_000) -> dict[str, Request]:
        """Add requests and step until all are finished."""
        self.add(*requests)
        for _ in range(max_steps):
            if self.step() is None:
                return self.finished
        raise AssertionError(f"{self.scheduler.num_unfinished} requests are unfinished after {max_steps} steps")

    def check_plan(self, plan: StepPlan) -> None:
        """Hard caps and the shape of a plan."""
        self.scheduler.check_integrity()
        ids = [entry.request_id for entry in entries(plan)]
        assert len(set(ids)) == len(ids) > 0
        assert not set(plan.preempted) & set(ids)
        assert [rank.rank for rank in plan.ranks] == list(range(self.num_ranks))
        requests = self.scheduler.requests
        for rank in plan.ranks:
            assert rank.is_dummy == (not rank.entries)
            assert sum(entry.num_tokens for entry in rank.entries) == rank.num_tokens <= self.max_num_batched_tokens
            assert sum(entry.num_rows for entry in rank.entries) == rank.num_rows
            assert sum(request.rank == rank.rank for request in requests.values()) <= self.max_num_seqs
            for entry in rank.entries:
                request = requests[entry.request_id]
                assert request.policy == plan.policy and request.rank == rank.rank
                assert entry.start == request.num_computed_tokens and entry.num_tokens >= max(entry.num_rows, 1)
                assert entry.start + entry.num_tokens <= request.num_blocks * self.block_size
        self.check_roles(plan)

    def check_roles(self, plan: StepPlan) -> None:
        """A decode rank computes nothing but single tokens that it, or a prefill rank before it, has sampled."""
        for handover in plan.handovers:
            assert len(handover.source_blocks) == len(handover.target_blocks)
            assert self.roles is not None and self.roles[handover.source] == "prefill" != self.roles[handover.target]
            assert self.scheduler.requests[handover.request_id].rank == handover.target
        for rank, role in zip(plan.ranks, self.roles or (), strict=False):
            for entry in rank.entries if role == "decode" else ():
                request = self.scheduler.requests[entry.request_id]
                assert request.kind == "generate" and entry.num_tokens == 1 and entry.start >= request.num_prompt_tokens


def assert_as_expected(requests: Iterable[Request], weights: dict[str, int]) -> None:
    """Finished requests hold exactly what `expected` says; an aborted one a prefix of it."""
    for request in requests:
        tokens, figures = expected(request, weights[request.policy])
        size = request.num_output_tokens
        assert request.finish_reason == "abort" or size == len(tokens), request.request_id
        assert request.output_token_ids.tolist() == tokens[:size], request.request_id
        assert request.logprobs.tolist() == [float(value) for value in figures[:size]], request.request_id


def generate(request_id: str, length: int, max_tokens: int = 4, **options: Any) -> Request:
    """A generate request with a random prompt, the same for a group."""
    tokens = np.random.default_rng(sum(map(ord, options.get("group_id") or request_id))).integers(0, VOCAB, length)
    params = options.pop("params", SamplingParams(max_tokens=max_tokens))
    return Request.generate(request_id, tokens, params, seed=options.pop("seed", 1), **options)


def entries(plan: StepPlan) -> list[PlanEntry]:
    """Those of all ranks."""
    return [entry for rank in plan.ranks for entry in rank.entries]


def table(plan: StepPlan | None) -> list[tuple[str, int, int, int]]:
    """(request id, start, tokens, rows) of each entry of all ranks."""
    assert plan is not None
    return [(entry.request_id, entry.start, entry.num_tokens, entry.num_rows) for entry in entries(plan)]


def placement(plan: StepPlan | None) -> list[list[str]]:
    """Request ids by rank."""
    assert plan is not None
    return [[entry.request_id for entry in rank.entries] for rank in plan.ranks]


def bits(value: Any, seen: dict[int, int] | None = None) -> Any:
    """Everything that an object holds, order included, as plain values that compare."""
    seen = {} if seen is None else seen
    if value is None or isinstance(value, (bool, int, float, str, bytes, enum.Enum)) or callable(value):
        return value
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if id(value) in seen:
        return "seen", seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, dict):
        return type(value).__name__, [(bits(key, seen), bits(item, seen)) for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [bits(item, seen) for item in value]
    names = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    names += list(getattr(value, "__dict__", ()))
    return type(value).__name__, [(name, bits(getattr(value, name), seen)) for name in names if hasattr(value, name)]


def refusals(rig: Rig) -> dict[str, int]:
    """How often each reason was given so far."""
    metrics = rig.scheduler.metrics()
    return {name.removeprefix("refused_"): n for name, n in metrics.items() if name.startswith("refused_") and n}
