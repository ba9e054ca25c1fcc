"""What a `PolicyModel` asks of the device that its parameters are on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import paddle
from numpy.typing import NDArray

from zerokl.kernels.ops import DecoderParams, StepInputs

Tensor = Any  # paddle.Tensor
WeightDtype = Literal["float32", "bfloat16"]


class NoGpuBackwardError(RuntimeError):
    """Gradients were asked for on a GPU, where `PolicyModel` has no backward."""

    def __init__(self) -> None:
        super().__init__(
            "gradients are asked for on a GPU, where PolicyModel has no backward (Paddle 2.6.2, the newest on PyPI for "
            "GPUs, cannot run one on Hopper): call it under paddle.no_grad(), or make it with device='cpu' to train"
        )


def refuse_gradients(tensors: Iterable[Tensor]) -> None:
    """Raise NoGpuBackwardError where a result of these tensors would be differentiated."""
    if paddle.is_grad_enabled() and not all(tensor.stop_gradient for tensor in tensors):
        raise NoGpuBackwardError


class PolicyForward(Protocol):
    """Places parameters on one device, and computes with them there."""

    ops: Any
    """The op table."""

    def parameter(self, layer: Any, values: Any) -> Tensor:
        """A new float32 parameter of a `paddle.nn.Layer` with these values, in no group of it yet."""
        ...

    def array(self, parameter: Tensor) -> NDArray[np.float32]:
        """A parameter's values on the host."""
        ...

    def bind(self, parameters: Mapping[str, Tensor]) -> None:
        """Take the model's parameters, by their Hugging Face names; once."""
        ...

    def params(self) -> DecoderParams[Tensor]:
        """What a forward runs on now: the parameters' present values. Raises NoGpuBackwardError."""
        ...

    def hidden(self, params: DecoderParams[Tensor], step: StepInputs) -> Tensor:
        """Final-normed hidden states [R, E] of the step's `logit_rows`."""
        ...

    def logprobs(
        self, hidden: Tensor, params: DecoderParams[Tensor], targets: NDArray[np.int32], temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Logprobs [R] of targets [R] and entropies [R] of hidden [R, E]. Raises NoGpuBackwardError."""
        ...
