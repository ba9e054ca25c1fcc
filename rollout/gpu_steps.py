"""Steps of one model on one GPU, launched without waiting for any; those that come again as one recorded graph.

A step is of a kind that others are likely to be, too: same buckets of tokens, rows, sequences and tiles of chunks, same
width of block tables, same way to draw. See `RecordedSteps`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.ops import DecoderParams, KVPool, StepInputs, neutral_sampling
from zerokl.rollout.models.decoder import DecoderSpec, forward_begun
from zerokl.rollout.recorded_steps import RecordedSteps

if TYPE_CHECKING:
    from zerokl.kernels.gpu.ops import GpuOps
    from zerokl.kernels.gpu.routing_record import FetchedRouting
    from zerokl.kernels.gpu.step_results import FetchedSample
    from zerokl.rollout.config import EngineConfig
    from zerokl.rollout.models.moe_config import MoeConfig

logger = logging.getLogger(__name__)

MIB = 1 << 20


class FetchedStep(NamedTuple):
    """Results of a step on their way to the host."""

    sample: FetchedSample | None
    """None for a step without rows."""
    routing: FetchedRouting | None
    """None where none is returned."""


class GpuSteps:
    """Runs steps over a `GpuOps`. One thread calls."""

    def __init__(
        self,
        ops: GpuOps,
        spec: DecoderSpec,
        *,
        records: bool,
        max_num_seqs: int,
        max_num_tokens: int,
        max_blocks: int,
        returns_routing: bool = False,
    ) -> None:
        """`records`: whether to make graphs. The rest says which steps can come: sequences and tokens of a step at
        most, and blocks of a sequence. With `returns_routing` the ops record it (`GpuOps.record_routing`).
        """
        self._ops = ops
        self._returns_routing = returns_routing
        self._spec = spec
        self._records = records
        self._max_num_seqs = max_num_seqs
        self._max_num_tokens = max_num_tokens
        self._max_blocks = max_blocks
        self._recorded = RecordedSteps(ops.record)

        self.get: Callable[[Any], NDArray[Any]] = ops.device.get
        """Copies a tensor to the host."""
        self.put: Callable[[NDArray[Any]], Any] = ops.device.put
        """Copies an array to the device."""

    @property
    def num_graphs(self) -> int:
        """Recorded steps that are kept."""
        return self._recorded.num_graphs

    def begin(self, place: int, params: DecoderParams[Any], inputs: StepInputs, pool: KVPool[Any]) -> FetchedStep:
        """Launch a step with the weights in a place; what it gives is on its way to the host."""
        self._ops.begin_step(inputs, pool)
        self._launch(place, params)
        rows = len(inputs.logit_rows)
        return FetchedStep(
            sample=self._ops.fetch(rows, want_raw=inputs.sampling.want_raw) if rows else None,
            routing=self._ops.fetch_routing() if self._returns_routing else None,
        )

    def keep(self, places: Collection[int]) -> None:
        """Forget the graphs of weights in other places, which are gone; slots wait for their next set."""
        self._recorded.forget(set(self._recorded.places) - set(places) - self._ops.slots.numbers)

    def forget(self) -> None:
        """Forget all graphs and the memory of steps: weights or the KV pool go away. No step is under way."""
        self._recorded.clear()
        self._ops.forget_step()

    def warm_up(self, place: int, params: DecoderParams[Any], pool: KVPool[Any]) -> None:
        """Compile the kernels of steps without penalties and truncation, and record those that can be.

        Writes no key or value. Takes minutes where Triton has not compiled the kernels before.
        """
        start = time.perf_counter()
        for inputs in (*self._prefills(), *self._decodes()):
            self._warm(place, params, pool, inputs)
        self._ops.device.synchronize()
        compiled, free = time.perf_counter(), self._ops.device.memory()[0]
        if self._records:
            for inputs in self._decodes():
                self._warm(place, params, pool, inputs)
            self._ops.device.synchronize()
        left, total = self._ops.device.memory()
        logger.info(
            "kernels ready in %.1f s; %d decode graphs recorded in %.2f s, %d MiB; %d of %d MiB of the GPU in use",
            compiled - start, self.num_graphs, time.perf_counter() - compiled, (free - left) // MIB,
            (total - left) // MIB, total // MIB,
        )  # fmt: skip

    def _warm(self, place: int, params: DecoderParams[Any], pool: KVPool[Any], inputs: StepInputs) -> None:
        self._ops.begin_step(inputs, pool)
        self._launch(place, params)

    def _launch(self, place: int, params: DecoderParams[Any]) -> None:
        draws = len(self._ops.inputs.logit_rows) > 0

        def launches() -> None:
            begun = self._ops.inputs  # of the step that the launches are made for, if they are made again
            hidden = forward_begun(self._ops, params, self._spec, begun)
            if draws:
                self._ops.draw(hidden, params.lm_head, begun.sampling)

        kind = self._ops.step_kind() if self._records else None
        if kind is None:
            launches()
        else:
            self._recorded.launch(place, (kind, draws), launches)

    def _decodes(self) -> Iterator[StepInputs]:
        """A step of every bucket of sequences and width of block tables, the largest first."""
        widths = {min(4**power * 8, self._max_blocks) for power in range(16)}
        sizes = {min(size, self._max_num_seqs) for size in (16 << power for power in range(16))}
        for size in sorted(sizes, reverse=True):
            for width in sorted(widths, reverse=True):
                yield _step_of_nothing(np.ones(size, np.int32), width)

    def _prefills(self) -> Iterator[StepInputs]:
        """Steps with chunks of some sizes, each of another tile."""
        most = min(self._max_num_tokens, self._max_blocks * 8, 1024)
        for size in sorted({min(size, most) for size in (32, 64, 128, 256, 1024)}, reverse=True):
            yield _step_of_nothing(np.array([size], np.int32), self._max_blocks)


def _step_of_nothing(lengths: NDArray[np.int32], width: int) -> StepInputs:
    """Sequences of these many tokens from position 0 on, whose keys and values go nowhere."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = int(starts[-1])
    return StepInputs(
        token_ids=np.zeros(tokens, np.int32),
        positions=np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        slot_mapping=np.full(tokens, -1, np.int32),
        seq_starts=starts,
        context_lens=lengths,
        block_tables=np.zeros((len(lengths), width), np.int32),
        logit_rows=starts[1:] - 1,
        sampling=neutral_sampling(len(lengths)),
    )


def make_gpu_steps(config: EngineConfig, ops: Any, spec: DecoderSpec, moe: MoeConfig | None) -> GpuSteps | None:
    """The steps of `config`, which must be resolved, over its device's ops; None where that is no GPU.

    `moe`: the mixtures of its model.
    """
    if config.device != "gpu":
        return None
    assert config.max_model_len is not None, "an unresolved EngineConfig"
    if config.return_routing != "none":
        assert moe is not None, "an unresolved EngineConfig"
        ops.record_routing(len(moe.layers), moe.top_k)
    return GpuSteps(
        ops,
        spec,
        records=config.record_graphs,
        max_num_seqs=config.max_num_seqs,
        max_num_tokens=config.max_num_batched_tokens,
        max_blocks=-(-config.max_model_len // config.block_size),
        returns_routing=config.return_routing != "none",
    )
