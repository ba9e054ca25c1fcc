"""What a step came to: its rows, checked; on a GPU, once they are on the host."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from zerokl.kernels.ops import SampleResult, StepInputs
from zerokl.rollout.gpu_steps import FetchedStep
from zerokl.rollout.models.moe_config import MoeConfig
from zerokl.rollout.routing_capture import count_experts
from zerokl.rollout.step_order import RoutedTokens, StepResult


class NonFiniteLogitsError(FloatingPointError):
    """Rows of a step whose logits hold a NaN or an infinity: nothing can be drawn from them."""

    def __init__(self, step: int, policy: str, rows: list[int]) -> None:
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        super().__init__(f"step {step}: logits of weights {policy!r} are not finite in logit rows {shown}")
        self.step = step
        self.policy = policy
        self.rows = rows


class PendingStep(Protocol):
    """A step that runs on a device while the host goes on."""

    def result(self) -> StepResult:
        """Wait for it; asked for once. Raises NonFiniteLogitsError as `ModelRunner.execute`."""
        ...


class PendingGpuStep:
    """A step under way on a GPU."""

    def __init__(self, fetched: FetchedStep, inputs: StepInputs, moe: MoeConfig | None) -> None:
        self._fetched, self._inputs, self._moe = fetched, inputs, moe

    def result(self) -> StepResult:
        """See PendingStep."""
        sample, routing = self._fetched
        sampled = None if sample is None else sample.result()
        ids, weights = (None, None) if routing is None else routing.result()
        sampled = no_rows(self._inputs.sampling.want_raw) if sampled is None else checked_rows(sampled, self._inputs)
        if ids is None or weights is None or self._moe is None:
            return StepResult(sampled=sampled)
        return StepResult(
            sampled=sampled,
            expert_tokens=count_experts(ids, self._moe.num_experts),
            routed=RoutedTokens(experts=ids, weights=weights),
        )


class IdleStep:
    """Of a rank on a GPU that has no tokens in a step: the others have."""

    def __init__(self, inputs: StepInputs, moe: MoeConfig | None) -> None:
        """`moe`: the mixtures whose routing is returned, if any."""
        self._inputs, self._moe = inputs, moe

    def result(self) -> StepResult:
        """See PendingStep."""
        sampled = no_rows(self._inputs.sampling.want_raw)
        if self._moe is None:
            return StepResult(sampled=sampled)
        none = np.zeros((len(self._moe.layers), 0, self._moe.top_k), np.int32)
        return StepResult(
            sampled=sampled,
            expert_tokens=count_experts(none, self._moe.num_experts),
            routed=RoutedTokens(experts=none, weights=none.astype(np.float32)),
        )


def checked_rows(result: SampleResult, inputs: StepInputs) -> SampleResult:
    """The rows, of which there is one at least. Raises NonFiniteLogitsError."""
    if result.tokens.min() < 0:
        raise NonFiniteLogitsError(inputs.step, inputs.policy, np.flatnonzero(result.tokens < 0).tolist())
    return result


def no_rows(want_raw: bool) -> SampleResult:
    """Of a step that draws nothing."""
    none = np.zeros(0, np.float32)
    return SampleResult(
        tokens=np.zeros(0, np.int32),
        logprobs=none,
        policy_logprobs=none,
        entropy=none,
        raw_logprobs=none if want_raw else None,
    )
