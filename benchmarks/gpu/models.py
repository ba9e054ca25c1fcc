"""Random models at the sizes of real ones, made on the GPU: matrices N(0, 0.02), embeddings N(0, 0.05), norms 1."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import triton
import triton.language as tl

from zerokl.kernels.gpu.device import Device
from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.ops import GpuOps
from zerokl.kernels.gpu.parameter_packing import ParameterPacker
from zerokl.rollout import model_runner
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.models.config import ModelConfig
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
    "M": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 6,
        "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
        "intermediate_size": 2048, "vocab_size": 32000, "num_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": 512, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "tie_word_embeddings": False, "max_position_embeddings": 4096, "rope_theta": 1e6,
    },
}  # fmt: skip
"""A: Qwen3-0.6B, B: Llama-3.1-8B, C: Qwen3-30B-A3B, M: a small mixture."""
GGUF = Path(os.environ.get("ZEROKL_SMOLLM2_GGUF") or os.environ.get("KIT", "/opt/kit") + "/smollm2.gguf")
"""Real weights: SmolLM2-135M-Instruct."""


def model_folder(name: str, folder: Path, **changes: Any) -> Path:
    """The folder of model `name`: config.json alone, for engines of `RandomWeights` workers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_COMMON | MODELS[name] | changes))
    return folder


def smollm2_folder(folder: Path) -> Path | None:
    """SmolLM2-135M-Instruct, converted from GGUF into `folder`; None where its weights are not there, which is said."""
    if not GGUF.is_file():
        print(f"SmolLM2: no weights at {GGUF}", flush=True)
        return None
    from zerokl.integrations.gguf_import import convert_gguf

    return convert_gguf(GGUF, folder / "smollm2")


class RandomWeights(LocalWorker):
    """A worker that makes the weights of its model on the GPU: the same ones for each version, whatever the source."""

    def __init__(self, config: EngineConfig, *given: Any, **options: Any) -> None:
        super().__init__(config, *given, **options)
        self._model_config = ModelConfig.from_json(config.model)

    def stage_weights(self, source: WeightSource, version: int) -> None:
        def packer(ops: GpuOps, tensors: RandomTensors) -> tuple[ParameterPacker, RandomTensors]:
            return ParameterPacker(ops.device, ops.dtype), tensors

        runner = self._live_runner()
        tensors = RandomTensors(runner._ops.device, self._model_config, version)  # type: ignore[attr-defined]
        with mock.patch.object(model_runner, "weight_packer", packer):
            runner.stage(tensors, version)


class RandomTensors(Mapping[str, Tensor]):
    """A model's tensors, float32 on a GPU, each made when it is asked for: the same values for each version."""

    def __init__(self, device: Device, config: ModelConfig, version: int) -> None:
        self._device = device
        self._version = version
        self._shapes = expected_tensors(config)

    def __getitem__(self, name: str) -> Tensor:
        out = self._device.empty(self._shapes[name], "float32")
        fill(out, name, self._version)
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)


def fill(out: Tensor, name: str, version: int) -> None:
    """Values for a model's tensor `name`: ones for a vector, random ones for a matrix, others for each version."""
    if len(out.shape) == 1:
        scale, mean = 0.0, 1.0
    else:
        scale, mean = 0.05 if "embed" in name or "lm_head" in name else 0.02, 0.0
    seed = zlib.crc32(f"{name} {version}".encode()) >> 1
    size = math.prod(out.shape)
    _fill_kernel[(triton.cdiv(size, 1024),)](out, size, seed, scale, mean, BLOCK=1024)


@triton.jit
def _fill_kernel(ptr, n, seed, scale, mean, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.randn(seed, i.to(tl.uint32)) * scale + mean
    tl.store(ptr + i, x.to(ptr.dtype.element_ty), mask=i < n)
