"""The forward of a `PolicyModel` on a GPU, without gradients: the kernels, types and orders of an engine's there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray

from zerokl.integrations.policy_forward import WeightDtype, refuse_gradients
from zerokl.kernels.gpu.driver import current_gpu
from zerokl.kernels.gpu.packed import Dtype
from zerokl.kernels.gpu.packed_ops import DEFAULT_CHUNK_ROWS, PackedGpuOps
from zerokl.kernels.gpu.parameter_packing import ParameterPacker
from zerokl.kernels.ops import DecoderParams, StepInputs
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.decoder import DecoderSpec, forward
from zerokl.rollout.models.decoder_params import build_params
from zerokl.rollout.models.rope import rope_table

Tensor = Any  # paddle.Tensor


class GpuForward:
    """Implements `PolicyForward`. Parameters are float32 tensors on the GPU; each forward packs their present values.

    Between calls it keeps no memory but the parameters and the table of angles. It launches on the stream of all op
    tables of the process on that GPU: not while an engine of the process runs steps there.
    """

    def __init__(
        self, config: ModelConfig, weight_dtype: WeightDtype, chunk_rows: int | None, dtype: Dtype, gpu: int | None
    ) -> None:
        """`gpu` is its number; None: Paddle's current one. Raises RuntimeError where it cannot be used."""
        self.ops = PackedGpuOps(dtype=dtype, number=current_gpu() if gpu is None else gpu)
        self._config = config
        self._device = self.ops.device
        self._packer = ParameterPacker(self._device, dtype, rounds=weight_dtype == "bfloat16")
        self._chunk_rows = DEFAULT_CHUNK_ROWS if chunk_rows is None else chunk_rows
        self._spec = DecoderSpec.from_config(config)
        self._rope = self.ops.tensor(rope_table(config.rope, config.head_dim, config.max_position_embeddings))

    def parameter(self, layer: Any, values: Any) -> Tensor:
        """See `PolicyForward.parameter`. An array is copied; a tensor on the GPU becomes the parameter's memory."""
        tensor = values if isinstance(values, paddle.Tensor) else self._device.put(np.asarray(values, np.float32))
        if tensor.dtype != paddle.float32 or not tensor.place.is_gpu_place() or not tensor.is_contiguous():
            raise ValueError(f"tensors must be contiguous float32 on the GPU, got {tensor.dtype} on {tensor.place}")
        return layer.create_parameter(list(tensor.shape), dtype="float32", default_initializer=_MemoryOf(tensor))

    def array(self, parameter: Tensor) -> NDArray[np.float32]:
        """A copy."""
        self._device.await_owner()
        return self._device.get(parameter)

    def bind(self, parameters: Mapping[str, Tensor]) -> None:
        """See `PolicyForward.bind`."""
        self._parameters = parameters

    def params(self) -> DecoderParams[Tensor]:
        """See `PolicyForward.params`."""
        refuse_gradients(self._parameters.values())
        self._device.await_owner()
        return build_params(self._packer, self._config, self._parameters, self._rope, keep=self._packer.tensor)

    def hidden(self, params: DecoderParams[Tensor], step: StepInputs) -> Tensor:
        """See `PolicyForward.hidden`; in the type of the op table."""
        pool = self.ops.scratch_pool(step, self._spec.attention)
        try:
            return forward(self.ops, params, self._spec, step, pool)
        finally:
            self.ops.forget_step()

    def logprobs(
        self, hidden: Tensor, params: DecoderParams[Tensor], targets: NDArray[np.int32], temperature: float
    ) -> tuple[Tensor, Tensor]:
        """See `PolicyForward.logprobs`."""
        refuse_gradients([hidden])
        try:
            results = self.ops.logprobs(hidden, params.lm_head, targets, temperature, self._chunk_rows)
        finally:
            self.ops.forget_step()
        logprobs, entropy = (self._device.put(values) for values in results)
        return logprobs, entropy


class _MemoryOf(paddle.nn.initializer.Initializer):  # type: ignore[misc]  # Paddle has no complete stubs
    """Gives a parameter the memory of a tensor, so that no operator of Paddle has to fill it."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def forward(self, var: Tensor, block: Any = None) -> None:
        var.get_tensor()._share_data_with(self._tensor.get_tensor())
