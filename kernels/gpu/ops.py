"""The op table on Paddle's GPU tensors, in bfloat16 on tensor cores or in float32, by Triton kernels.

One copy to the device opens a step (`begin_step`: metadata and sampling options together), one copy back closes it
(`fetch`); nothing waits for the host but the reader of its result, so steps may be launched one after the other. Rows
are padded to the step's bucket; what padding rows hold is arbitrary. Which tensor has which type, and the order of
every sum, is said in docs/numerics.md. Paddle serves memory alone: no Paddle operator computes anything here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.experts import MoeParams, RouterSpec, Routing
from zerokl.kernels.gpu import elementwise, matmul, norms, sampling
from zerokl.kernels.gpu import lm_head as heads
from zerokl.kernels.gpu.current_step import CurrentStep
from zerokl.kernels.gpu.device import Device
from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.host_packing import HostPacker
from zerokl.kernels.gpu.packed import Dtype, PackedExperts, PackedGateUp, PackedLinear
from zerokl.kernels.gpu.routing_record import FetchedRouting
from zerokl.kernels.gpu.step_attention import StepAttention
from zerokl.kernels.gpu.step_mixtures import StepMixtures
from zerokl.kernels.gpu.step_results import FetchedSample, StepResults, further_needs
from zerokl.kernels.gpu.transfers import Downloads
from zerokl.kernels.gpu.weight_slots import WeightSlots
from zerokl.kernels.ops import AttentionSpec, KVPool, LayerParams, SampleResult, SamplingBatch, StepInputs


class GpuOps:
    """`zerokl.kernels.ops.Ops[paddle.Tensor]` on one GPU. Weights are given as NumPy arrays of float32 or, as uint16
    patterns, of bfloat16.

    `dtype` is the type of matrices, activations, keys and values; the residual stream and sums are float32 either way.
    An op never writes what an earlier one of the step has returned while that is referred to, and a later step with the
    same shapes has the same addresses. Serves pools of one `AttentionSpec`. One thread runs steps; packing may go on
    in another one meanwhile. A class made of this one may override `_product` and `_settle`, through which all products
    of weights but gate and up's, the experts' and those of general sampling go.
    """

    takes_patterns = True
    """Whether packing takes bfloat16 patterns."""

    spreads_splits = True
    shares_prefixes = True
    """See `StepAttention`, which is made so."""

    def __init__(self, device: Device | None = None, dtype: Dtype = "float32", number: int = 0) -> None:
        """On the GPU of this number unless a device is given. Raises RuntimeError where it cannot be used."""
        self.device = _gpu(number) if device is None else device
        self.dtype = dtype
        self.slots = WeightSlots(self.device.empty)
        """For sets of weights that are copied on the device."""
        self._packer = HostPacker(self.device, dtype)
        self._step = CurrentStep(self.device, dtype)
        self._attention = StepAttention(
            self._step, dtype, spreads_splits=self.spreads_splits, shares_prefixes=self.shares_prefixes
        )
        downloads = Downloads(self.device)
        self._mixtures = StepMixtures(self._step, dtype, downloads)
        self._results = StepResults(self._step, self.device, downloads)

    # -- placement -----------------------------------------------------------------------------------------------------
    def tensor(self, values: NDArray[Any]) -> Tensor:
        """See `HostPacker.tensor`."""
        return self._packer.tensor(values)

    def pack_linear(self, weights: Sequence[Any], biases: Sequence[Any]) -> PackedLinear:
        """See `HostPacker.pack_linear`."""
        return self._packer.pack_linear(weights, biases)

    def pack_gate_up(self, gate: Any, up: Any) -> PackedGateUp:
        """See `Ops.pack_gate_up`."""
        return self._packer.pack_gate_up(gate, up)

    def pack_experts(self, count: int, experts: Iterable[tuple[Any, Any, Any]]) -> PackedExperts:
        """See `Ops.pack_experts`."""
        return self._packer.pack_experts(count, experts)

    def kv_pool(self, num_layers: int, num_blocks: int, block_size: int, spec: AttentionSpec) -> KVPool[Tensor]:
        """An uninitialised pool, keys and values [layers, blocks, KV, B, D]; nothing is read before it was written."""
        self._attention.serve(spec)
        shape = [num_layers, num_blocks, spec.num_kv_heads, block_size, spec.head_dim]
        return KVPool(self.device.empty(shape, self.dtype), self.device.empty(shape, self.dtype), block_size)

    def forget_step(self) -> None:
        """Let go of the pool and of what steps have in memory; recorded steps are not to be launched any more."""
        self.device.synchronize()
        self._mixtures.forget()
        self._step.forget()
        self.device.release_unused()

    # -- a step --------------------------------------------------------------------------------------------------------
    def begin_step(self, inputs: StepInputs, pool: KVPool[Tensor]) -> None:
        """See `Ops.begin_step`. Waits for no step before."""
        self.device.enter()
        self._step.begin(inputs, pool, self._attention.lists(inputs, pool.block_size))
        self._restart()
        self._step.send()

    @property
    def inputs(self) -> StepInputs:
        """Of the step that has begun last."""
        return self._step.inputs

    def _restart(self) -> None:
        self._step.restart()
        self._mixtures.restart()

    def step_kind(self) -> tuple[Any, ...] | None:
        """Equal for steps that launch the same kernels at the same addresses with equal parameters and pool.

        None for a step of so many tokens that its launches are not what is waited for. After `begin_step`.
        """
        place = self._step.place
        return None if place is None else (place, further_needs(self._step.inputs.sampling))

    def record(self, launches: Callable[[], None]) -> Any:
        """A `device.Graph` of the ops that `launches` calls for the step that has begun; it serves its kind."""

        def again() -> None:
            self._restart()
            launches()

        return self.device.record(again)

    # -- ops -----------------------------------------------------------------------------------------------------------
    def embedding(self, token_ids: NDArray[np.int32], table: Tensor) -> Tensor:
        """Rows of the table, widened to the float32 residual: [T] -> [T, E]."""
        step = self._step
        assert token_ids is step.inputs.token_ids
        out = step.take(step.layout.num_tokens, table.shape[1], dtype="float32")
        ids, rows = step.sections["token_ids"], step.sections["token_rows"]
        elementwise.embed(table, ids, rows, self._results.drawn, int(sampling.TOKEN), out)
        return out

    def gather_rows(self, x: Tensor, rows: NDArray[np.int32]) -> Tensor:
        """Some rows of x: [T, E], [R] -> [R, E]."""
        step = self._step
        assert rows is step.inputs.logit_rows
        out = step.take(step.layout.num_rows, x.shape[1])
        elementwise.gather(x, step.sections["rows"], out)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`; x is float32."""
        out = self._step.take(*x.shape)
        norms.rms_norm(x, weight, eps, out)
        return out

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Ops.add_rms_norm`; the float32 sum takes the place of `residual`."""
        out = self._step.take(*residual.shape)
        norms.rms_norm(residual, weight, eps, out, delta=delta)
        return residual, out

    def linear(self, x: Tensor, weight: PackedLinear) -> Tensor:
        """[T, K] -> [T, sum N_i], biases added."""
        return self._product(x, weight, self.dtype)

    qkv_linear = linear

    def _product(self, x: Tensor, weight: PackedLinear, dtype: str) -> Tensor:
        out = self._step.take(x.shape[0], weight.weight.shape[0], dtype=dtype)
        matmul.linear(x, weight.weight, weight.bias, out)
        return out

    def swiglu_linear(self, x: Tensor, weight: PackedGateUp) -> Tensor:
        """See `Ops.swiglu_linear`: [T, E] -> [T, F]."""
        out = self._step.take(x.shape[0], weight.weight.shape[0] // 2)
        matmul.swiglu(x, weight.weight, out)
        return out

    def attention(
        self, qkv: Tensor, layer: int, params: LayerParams[Tensor], rope: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `Ops.attention`."""
        return self._attention.attention(qkv, layer, params, rope, spec)

    # -- mixtures of experts -------------------------------------------------------------------------------------------
    def route(self, x: Tensor, params: MoeParams[Tensor], spec: RouterSpec) -> Routing[Tensor]:
        """See `Ops.route`; ids [T, k] int32 and weights stay on the device."""
        return self._mixtures.choose(self._product(x, params.router, "float32"), params, spec)

    def record_routing(self, num_mixtures: int, top_k: int) -> None:
        """Keep what the routers choose until `fetch_routing`, from the next step on."""
        self._mixtures.record(num_mixtures, top_k)

    def fetch_routing(self) -> FetchedRouting:
        """Begin to copy what the routers of the step that was launched last choose to the host."""
        return self._mixtures.fetch()

    def moe(self, x: Tensor, routing: Routing[Tensor], experts: PackedExperts, shared: Tensor | None) -> Tensor:
        """See `Ops.moe`."""
        return self._mixtures.moe(x, routing, experts, shared)

    # -- sampling ------------------------------------------------------------------------------------------------------
    def sample(self, hidden: Tensor, lm_head: PackedLinear, batch: SamplingBatch) -> SampleResult:
        """See `Ops.sample`; `batch` is the step's. A row whose logits are not all finite gets token -1."""
        self.draw(hidden, lm_head, batch)
        return self.fetch(len(batch.forced), want_raw=batch.want_raw).result()

    def draw(self, hidden: Tensor, lm_head: PackedLinear, batch: SamplingBatch) -> None:
        """`sample` without its result, which `fetch` gets.

        Each option that some row has costs passes over the logits: see `general_sampling`.
        """
        self._results.draw(hidden, lm_head, batch, self._settle)

    def fetch(self, rows: int, *, want_raw: bool) -> FetchedSample:
        """Begin to copy the first rows of what was drawn last to the host."""
        return self._results.fetch(rows, want_raw=want_raw)

    def _settle(self, hidden: Tensor, lm_head: PackedLinear, options: Tensor, out: Tensor) -> None:
        """Results of rows without further needs, see `zerokl.kernels.gpu.step_results.Settle`."""
        take, rows, vocab = self._step.take, hidden.shape[0], lm_head.weight.shape[0]
        chunks = heads.num_chunks(vocab)
        logits, tile_max = (
            take(rows, width, dtype="float32") for width in (vocab, heads.num_tiles(rows, vocab, self.dtype))
        )
        sums = take(rows, chunks, 2, dtype="float32")
        masses = take(rows, chunks, dtype="int64")
        heads.settle(hidden, lm_head.weight, options, logits, tile_max, sums, masses, out)


def _gpu(number: int) -> Device:
    from zerokl.kernels.gpu.paddle_device import PaddleDevice

    return PaddleDevice(number)
