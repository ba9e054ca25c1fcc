"""Part `reference` of run_all.py: errors of log-probabilities against float64, ours over those of an ordinary bfloat16
forward.

All three have the same weights, rounded to bfloat16, and score the same sequences. The exact ones come from
`zerokl.kernels.reference`; the ordinary ones from `ordinary`, with products by cuBLAS, under logits rounded to
bfloat16, as most engines have them, and under float32 logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np
from measures import Errors
from numpy.typing import NDArray
from ordinary import OrdinaryOps, Product, rounded
from refusal import PartRefusedError

from zerokl.kernels.reference.ops import ReferenceOps
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.decoder import DecoderSpec, forward
from zerokl.rollout.models.decoder_params import build_params
from zerokl.rollout.models.loader import load_tensors
from zerokl.rollout.models.rope import rope_table
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, step_inputs
from zerokl.rollout.sampling_params import SamplingParams

Row = dict[str, Any]
Tokens = NDArray[np.int32]
Tensors = dict[str, NDArray[np.float32]]
Logits = Callable[[Any, Any, Any], NDArray[Any]]
"""(ops, hidden rows [n, E], head) -> [n, V]."""

MOST_RATIO = 1.1
MOST_TOKENS, BLOCK = 256, 16
PROMPTS = ("The capital of France is", "Write a haiku about the sea.", "def fibonacci(n):", "12 + 30 =")
SHALLOW_A = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 4, "hidden_size": 1024,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
    "vocab_size": 32768, "tie_word_embeddings": True, "max_position_embeddings": 2048, "rope_theta": 1e6,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "eos_token_id": 2,
}  # fmt: skip


def reference_rows(models: Sequence[str], folder: Path, gguf: Path, device: str = "gpu") -> list[Row]:
    """A row for each model and kind of ordinary logits. Raises PartRefusedError without cuBLAS or the weights."""
    product = _vendor_product() if device == "gpu" else None
    return [row for name in models for row in _of_model(name, _folder(name, folder, gguf), device, product)]


def _folder(name: str, folder: Path, gguf: Path) -> Path:
    if name != "smollm2":
        assert name == "A, 4 layers", name
        return save_pretrained(folder / "shallow", SHALLOW_A, random_tensors(ModelConfig.from_json(SHALLOW_A), 1))
    if not gguf.exists():
        raise PartRefusedError(f"no weights of SmolLM2: {gguf} is not there (--gguf)")
    if gguf.is_dir():
        return gguf
    from zerokl.integrations.gguf_import import convert_gguf

    return convert_gguf(gguf, folder / "smollm2")


def _of_model(name: str, folder: Path, device: str, product: Product | None) -> Iterator[Row]:
    options: Row = {"device": device, "max_model_len": MOST_TOKENS, "kv_cache_bytes": 1 << 30}
    with RolloutEngine(EngineConfig(model=str(folder), **options)) as engine:
        sequences = _sequences(engine)
        ours = np.concatenate(engine.score(sequences))
    config = ModelConfig.from_json(str(folder))
    tensors = weights_as_served(load_tensors(folder, config))
    exact = np.concatenate(Forward(ReferenceOps(), config, tensors).logprobs(sequences, [_exact_logits])[0])
    ordinary = Forward(OrdinaryOps() if product is None else OrdinaryOps(product), config, tensors)
    usual = ordinary.logprobs(sequences, [_rounded_logits, _float_logits])
    for kind, values in zip(("bfloat16", "float32"), usual, strict=True):
        row = {"model": name, "ordinary_logits": kind, **error_row(ours, np.concatenate(values), exact)}
        print(json.dumps(row), flush=True)
        yield row


def error_row(ours: NDArray[np.floating], usual: NDArray[np.floating], exact: NDArray[np.float64]) -> Row:
    """Both errors, and ours over the ordinary one."""
    of_ours, of_usual = Errors.of(ours, exact), Errors.of(usual, exact)
    ratios = of_ours.over(of_usual)
    names = {"ours": of_ours, "ordinary": of_usual, "ratio": ratios}
    values = {f"{which}_{part}": float(v) for which, errors in names.items() for part, v in asdict(errors).items()}
    return {"values": len(exact), **values, "passed": max(astuple(ratios)) <= MOST_RATIO}


def weights_as_served(tensors: Tensors) -> Tensors:
    """Matrices as a bfloat16 engine holds them, vectors as they are."""
    return {name: rounded(values) if values.ndim == 2 else values for name, values in tensors.items()}


class Forward:
    """A model over some op table, sequence by sequence."""

    def __init__(self, ops: Any, config: ModelConfig, tensors: Tensors) -> None:
        self._ops, self._config = ops, config
        self._spec = DecoderSpec.from_config(config)
        rope = ops.tensor(rope_table(config.rope, config.head_dim, MOST_TOKENS))
        placed = {name: ops.tensor(values) for name, values in tensors.items()}
        self._params = build_params(ops, config, placed, rope)

    def logprobs(self, sequences: Sequence[Tokens], kinds: Sequence[Logits]) -> list[list[NDArray[np.float64]]]:
        """Of each token but the first given those before it, for each kind of logits and sequence: [L - 1]."""
        pairs = [(self._hidden(ids), ids) for ids in sequences]
        return [
            [_chosen(kind(self._ops, rows, self._params.lm_head), ids[1:]) for rows, ids in pairs] for kind in kinds
        ]

    def _hidden(self, ids: Tokens) -> Any:
        assert len(ids) <= MOST_TOKENS
        blocks = -(-len(ids) // BLOCK)
        pool = self._ops.kv_pool(self._config.num_hidden_layers, blocks, BLOCK, self._spec.attention)
        rows = np.arange(len(ids) - 1, dtype=np.int32)
        inputs = step_inputs([ids], [0], [list(range(blocks))], BLOCK, logit_rows=rows)
        return forward(self._ops, self._params, self._spec, inputs, pool)


def _chosen(logits: NDArray[Any], tokens: Tokens) -> NDArray[np.float64]:
    """Log-softmax in float64 of logits [n, V] at tokens [n]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    return np.asarray(shifted[np.arange(len(tokens)), tokens] - np.log(np.exp(shifted).sum(-1)))


def _exact_logits(ops: ReferenceOps, hidden: Any, head: Any) -> NDArray[Any]:
    return ops.linear(hidden, head)


def _rounded_logits(ops: OrdinaryOps, hidden: Any, head: Any) -> NDArray[Any]:
    return np.asarray(ops.linear(hidden, head))


def _float_logits(ops: OrdinaryOps, hidden: Any, head: Any) -> NDArray[Any]:
    return ops.float_linear(hidden, head)


def _sequences(engine: RolloutEngine) -> list[Tokens]:
    """What the engine itself says, after some prompts: of text, or random ones."""
    params = SamplingParams(max_tokens=96, seed=5, ignore_eos=True)
    if engine.tokenizer is not None:
        rollouts = engine.generate(list(PROMPTS), params)
    else:
        random = np.random.default_rng(6)
        vocab = engine.model_config.vocab_size
        rollouts = engine.generate([random.integers(10, vocab, 32).astype(np.int32) for _ in PROMPTS], params)
    return [np.concatenate([rollout.prompt_token_ids, rollout.token_ids]).astype(np.int32) for rollout in rollouts]


def _vendor_product() -> Product:
    """Products by cuBLAS on the GPU, of arrays on the host."""
    from vendor_product import VendorProduct

    return VendorProduct()
