"""`PolicyModel`: the trainer's policy, a `paddle.nn.Layer` whose forward gives the engine's bits.

It runs `zerokl.rollout.models.decoder.forward`, the engine's own program: on the CPU over the differentiable ops of
`zerokl.kernels.autograd`, on a GPU over the engine's, without gradients. Its parameters bear the names of the Hugging
Face checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zerokl.integrations.paddle_backend import check_installation
from zerokl.integrations.policy_batch import (
    checked_batch,
    checked_routing,
    checked_routing_weights,
    checked_rows,
    checked_targets,
    default_rows,
)
from zerokl.integrations.policy_files import config_content, initial_tensors
from zerokl.kernels.dispatch import require_gpu_packages, resolve_dtype
from zerokl.kernels.ops import DecoderParams
from zerokl.kernels.packed_step import packed_step
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.layout import CORRECTION, expected_tensors
from zerokl.rollout.models.loader import check_tensors, open_tensors
from zerokl.rollout.models.saver import save_pretrained

check_installation()  # before anything imports Paddle, whose own error would be less helpful

import paddle  # noqa: E402

from zerokl.integrations.policy_forward import PolicyForward, WeightDtype  # noqa: E402

Tensor = Any  # paddle.Tensor
DEVICES = ("cpu", "gpu")


class PolicyModel(paddle.nn.Layer):  # type: ignore[misc]  # Paddle has no complete stubs
    """A decoder with float32 parameters over packed batches of variable-length sequences; trainable on the CPU.

    A batch is `token_ids` [T] and `cu_seqlens` [S + 1]: sequence s owns tokens cu_seqlens[s] : cu_seqlens[s + 1], and
    what is computed for it does not depend on the others. Parameters are called as in the Hugging Face checkpoint
    (`named_parameters`, `state_dict`); tied embeddings are one parameter. In a mixture of experts, gradients reach the
    router through the weights of the chosen experts; the correction of its choice is a parameter without a gradient.

    On a GPU it gives the bits of an engine there with the same `dtype`. It has no backward there: where gradients are
    asked for, outside `paddle.no_grad()`, NoGpuBackwardError is raised. What it says of gradients holds on the CPU.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, NDArray[np.float32]] | None = None,
        *,
        seed: int = 0,
        chunk_rows: int | None = None,
        weight_dtype: WeightDtype = "float32",
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        """`tensors` (Hugging Face names, copied) or, without them, random weights that `seed` alone decides.

        `device`: "cpu" or "gpu", where the parameters are and forwards run. None: where `tensors` are, if they are
        Paddle's, else Paddle's current device. Which GPU is told alike; it is GPU 0 where neither is one. Float32
        tensors on a GPU are not copied: the parameters share their memory. `dtype`: type of matrices and activations,
        as `EngineConfig.dtype`. None: "float32" on the CPU, "bfloat16" on a GPU.

        `chunk_rows`: rows of logits that exist at a time in `logprobs`; None: 64 on the CPU, 512 on a GPU.

        With `weight_dtype="bfloat16"` the parameters stay float32, and each forward runs on the bfloat16 values nearest
        to them (ties to even), as an engine does that got them by `WeightPublisher.publish(..., dtype="bfloat16",
        inexact=False)` (many times faster where the publisher was made with
        `fill=zerokl.kernels.dispatch.fill_weights`); gradients reach the parameters as they are at the rounded values.

        Raises ValueError for a device or type that there is not, and naming missing, extra or misshapen tensors,
        ImportError naming what is not installed for a GPU, RuntimeError where no GPU can be used.
        """
        super().__init__()
        if chunk_rows is not None and chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
        if weight_dtype not in get_args(WeightDtype):
            raise ValueError(f"weight_dtype must be one of {get_args(WeightDtype)}, got {weight_dtype!r}")
        if tensors is None:
            tensors = initial_tensors(config, seed)
        self.device = _device_of(device, tensors)
        self.dtype = resolve_dtype(self.device, dtype)
        self.weight_dtype = weight_dtype
        self.config = config
        check_tensors(tensors, config)
        self._forward = _make_forward(self.device, config, weight_dtype, chunk_rows, self.dtype, _gpu_of(tensors))
        for name in expected_tensors(config):
            self._adopt(name, tensors[name])
        self._forward.bind(self.named_tensors())

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        chunk_rows: int | None = None,
        weight_dtype: WeightDtype = "float32",
        device: str | None = None,
        dtype: str | None = None,
    ) -> PolicyModel:
        """Load a Hugging Face folder (config.json, safetensors), strictly; ValueError names what is wrong with it."""
        config = ModelConfig.from_json(folder)
        return cls(
            config,
            open_tensors(folder, config),
            chunk_rows=chunk_rows,
            weight_dtype=weight_dtype,
            device=device,
            dtype=dtype,
        )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json and model.safetensors (float32), as `from_pretrained` and the engine read them."""
        return save_pretrained(folder, config_content(self.config), dict(self.named_arrays()))

    def named_tensors(self) -> dict[str, Tensor]:
        """Hugging Face name -> parameter, in forward order; `lm_head.weight` is absent where tied."""
        return dict(self.named_parameters())

    def named_arrays(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """(name, read-only array) of each parameter: what a weight publisher copies from.

        On the CPU they alias the parameters' memory and show later optimizer steps too; from a GPU they are copies.
        """
        for name, parameter in self.named_parameters():
            array = self._forward.array(parameter)
            array.flags.writeable = False
            yield name, array

    def hidden_states(
        self,
        token_ids: ArrayLike,
        cu_seqlens: ArrayLike,
        rows: ArrayLike | None = None,
        *,
        routing: ArrayLike | None = None,
        routing_weights: ArrayLike | None = None,
    ) -> Tensor:
        """Final-normed hidden states [R, E], in `dtype`, of the tokens at indices `rows` [R] (default: all T),
        differentiable.

        `routing` [mixtures, T, experts per token] are expert ids in slot order to use in place of the routers' choice
        (routing replay, arXiv:2510.11370); where a row is -1 the router chooses. The experts' weights still come from
        the routers, unless `routing_weights` (float32, same shape) gives them: these are constants for the rows with
        given experts, so that no gradient reaches the routers from there. `replay_arrays` makes both from rollouts.

        Raises ValueError naming the field, the value and its bound.
        """
        ids, starts = checked_batch(token_ids, cu_seqlens, self.config)
        wanted = np.arange(len(ids), dtype=np.int32) if rows is None else checked_rows(rows, len(ids))
        return self._hidden(self._forward.params(), ids, starts, wanted, routing, routing_weights)

    forward = hidden_states

    def logprobs(
        self,
        token_ids: ArrayLike,
        cu_seqlens: ArrayLike,
        temperature: float = 1.0,
        rows: ArrayLike | None = None,
        *,
        routing: ArrayLike | None = None,
        routing_weights: ArrayLike | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logprobs [R] of next tokens and entropies [R] (nats) of their distributions, differentiable.

        `rows` [R] are indices of tokens whose *next* token is scored; default: all but each sequence's last. The values
        are bit-identical to a rollout's `policy_logprobs` and `entropy` at this temperature and these weights. For
        rollouts at temperature 0, whose `policy_logprobs` are those at temperature 1, pass 1.0. `routing`,
        `routing_weights`: as of `hidden_states`.
        Raises ValueError naming the field, the value and its bound.
        """
        ids, starts = checked_batch(token_ids, cu_seqlens, self.config)
        wanted = default_rows(starts) if rows is None else checked_rows(rows, len(ids), starts)
        params = self._forward.params()
        hidden = self._hidden(params, ids, starts, wanted, routing, routing_weights)
        return self._forward.logprobs(hidden, params, ids[wanted + 1], temperature)

    def head_logprobs(self, hidden: Tensor, targets: ArrayLike, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """The LM head on `hidden_states` [R, E]: logprobs [R] of `targets` [R] and entropies [R], differentiable."""
        ids = checked_targets(targets, hidden.shape[0], self.config.vocab_size)
        return self._forward.logprobs(hidden, self._forward.params(), ids, temperature)

    def _hidden(
        self,
        params: DecoderParams[Tensor],
        ids: NDArray[np.int32],
        starts: NDArray[np.int32],
        rows: NDArray[np.int32],
        routing: ArrayLike | None,
        routing_weights: ArrayLike | None,
    ) -> Tensor:
        experts = None if routing is None else checked_routing(routing, len(ids), self.config)
        weights = None if routing_weights is None else checked_routing_weights(routing_weights, experts)
        return self._forward.hidden(params, packed_step(ids, starts, rows, experts, weights))

    def _adopt(self, name: str, values: Any) -> None:
        """Make a parameter and register it in a tree of plain layers, so that Paddle's name for it is `name`."""
        *path, leaf = name.split(".")
        layer = self
        for part in path:
            if part not in layer._sub_layers:
                layer.add_sublayer(part, paddle.nn.Layer())
            layer = layer._sub_layers[part]
        parameter = self._forward.parameter(layer, values)
        parameter.stop_gradient = name.endswith(CORRECTION)
        layer.add_parameter(leaf, parameter)


def _device_of(device: str | None, tensors: Mapping[str, Any]) -> str:
    """The device that is asked for, or where a new model's parameters are otherwise."""
    if device is not None:
        if device not in DEVICES:
            raise ValueError(f"device must be one of {DEVICES} or None, got {device!r}")
        return device
    first = _first_tensor(tensors)
    if first is not None:
        return "gpu" if first.place.is_gpu_place() else "cpu"
    return "gpu" if paddle.get_device().startswith("gpu") else "cpu"


def _gpu_of(tensors: Mapping[str, Any]) -> int | None:
    """The number of the GPU that tensors are on; None: they are on none, or are not Paddle's."""
    first = _first_tensor(tensors)
    return int(first.place.gpu_device_id()) if first is not None and first.place.is_gpu_place() else None


def _first_tensor(tensors: Mapping[str, Any]) -> Tensor | None:
    """One of Paddle's tensors, if it is these that a new model is made of."""
    first = next(iter(tensors.values()), None) if isinstance(tensors, dict) else None
    return first if isinstance(first, paddle.Tensor) else None


def _make_forward(
    device: str, config: ModelConfig, weight_dtype: WeightDtype, chunk_rows: int | None, dtype: str, gpu: int | None
) -> PolicyForward:
    """Imported when asked for: the CPU's needs the C++ extension, the GPU's Triton."""
    if device == "gpu":
        require_gpu_packages()
        from zerokl.integrations.policy_gpu import GpuForward

        return GpuForward(config, weight_dtype, chunk_rows, cast("Any", dtype), gpu)
    from zerokl.integrations.policy_cpu import CpuForward

    return CpuForward(config, weight_dtype, chunk_rows)
