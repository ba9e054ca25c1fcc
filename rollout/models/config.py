"""Model configuration, read from a Hugging Face config.json as transformers 4 and transformers 5 write it.

The two styles differ in names: `rope_theta` and `rope_scaling` against one `rope_parameters`, `torch_dtype` against
`dtype`, `use_sliding_window` against `layer_types`. Both are read; what is not supported is refused by name, never
ignored where it would change a number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zerokl.kernels.ops import RotaryLayout

from .config_fields import ConfigFields
from .moe_config import MoeConfig
from .registry import Architecture, find_architecture

RopeKind = Literal["default", "linear", "llama3"]
_ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. The last three fields are used by kind "llama3" alone, `factor` by "linear" too."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything about a decoder that its tensors do not say. Make one with `ModelConfig.from_json`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    rotary_layout: RotaryLayout
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    """Of config.json, then those that generation_config.json adds; may be empty."""
    moe: MoeConfig | None = None
    """None: every layer is dense."""
    dtype: str
    """What the checkpoint declares for its tensors: float32, bfloat16 or float16. Computation is in float32."""

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """Read a folder with a config.json, a config.json itself, or its parsed content.

        Raises ValueError naming file and field for a missing field, a bad value or an unsupported feature.
        """
        if isinstance(source, Mapping):
            return _parse(ConfigFields(source, "config"), ConfigFields({}, "generation config"))
        path = Path(source)
        file = path / "config.json" if path.is_dir() else path
        generation = file.with_name("generation_config.json")
        generation_values = _read_json(generation) if generation.is_file() else {}
        return _parse(ConfigFields(_read_json(file), str(file)), ConfigFields(generation_values, str(generation)))


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold one JSON object, got {type(values).__name__}")
    return values


def _parse(fields: ConfigFields, generation: ConfigFields) -> ModelConfig:
    family = find_architecture(_architecture_name(fields), fields.source)
    _refuse_unsupported(fields, family)
    vocab_size = fields.integer("vocab_size", minimum=1)
    heads = fields.integer("num_attention_heads", minimum=1)
    attention_bias = bool(family.attention_bias_field and fields.boolean(family.attention_bias_field, default=False))
    eos = fields.token_ids("eos_token_id", vocab_size=vocab_size)
    eos += generation.token_ids("eos_token_id", vocab_size=vocab_size)
    return ModelConfig(
        architecture=family.name,
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size", minimum=1),
        intermediate_size=fields.integer("intermediate_size", minimum=1),
        num_hidden_layers=fields.integer("num_hidden_layers", minimum=1),
        num_attention_heads=heads,
        num_key_value_heads=_num_key_value_heads(fields, family, heads),
        head_dim=_head_dim(fields, family, heads),
        rms_norm_eps=fields.number("rms_norm_eps", above=0.0),
        rope=_rope(fields, family),
        rotary_layout=family.rotary_layout,
        max_position_embeddings=fields.integer("max_position_embeddings", minimum=1),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=family.default_tie_word_embeddings),
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        qk_norm=family.qk_norm,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        moe=family.moe(fields, fields.integer("num_hidden_layers", minimum=1)) if family.moe else None,
        dtype=_dtype(fields),
    )


def _architecture_name(fields: ConfigFields) -> str:
    names = fields.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise fields.error(f"architectures must be a list of one name, got {names!r}")
    return names[0]


def _num_key_value_heads(fields: ConfigFields, family: Architecture, heads: int) -> int:
    default = {} if family.num_key_value_heads_required else {"default": heads}
    kv_heads = fields.integer("num_key_value_heads", minimum=1, **default)
    if heads % kv_heads:
        raise fields.error(f"num_attention_heads must be a multiple of num_key_value_heads={kv_heads}, got {heads}")
    return kv_heads


def _head_dim(fields: ConfigFields, family: Architecture, heads: int) -> int:
    if family.head_dim_required or fields.get("head_dim", None) is not None:
        head_dim = fields.integer("head_dim", minimum=2)
    else:
        hidden = fields.integer("hidden_size", minimum=1)
        if hidden % heads:
            raise fields.error(f"hidden_size must be a multiple of num_attention_heads={heads}, got {hidden}")
        head_dim = hidden // heads
    if head_dim % 2:
        raise fields.error(f"head_dim must be even for the rotary embedding, got {head_dim}")
    return head_dim


def _dtype(fields: ConfigFields) -> str:
    name = "dtype" if fields.get("dtype", None) is not None else "torch_dtype"
    dtype = fields.text(name, default="float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise fields.error(f"{name} must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return dtype


def _rope(fields: ConfigFields, family: Architecture) -> RopeConfig:
    new_style = fields.get("rope_parameters", None) is not None
    if new_style and fields.get("rope_scaling", None) is not None:
        raise fields.error("rope_parameters and rope_scaling are both set; one of them must be absent")
    scaling = fields.nested("rope_parameters" if new_style else "rope_scaling")
    theta_fields = scaling if scaling.get("rope_theta", None) is not None else fields
    default = {} if family.default_rope_theta is None else {"default": family.default_rope_theta}
    theta = theta_fields.number("rope_theta", above=0.0, **default)
    # "type" is the older name of "rope_type"
    kind = scaling.text("rope_type" if scaling.get("rope_type", None) is not None else "type", default="default")
    if kind not in _ROPE_KINDS:
        raise scaling.error(f"rope_type {kind!r} is not supported; known are {', '.join(_ROPE_KINDS)}")
    for holder in (fields, scaling):
        if holder.number("partial_rotary_factor", above=0.0, default=1.0) != 1.0:
            raise holder.error(f"partial_rotary_factor must be 1, got {holder.get('partial_rotary_factor')}")
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=scaling.number("factor", above=0.0))
    if kind == "llama3":
        return _llama3_rope(scaling, theta)
    return RopeConfig(theta=theta)


def _llama3_rope(scaling: ConfigFields, theta: float) -> RopeConfig:
    low = scaling.number("low_freq_factor", above=0.0)
    high = scaling.number("high_freq_factor", above=0.0)
    if high <= low:
        raise scaling.error(f"high_freq_factor must be above low_freq_factor={low:g}, got {high:g}")
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=scaling.number("factor", above=0.0),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=scaling.integer("original_max_position_embeddings", minimum=1),
    )


def _refuse_unsupported(fields: ConfigFields, family: Architecture) -> None:
    activation = fields.text("hidden_act", default="silu")
    if activation != "silu":
        raise fields.error(f"hidden_act must be 'silu', got {activation!r}")
    if family.mlp_bias_field and fields.boolean(family.mlp_bias_field, default=False):
        raise fields.error(f"{family.mlp_bias_field} must be false (MLP biases are not supported), got true")
    kinds = fields.get("layer_types", [])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise fields.error(f"layer_types must all be 'full_attention' (no sliding window), got {kinds!r}")
    if not kinds and fields.boolean("use_sliding_window", default=False):
        first = fields.integer("max_window_layers", minimum=0, default=0)
        if first < fields.integer("num_hidden_layers", minimum=1):
            window = fields.get("sliding_window", None)
            raise fields.error(
                f"use_sliding_window must be false (attention is over the whole context), got true with "
                f"sliding_window={window} from layer {first} on"
            )
