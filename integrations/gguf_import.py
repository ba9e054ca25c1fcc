"""A GGUF file of the Llama family, dequantised into a Hugging Face style folder.

The folder holds `config.json`, `model.safetensors` (float32), `tokenizer.json` and `tokenizer_config.json` (chat
template), and is read by the engine and the trainer alike. Needs the package `gguf` (extra `demo`).

Two things of the format matter. GGUF stores the rows of the query and key projections of Llama models in interleaved
rotary order; here they are put back into half-split order (pairs i, i + D/2). And the file names its pre-tokenizer
only by a label (`tokenizer.ggml.pre`); the rules behind the label are `_PRE_TOKENIZERS`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gguf import GGUFReader

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # GGUF token types

# Label -> pre-tokenizers, in order. "smollm": every digit alone, then GPT-2's byte level split.
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hugging_face_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; ValueError for a tensor that no Llama has."""
    parts = gguf_name.split(".")
    if len(parts) == 2 and parts[0] in _TOP_NAMES:
        return f"{_TOP_NAMES[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise ValueError(f"GGUF tensor {gguf_name!r} has no counterpart in a Llama model")


def unpermute_rotary_rows(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows [H * D, K] from interleaved rotary order (0, D/2, 1, D/2 + 1, ...) to half-split order, head by head."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def convert_gguf(gguf_path: Path, folder: Path) -> Path:
    """Write `folder` from a GGUF file; it appears whole (written aside, then renamed) or not at all. Returns `folder`.

    Raises ValueError for a folder that holds anything already, and for an architecture or pre-tokenizer that is not
    known here; ImportError without `gguf`.
    """
    refuse_occupied(folder)
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("reading GGUF files needs the extra `demo`: pip install zerokl[demo]") from error
    reader = GGUFReader(gguf_path)
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"{gguf_path}: general.architecture is {architecture!r}, only 'llama' can be converted")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tensors = _tensors(reader)
        _write_json(scratch / "config.json", _config(reader, tied="lm_head.weight" not in tensors))
        _write_json(scratch / "tokenizer.json", tokenizer_json(reader))
        _write_json(scratch / "tokenizer_config.json", _tokenizer_config(reader))
        _save_safetensors(tensors, scratch / "model.safetensors")
        scratch.chmod(0o755)  # mkdtemp makes it private
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def refuse_occupied(folder: Path) -> None:
    """Raise ValueError unless `folder` is absent or empty: what somebody keeps there is not ours to replace."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder}: must be absent or an empty folder, nothing there is overwritten")


def tokenizer_json(reader: GGUFReader) -> dict[str, Any]:
    """The `tokenizers` description of a byte-level BPE vocabulary held in a GGUF file."""
    label = _field(reader, "tokenizer.ggml.pre")
    model = _field(reader, "tokenizer.ggml.model")
    if model != "gpt2" or label not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise ValueError(f"tokenizer {model!r} with pre-tokenizer {label!r} is not known; known: 'gpt2' with {known}")
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    types: list[int] = _field(reader, "tokenizer.ggml.token_type")
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind == _CONTROL}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[label]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _field(reader, "tokenizer.ggml.merges"),
        },
    }


def _config(reader: GGUFReader, tied: bool) -> dict[str, Any]:
    heads = int(_field(reader, "llama.attention.head_count"))
    hidden = int(_field(reader, "llama.embedding_length"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": int(_field(reader, "llama.vocab_size")),
        "hidden_size": hidden,
        "intermediate_size": int(_field(reader, "llama.feed_forward_length")),
        "num_hidden_layers": int(_field(reader, "llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(_field(reader, "llama.attention.head_count_kv")),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "rms_norm_eps": float(f"{float(_field(reader, 'llama.attention.layer_norm_rms_epsilon')):.6g}"),
        "rope_theta": float(_field(reader, "llama.rope.freq_base")),
        "max_position_embeddings": int(_field(reader, "llama.context_length")),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": int(_field(reader, "tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(_field(reader, "tokenizer.ggml.eos_token_id")),
        "pad_token_id": int(_field(reader, "tokenizer.ggml.padding_token_id")),
        "torch_dtype": "float32",
    }


def _tokenizer_config(reader: GGUFReader) -> dict[str, Any]:
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(_field(reader, "tokenizer.ggml.add_bos_token")),
        "bos_token": tokens[int(_field(reader, "tokenizer.ggml.bos_token_id"))],
        "eos_token": tokens[int(_field(reader, "tokenizer.ggml.eos_token_id"))],
        "pad_token": tokens[int(_field(reader, "tokenizer.ggml.padding_token_id"))],
        "chat_template": _field(reader, "tokenizer.chat_template"),
    }


def _tensors(reader: GGUFReader) -> dict[str, NDArray[np.float32]]:
    from gguf.quants import dequantize

    rotary_heads = {
        "self_attn.q_proj.weight": int(_field(reader, "llama.attention.head_count")),
        "self_attn.k_proj.weight": int(_field(reader, "llama.attention.head_count_kv")),
    }
    tensors = {}
    for tensor in reader.tensors:
        name = hugging_face_name(tensor.name)
        shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF counts the fastest axis first
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)
        for suffix, num_heads in rotary_heads.items():
            if name.endswith(suffix):
                weight = unpermute_rotary_rows(weight, num_heads)
        tensors[name] = weight
    return tensors


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.fields.get(key)
    if field is None:
        raise ValueError(f"the GGUF file has no field {key!r}")
    return field.contents()


def _save_safetensors(tensors: dict[str, NDArray[np.float32]], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path, metadata={"format": "np"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
