"""The op table for a trainer's forward on a GPU, without gradients: the engine's kernels on packed whole sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.gpu import sampling
from zerokl.kernels.gpu.elementwise import Tensor, gather
from zerokl.kernels.gpu.ops import GpuOps
from zerokl.kernels.gpu.packed import PackedLinear
from zerokl.kernels.gpu.step_arrays import sampling_options
from zerokl.kernels.ops import AttentionSpec, KVPool, LayerParams, StepInputs, check_temperature, neutral_sampling
from zerokl.kernels.packed_step import BLOCK_SIZE, num_blocks

DEFAULT_CHUNK_ROWS = 512


class PackedGpuOps(GpuOps):
    """`GpuOps` for steps of whole sequences (`zerokl.kernels.packed_step`), which keep no keys for later steps.

    All layers use the one layer of `scratch_pool` in turn. What `gather_rows` returns is the caller's to keep.
    """

    spreads_splits = False
    """A sequence of one token has one key, and the buffers would grow with the tokens of all others."""

    def scratch_pool(self, inputs: StepInputs, spec: AttentionSpec) -> KVPool[Tensor]:
        """A pool of one layer with room for the step."""
        return self.kv_pool(1, num_blocks(inputs), BLOCK_SIZE, spec)

    def attention(
        self, qkv: Tensor, layer: int, params: LayerParams[Tensor], rope: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `Ops.attention`."""
        return super().attention(qkv, 0, params, rope, spec)

    def gather_rows(self, x: Tensor, rows: NDArray[np.int32]) -> Tensor:
        """See `Ops.gather_rows`; without padding."""
        assert rows is self._step.inputs.logit_rows
        out = self.device.empty([len(rows), x.shape[1]], self.dtype)
        if len(rows):
            gather(x, self._step.sections["rows"], out)
        return out

    def logprobs(
        self,
        hidden: Tensor,
        lm_head: PackedLinear,
        targets: NDArray[np.int32],
        temperature: float = 1.0,
        chunk_rows: int = DEFAULT_CHUNK_ROWS,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`policy_logprobs` [R] of the targets and entropies [R] (nats) from hidden [R, E], on the host.

        What a rollout reports of the same hidden states at this temperature, finite and above 0. `chunk_rows` rows of
        logits exist at a time; no bit depends on it. Ends the step: nothing else of it is to be used.
        """
        check_temperature(temperature)
        self.device.enter()
        rows, options = len(targets), int(sampling.NUM_OPTIONS)
        if not rows:
            return np.zeros(0, np.float32), np.zeros(0, np.float32)
        flat = self.device.put(sampling_options(neutral_sampling(rows, targets, temperature), rows).reshape(-1))
        results = self.device.empty([rows, int(sampling.NUM_RESULTS)], "int32")
        for first in range(0, rows, chunk_rows):
            last = min(first + chunk_rows, rows)
            self._step.begin_part(("head", last - first))
            self._settle(hidden[first:last], lm_head, flat[first * options : last * options], results[first:last])
        columns: NDArray[Any] = self.device.get(results).view(np.float32)
        return columns[:, int(sampling.POLICY_LOGPROB)].copy(), columns[:, int(sampling.ENTROPY)].copy()
