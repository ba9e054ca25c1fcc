"""`PolicyModel`: the trainer's policy, a `paddle.nn.Layer` whose forward gives the engine's bits.

It runs `zerokl.rollout.models.decoder.forward`, the engine's own program, over the differentiable ops of
`zerokl.kernels.autograd`. Its parameters bear the names of the Hugging Face checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

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
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.decoder import DecoderSpec, forward
from zerokl.rollout.models.decoder_params import build_params
from zerokl.rollout.models.layout import CORRECTION, expected_tensors
from zerokl.rollout.models.loader import check_tensors, open_tensors
from zerokl.rollout.models.rope import rope_table
from zerokl.rollout.models.saver import save_pretrained

check_installation()  # before anything imports Paddle, whose own error would be less helpful

import paddle  # noqa: E402

from zerokl.kernels.autograd.arrays import array_of  # noqa: E402
from zerokl.kernels.autograd.lm_head import DEFAULT_CHUNK_ROWS  # noqa: E402
from zerokl.kernels.autograd.ops import AutogradOps  # noqa: E402
from zerokl.kernels.autograd.packed_step import packed_step, scratch_pool  # noqa: E402
from zerokl.kernels.autograd.rounding import round_to_bfloat16  # noqa: E402
from zerokl.kernels.ops import DecoderParams  # noqa: E402

Tensor = Any  # paddle.Tensor
WeightDtype = Literal["float32", "bfloat16"]


class PolicyModel(paddle.nn.Layer):  # type: ignore[misc]  # Paddle has no complete stubs
    """A trainable decoder on the CPU, float32, over packed batches of variable-length sequences.

    A batch is `token_ids` [T] and `cu_seqlens` [S + 1]: sequence s owns tokens cu_seqlens[s] : cu_seqlens[s + 1], and
    what is computed for it does not depend on the others. Parameters are called as in the Hugging Face checkpoint
    (`named_parameters`, `state_dict`); tied embeddings are one parameter. In a mixture of experts, gradients reach the
    router through the weights of the chosen experts; the correction of its choice is a parameter without a gradient.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, NDArray[np.float32]] | None = None,
        *,
        seed: int = 0,
        chunk_rows: int = DEFAULT_CHUNK_ROWS,
        weight_dtype: WeightDtype = "float32",
    ) -> None:
        """`tensors` (Hugging Face names, copied) or, without them, random weights that `seed` alone decides.

        `chunk_rows`: rows of logits that exist at a time in `logprobs`. With `weight_dtype="bfloat16"` the parameters
        stay float32, and each forward runs on the bfloat16 values nearest to them (ties to even), as an engine does
        that got them by `WeightPublisher.publish(..., dtype="bfloat16", inexact=False)` (many times faster where the
        publisher was made with `fill=zerokl.kernels.dispatch.fill_weights`); gradients reach the parameters as they
        are at the rounded values. Raises ValueError for another one, and naming missing, extra or
        misshapen tensors.
        """
        super().__init__()
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
        if weight_dtype not in get_args(WeightDtype):
            raise ValueError(f"weight_dtype must be one of {get_args(WeightDtype)}, got {weight_dtype!r}")
        self.weight_dtype = weight_dtype
        self.config = config
        self.chunk_rows = chunk_rows
        if tensors is None:
            tensors = initial_tensors(config, seed)
        check_tensors(tensors, config)
        for name in expected_tensors(config):
            self._adopt(name, tensors[name])
        self._ops = AutogradOps()
        self._spec = DecoderSpec.from_config(config)
        self._rope = rope_table(config.rope, config.head_dim, config.max_position_embeddings)
        self._params = self._build(lambda parameter: parameter)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, chunk_rows: int = DEFAULT_CHUNK_ROWS, weight_dtype: WeightDtype = "float32"
    ) -> PolicyModel:
        """Load a Hugging Face folder (config.json, safetensors), strictly; ValueError names what is wrong with it."""
        config = ModelConfig.from_json(folder)
        return cls(config, open_tensors(folder, config), chunk_rows=chunk_rows, weight_dtype=weight_dtype)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json and model.safetensors (float32), as `from_pretrained` and the engine read them."""
        return save_pretrained(folder, config_content(self.config), dict(self.named_arrays()))

    def named_tensors(self) -> dict[str, Tensor]:
        """Hugging Face name -> parameter, in forward order; `lm_head.weight` is absent where tied."""
        return dict(self.named_parameters())

    def named_arrays(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """(name, read-only array) of each parameter, aliasing its memory: what a weight publisher copies from.

        The arrays show later optimizer steps too.
        """
        for name, parameter in self.named_parameters():
            array = array_of(parameter)
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
        """Final-normed hidden states [R, E] of the tokens at indices `rows` [R] (default: all T), differentiable.

        `routing` [mixtures, T, experts per token] are expert ids in slot order to use in place of the routers' choice
        (routing replay, arXiv:2510.11370); where a row is -1 the router chooses. The experts' weights still come from
        the routers, unless `routing_weights` (float32, same shape) gives them: these are constants for the rows with
        given experts, so that no gradient reaches the routers from there. `replay_arrays` makes both from rollouts.

        Raises ValueError naming the field, the value and its bound.
        """
        ids, starts = checked_batch(token_ids, cu_seqlens, self.config)
        wanted = np.arange(len(ids), dtype=np.int32) if rows is None else checked_rows(rows, len(ids))
        return self._hidden(self._current(), ids, starts, wanted, routing, routing_weights)

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
        params = self._current()
        hidden = self._hidden(params, ids, starts, wanted, routing, routing_weights)
        return self._ops.logprobs(hidden, params.lm_head, ids[wanted + 1], temperature, self.chunk_rows)

    def head_logprobs(self, hidden: Tensor, targets: ArrayLike, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """The LM head on `hidden_states` [R, E]: logprobs [R] of `targets` [R] and entropies [R], differentiable."""
        ids = checked_targets(targets, hidden.shape[0], self.config.vocab_size)
        return self._ops.logprobs(hidden, self._current().lm_head, ids, temperature, self.chunk_rows)

    def _build(self, form: Callable[[Tensor], Tensor]) -> DecoderParams[Tensor]:
        operands = {name: form(parameter) for name, parameter in self.named_parameters()}
        return build_params(self._ops, self.config, operands, self._rope)

    def _current(self) -> DecoderParams[Tensor]:
        """What a forward runs on now."""
        return self._params if self.weight_dtype == "float32" else self._build(round_to_bfloat16)

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
        step = packed_step(ids, starts, rows, experts, weights)
        return forward(self._ops, params, self._spec, step, scratch_pool(step, self._spec.attention))

    def _adopt(self, name: str, values: NDArray[Any]) -> Tensor:
        """Make a parameter and register it in a tree of plain layers, so that Paddle's name for it is `name`."""
        *path, leaf = name.split(".")
        layer = self
        for part in path:
            if part not in layer._sub_layers:
                layer.add_sublayer(part, paddle.nn.Layer())
            layer = layer._sub_layers[part]
        parameter = layer.create_parameter(
            list(values.shape), dtype="float32", default_initializer=paddle.nn.initializer.Constant(0.0)
        )
        np.copyto(array_of(parameter), values)
        parameter.stop_gradient = name.endswith(CORRECTION)
        layer.add_parameter(leaf, parameter)
        return parameter
