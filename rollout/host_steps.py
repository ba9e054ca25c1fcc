"""Steps of one model over arrays of the host, each awaited before the next one begins."""

from __future__ import annotations

from typing import Any

from zerokl.kernels.ops import DecoderParams, KVPool, Ops, SampleResult, StepInputs
from zerokl.rollout.models.decoder import DecoderSpec, forward
from zerokl.rollout.models.moe_config import MoeConfig
from zerokl.rollout.routing_capture import RoutingCapture
from zerokl.rollout.step_order import StepResult
from zerokl.rollout.step_outcome import checked_rows, no_rows


class HostSteps:
    """Runs steps over an op table of NumPy arrays. One thread calls."""

    def __init__(self, ops: Ops[Any], spec: DecoderSpec, moe: MoeConfig | None, *, returns_routing: bool) -> None:
        """`moe`: the mixtures of the model. How busy their experts are is counted in any case."""
        self._ops = ops
        self._spec = spec
        self._returns_routing = returns_routing
        self._capture = None if moe is None else RoutingCapture(ops, moe)
        self._forward_ops = ops if self._capture is None else self._capture.recording_ops

    def run(self, params: DecoderParams[Any], inputs: StepInputs, pool: KVPool[Any]) -> StepResult:
        """The result of a step. Raises NonFiniteLogitsError naming step and rows."""
        hidden = forward(self._forward_ops, params, self._spec, inputs, pool)
        sampled, capture = self._sample(hidden, params, inputs), self._capture
        if capture is None:
            return StepResult(sampled=sampled)
        routed = capture.take() if self._returns_routing else None
        return StepResult(sampled=sampled, expert_tokens=capture.expert_tokens(), routed=routed)

    def _sample(self, hidden: Any, params: DecoderParams[Any], inputs: StepInputs) -> SampleResult:
        if not len(inputs.logit_rows):
            return no_rows(inputs.sampling.want_raw)
        return checked_rows(self._ops.sample(hidden, params.lm_head, inputs.sampling), inputs)
