"""The forward of a `PolicyModel` on the CPU, differentiable: `AutogradOps` over the parameters as they stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray

from zerokl.integrations.policy_forward import WeightDtype
from zerokl.kernels.autograd.arrays import array_of
from zerokl.kernels.autograd.lm_head import DEFAULT_CHUNK_ROWS
from zerokl.kernels.autograd.ops import AutogradOps
from zerokl.kernels.autograd.rounding import round_to_bfloat16
from zerokl.kernels.autograd.scratch_pool import scratch_pool
from zerokl.kernels.ops import DecoderParams, StepInputs
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.decoder import DecoderSpec, forward
from zerokl.rollout.models.decoder_params import build_params
from zerokl.rollout.models.rope import rope_table

Tensor = Any  # paddle.Tensor


class CpuForward:
    """Implements `PolicyForward`."""

    def __init__(self, config: ModelConfig, weight_dtype: WeightDtype, chunk_rows: int | None) -> None:
        self.ops = AutogradOps()
        self._config = config
        self._rounds = weight_dtype == "bfloat16"
        self._chunk_rows = DEFAULT_CHUNK_ROWS if chunk_rows is None else chunk_rows
        self._spec = DecoderSpec.from_config(config)
        self._rope = rope_table(config.rope, config.head_dim, config.max_position_embeddings)

    def parameter(self, layer: Any, values: NDArray[Any]) -> Tensor:
        """See `PolicyForward.parameter`; the values are copied."""
        parameter = layer.create_parameter(
            list(values.shape), dtype="float32", default_initializer=paddle.nn.initializer.Constant(0.0)
        )
        np.copyto(array_of(parameter), values)
        return parameter

    def array(self, parameter: Tensor) -> NDArray[np.float32]:
        """The parameter's own memory."""
        return array_of(parameter)

    def bind(self, parameters: Mapping[str, Tensor]) -> None:
        """See `PolicyForward.bind`."""
        self._parameters = parameters
        self._params = self._build(parameters)

    def params(self) -> DecoderParams[Tensor]:
        """The parameters themselves, or rounded, differentiable."""
        if not self._rounds:
            return self._params
        return self._build({name: round_to_bfloat16(parameter) for name, parameter in self._parameters.items()})

    def hidden(self, params: DecoderParams[Tensor], step: StepInputs) -> Tensor:
        """See `PolicyForward.hidden`."""
        return forward(self.ops, params, self._spec, step, scratch_pool(step, self._spec.attention))

    def logprobs(
        self, hidden: Tensor, params: DecoderParams[Tensor], targets: NDArray[np.int32], temperature: float
    ) -> tuple[Tensor, Tensor]:
        """See `PolicyForward.logprobs`."""
        return self.ops.logprobs(hidden, params.lm_head, targets, temperature, self._chunk_rows)

    def _build(self, operands: Mapping[str, Tensor]) -> DecoderParams[Tensor]:
        return build_params(self.ops, self._config, operands, self._rope)
