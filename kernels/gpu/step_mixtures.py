"""Mixtures of experts of a step: the routers' choice, its record, and the experts' products."""

from __future__ import annotations

from zerokl.kernels.experts import MoeParams, RouterSpec, Routing
from zerokl.kernels.gpu import experts as mixtures
from zerokl.kernels.gpu.current_step import CurrentStep
from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.packed import Dtype, PackedExperts
from zerokl.kernels.gpu.routing_record import FetchedRouting, RoutingRecord
from zerokl.kernels.gpu.transfers import Downloads


class StepMixtures:
    """The mixtures of the step that is under way, and what their routers chose if that is kept."""

    def __init__(self, step: CurrentStep, dtype: Dtype, downloads: Downloads) -> None:
        """`dtype`: of the experts' matrices."""
        self._step = step
        self._dtype = dtype
        self._downloads = downloads
        self._record: RoutingRecord | None = None

    def record(self, num_mixtures: int, top_k: int) -> None:
        """Keep what the routers choose until `fetch`, from the next step on."""
        self._record = RoutingRecord(num_mixtures, top_k)

    def restart(self) -> None:
        """After `CurrentStep.restart`, before anything else is taken."""
        if self._record is not None:
            self._record.begin(self._step.layout.num_tokens, self._step.take)

    def fetch(self) -> FetchedRouting:
        """Begin to copy what the routers of the step that was launched last choose to the host."""
        assert self._record is not None, "nothing has been recorded"
        return self._record.fetch(self._downloads, len(self._step.inputs.token_ids))

    def forget(self) -> None:
        """Refer to no step's memory."""
        if self._record is not None:
            self._record.forget()

    def choose(self, logits: Tensor, params: MoeParams[Tensor], spec: RouterSpec) -> Routing[Tensor]:
        """The choice by router logits [T, X] float32, ids [T, k] int32 and weights [T, k] float32 on the device.

        The step's `routing` takes precedence for the rows it gives.
        """
        shape = (logits.shape[0], spec.top_k)
        if self._record is None:
            ids, weights = self._step.take(*shape, dtype="int32"), self._step.take(*shape, dtype="float32")
        else:
            ids, weights = self._record.of(spec.index)
        size = shape[0] * shape[1]
        given = {
            name: self._step.sections[section][spec.index * size : (spec.index + 1) * size]
            for name, section in (("given", "routing"), ("given_weights", "routing_weights"))
            if section in self._step.sections
        }
        mixtures.choose_experts(logits, params.correction, spec, ids, weights, **given)
        return Routing(ids, weights)

    def moe(self, x: Tensor, routing: Routing[Tensor], experts: PackedExperts, shared: Tensor | None) -> Tensor:
        """See `Ops.moe`."""
        take = self._step.take
        (tokens, slots), (count, k, width) = routing.experts.shape, experts.down.shape
        tile = mixtures.expert_tile(tokens * slots, count, self._dtype)
        num_tiles = mixtures.num_tiles(tokens * slots, count, tile.BLOCK_M)
        counts, tile_expert, order = (
            take(size, dtype="int32") for size in (count, num_tiles, num_tiles * tile.BLOCK_M)
        )
        mixtures.sort_slots(routing.experts, count, counts, order, tile_expert, tile)
        inner, outputs = take(tokens * slots, width), take(tokens * slots, k, dtype="float32")
        out = take(tokens, k)
        mixtures.mixture(
            x, experts.gate_up, experts.down, routing.experts, routing.weights, order, tile_expert,
            inner, outputs, shared, out, tile=tile,
        )  # fmt: skip
        return out
