"""The tensors that a set of packed weights was made of, read back exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.cpu.packing import PackedLinear, unpack_expert, unpack_gate_up, unpack_linear
from zerokl.kernels.ops import DecoderParams, LayerParams

from .config import ModelConfig
from .decoder_params import AllExperts, ExpertShare, held_tensors
from .layout import CORRECTION, EMBED, FINAL_NORM, LM_HEAD, ROUTER

Floats = NDArray[np.float32]

_KEPT = {
    "input_layernorm.weight": "input_norm",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "post_attention_layernorm.weight": "post_norm",
}


class PackedTensors(Mapping[str, Floats]):
    """Tensors by Hugging Face name, unpacked on access from parameters of the CPU ops. Not to be written to.

    Of the experts those that `share` holds; None: all.
    """

    def __init__(self, params: DecoderParams[Any], config: ModelConfig, share: ExpertShare | None = None) -> None:
        self._params = params
        self._config = config
        self._share = AllExperts() if share is None else share
        self._shapes = held_tensors(config, self._share)

    def __getitem__(self, name: str) -> Floats:
        if name not in self._shapes:
            raise KeyError(name)
        if name == EMBED:
            embed: Any = self._params.embed
            return unpack_linear(embed) if isinstance(embed, PackedLinear) else _floats(embed)
        if name == FINAL_NORM:
            return _floats(self._params.final_norm)
        if name == LM_HEAD:
            return unpack_linear(self._params.lm_head)
        _, _, index, rest = name.split(".", 3)
        return self._of_layer(int(index), rest)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _of_layer(self, index: int, name: str) -> Floats:
        layer = self._params.layers[index]
        if name in _KEPT:
            return _floats(getattr(layer, _KEPT[name]))
        if name.startswith("mlp."):
            return self._of_mlp(index, layer, name)
        _, part, kind = name.split(".")
        packed, rows = (layer.o, slice(None)) if part == "o_proj" else (layer.qkv, self._rows(part))
        return _floats(packed.bias[rows] if kind == "bias" else unpack_linear(packed)[rows])

    def _of_mlp(self, index: int, layer: LayerParams[Any], name: str) -> Floats:
        mixture: Any = layer.moe
        if name == ROUTER:
            return unpack_linear(mixture.router)
        if name == CORRECTION:
            return _floats(mixture.correction)
        *path, part, _ = name.split(".")
        which = ("gate_proj", "up_proj", "down_proj").index(part)
        if "experts" in path:
            moe = self._config.moe
            assert moe is not None, "an expert without mixtures"
            slot = list(self._share.held(moe.layers.index(index), moe.num_experts)).index(int(path[-1]))
            return unpack_expert(self._share.packed(mixture.experts), slot, self._config.hidden_size)[which]
        return unpack_linear(layer.down) if part == "down_proj" else unpack_gate_up(layer.gate_up)[which]

    def _rows(self, part: str) -> slice:
        queries = self._config.num_attention_heads * self._config.head_dim
        keys = self._config.num_key_value_heads * self._config.head_dim
        starts = {"q_proj": (0, queries), "k_proj": (queries, keys), "v_proj": (queries + keys, keys)}
        start, size = starts[part]
        return slice(start, start + size)


def _floats(array: Any) -> Floats:
    floats: Floats = array
    return floats
