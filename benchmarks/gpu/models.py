"""Random models at the sizes of real ones, made on the GPU: matrices N(0, 0.02), embeddings N(0, 0.05), norms 1."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import triton
import triton.language as tl

from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.ops import GpuOps, PackedExperts, PackedGateUp, PackedLinear
from zerokl.rollout import model_runner
from zerokl.rollout.models.layout import expected_tensors
from zerokl.rollout.weight_source import WeightSource
from zerokl.rollout.worker import LocalWorker

_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "eos_token_id": 2}
MODELS: dict[str, dict[str, Any]] = {
    "A": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 1024,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
        "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 40960, "rope_theta": 1e6,
    },
    "B": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336,
        "vocab_size": 128256, "tie_word_embeddings": False, "max_position_embeddings": 131072, "rope_theta": 5e5,
    },
    "C": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 48,
        "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "intermediate_size": 6144, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "tie_word_embeddings": False, "max_position_embeddings": 40960, "rope_theta": 1e6,
    },
}  # fmt: skip
"""A: Qwen3-0.6B, B: Llama-3.1-8B, C: Qwen3-30B-A3B."""


def model_folder(name: str, folder: Path, **changes: Any) -> Path:
    """The folder of model `name`: config.json alone, for engines of `RandomWeights` workers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_COMMON | MODELS[name] | changes))
    return folder


class RandomWeights(LocalWorker):
    """A worker that makes the weights of its model on the GPU: the same ones for each version, whatever the source."""

    def stage_weights(self, source: WeightSource, version: int) -> None:
        def packer(ops: GpuOps, tensors: Mapping[str, Any]) -> tuple[Any, Any]:
            return _RandomPacker(ops, version), tensors

        with mock.patch.object(model_runner, "weight_packer", packer):
            self._live_runner().stage(_Named(expected_tensors(self._model_config)), version)


class _Name(NamedTuple):
    """Stands for a tensor."""

    name: str
    shape: tuple[int, ...]


class _Named(Mapping[str, _Name]):
    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __getitem__(self, name: str) -> _Name:
        return _Name(name, self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)


class _RandomPacker:
    """Packs as `GpuOps` does, from names."""

    def __init__(self, ops: GpuOps, version: int) -> None:
        self._ops = ops
        self._version = version

    def tensor(self, named: _Name) -> Tensor:
        if len(named.shape) == 1:
            return self._ops.tensor(np.ones(named.shape, np.float32))
        return self._matrix(named.name, *named.shape)

    def pack_linear(self, weights: Sequence[Any], biases: Sequence[Any]) -> PackedLinear:
        assert all(bias is None for bias in biases)
        if not isinstance(weights[0], _Name):
            return PackedLinear(weights[0], None)
        rows = sum(weight.shape[0] for weight in weights)
        return PackedLinear(self._matrix(weights[0].name, rows, weights[0].shape[1]), None)

    def pack_gate_up(self, gate: _Name, up: _Name) -> PackedGateUp:
        return PackedGateUp(self._matrix(gate.name, 2 * gate.shape[0], gate.shape[1]))

    def pack_experts(self, count: int, experts: Iterable[tuple[_Name, _Name, _Name]]) -> PackedExperts:
        gate, _, down = next(iter(experts))
        return PackedExperts(
            self._matrix(gate.name, count, 2 * gate.shape[0], gate.shape[1]),
            self._matrix(down.name, count, *down.shape),
        )

    def _matrix(self, name: str, *shape: int) -> Tensor:
        out = self._ops.device.empty(shape, self._ops.dtype)
        fill(out, name, self._version)
        return out


def fill(out: Tensor, name: str, version: int) -> None:
    """Random values for the matrix of a model's tensor `name`; other ones for each version."""
    scale = 0.05 if "embed" in name or "lm_head" in name else 0.02
    seed = zlib.crc32(f"{name} {version}".encode()) >> 1
    size = math.prod(out.shape)
    _fill_kernel[(triton.cdiv(size, 1024),)](out, size, seed, scale, BLOCK=1024)


@triton.jit
def _fill_kernel(ptr, n, seed, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(ptr + i, (tl.randn(seed, i.to(tl.uint32)) * scale).to(ptr.dtype.element_ty), mask=i < n)
