"""config.json of every family, in the style of transformers 4 and of transformers 5, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zerokl.rollout.models.config import ModelConfig, RopeConfig
from zerokl.rollout.models.moe_config import MoeConfig
from zerokl.rollout.models.synthetic import tiny_config, tiny_moe_config

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_ROPE = RopeConfig(
    theta=500000.0,
    kind="llama3",
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def old_and_new(name: str, theta: float, scaling: dict[str, Any] | None = None, **fields: Any) -> list[dict[str, Any]]:
    base = {"architectures": [name], **SIZES, **fields}
    old = {**base, "rope_theta": theta, "rope_scaling": scaling, "torch_dtype": "bfloat16"}
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    return [old, {**base, "rope_parameters": parameters, "dtype": "bfloat16"}]


EXPERTS: dict[str, Any] = {"num_experts": 8, "top_k": 2, "intermediate_size": 32}
QWEN3_MOE = {
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
ERNIE_MOE = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1}
FAMILIES = {
    "llama": (
        old_and_new("LlamaForCausalLM", 500000.0, LLAMA3_SCALING, attention_bias=False, mlp_bias=False, eos_token_id=2),
        {"rope": LLAMA3_ROPE, "head_dim": 16, "eos_token_ids": (2,), "qkv_bias": False, "tie_word_embeddings": False},
    ),
    "qwen2": (
        old_and_new(
            "Qwen2ForCausalLM",
            1e6,
            use_sliding_window=False,
            sliding_window=4096,
            max_window_layers=3,
            tie_word_embeddings=True,
        ),
        {"rope": RopeConfig(theta=1e6), "qkv_bias": True, "o_bias": False, "tie_word_embeddings": True},
    ),
    "qwen3": (
        old_and_new("Qwen3ForCausalLM", 1e6, head_dim=32, layer_types=["full_attention"] * 3, eos_token_id=[7, 8]),
        {"head_dim": 32, "qk_norm": True, "qkv_bias": False, "eos_token_ids": (7, 8)},
    ),
    "ernie": (
        old_and_new("Ernie4_5ForCausalLM", 500000.0, head_dim=24, use_bias=False),
        {"head_dim": 24, "rotary_layout": "interleaved", "tie_word_embeddings": True, "qkv_bias": False},
    ),
    "qwen3 moe": (
        old_and_new("Qwen3MoeForCausalLM", 1e6, **QWEN3_MOE, decoder_sparse_step=1, mlp_only_layers=[1]),
        {"qk_norm": True, "moe": MoeConfig(layers=(0, 2), **EXPERTS, normalise=True)},
    ),
    "ernie moe": (
        old_and_new("Ernie4_5_MoeForCausalLM", 500000.0, **ERNIE_MOE, moe_layer_end_index=2, moe_layer_interval=1),
        {
            "rotary_layout": "interleaved",
            "moe": MoeConfig(
                layers=(1, 2),
                **EXPERTS,
                shared_intermediate_size=64,
                correction_bias=True,
                normalise=True,
                norm_min=1e-12,
            ),
        },
    ),
}


@pytest.mark.parametrize("style", [4, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_styles_of_every_family(family: str, style: int) -> None:
    contents, expected = FAMILIES[family]
    config = ModelConfig.from_json(contents[style - 4])
    assert config == ModelConfig.from_json(contents[0])
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.dtype == "bfloat16"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (320, 64, 96)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (3, 4, 2)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-5, 512)
    assert config.rotary_layout == expected.get("rotary_layout", "half")


def test_fields_that_early_llama_configurations_leave_out() -> None:
    content = {"architectures": ["LlamaForCausalLM"], **SIZES, "rope_scaling": {"type": "linear", "factor": 2.0}}
    del content["num_key_value_heads"]
    config = ModelConfig.from_json(content)
    assert config.num_key_value_heads == 4
    assert config.rope == RopeConfig(theta=10000.0, kind="linear", factor=2.0)
    assert config.dtype == "float32"
    assert config.eos_token_ids == ()


@pytest.mark.parametrize(
    ("name", "field"), [("LlamaForCausalLM", "attention_bias"), ("Qwen3ForCausalLM", "attention_bias")]
)
def test_attention_bias_is_on_all_four_projections(name: str, field: str) -> None:
    config = ModelConfig.from_json(tiny_config(name, **{field: True}))
    assert config.qkv_bias and config.o_bias


@pytest.mark.parametrize(
    ("name", "changes", "layers"),
    [
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": None}, (0, 1, 2, 3, 4)),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [3], "decoder_sparse_step": 2}, (1,)),
        (
            "Qwen3MoeForCausalLM",
            {"mlp_only_layers": None, "num_experts": None, "num_local_experts": 8},
            (0, 1, 2, 3, 4),
        ),
        ("Ernie4_5_MoeForCausalLM", {"moe_layer_start_index": None}, (1, 2, 3, 4)),
        ("Ernie4_5_MoeForCausalLM", {"moe_layer_interval": 2, "moe_layer_end_index": -1}, (1, 3)),
        ("Ernie4_5_MoeForCausalLM", {"moe_layer_start_index": 2, "moe_layer_end_index": 3}, (2, 3)),
        ("Ernie4_5_MoeForCausalLM", {"moe_layer_start_index": 9}, ()),
    ],
)
def test_which_layers_are_mixtures(name: str, changes: dict[str, Any], layers: tuple[int, ...]) -> None:
    config = ModelConfig.from_json(tiny_moe_config(name, num_hidden_layers=5, **changes))
    assert config.moe is not None and config.moe.layers == layers


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Qwen3MoeForCausalLM", {"num_experts_per_tok": 9}, "num_experts_per_tok must be at most .* 8, got 9"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [3]}, r"mlp_only_layers must be a list of layers in \[0, 3\)"),
        ("Qwen3MoeForCausalLM", {"num_local_experts": 4}, r"num_experts .* must be one number, got \[4, 8\]"),
        ("Qwen3MoeForCausalLM", {"num_experts": None}, r"num_experts .* must be one number, got \[\]"),
        ("Ernie4_5_MoeForCausalLM", {"moe_k": None}, "field 'moe_k' is missing"),
        ("Ernie4_5_MoeForCausalLM", {"moe_norm_min": 0}, "moe_norm_min must be a finite number above 0"),
        ("Ernie4_5_MoeForCausalLM", {"use_bias": True}, "use_bias must be false"),
    ],
)
def test_mixtures_that_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_json(tiny_moe_config(name, **changes))


def test_folder_file_and_generation_config(tmp_path: Path) -> None:
    content = tiny_config(eos_token_id=[5])
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert ModelConfig.from_json(tmp_path) == ModelConfig.from_json(tmp_path / "config.json")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 5], "temperature": 0.6}))
    assert ModelConfig.from_json(str(tmp_path)).eos_token_ids == (5, 6)


BAD = [
    ({"architectures": ["MistralForCausalLM"]}, r"'MistralForCausalLM'.*Ernie4_5.*Llama.*Qwen2.*Qwen3"),
    ({"architectures": []}, r"architectures must be a list of one name"),
    ({"vocab_size": 0}, r"vocab_size must be at least 1, got 0"),
    ({"vocab_size": "96"}, r"vocab_size must be an integer, got '96'"),
    ({"num_hidden_layers": True}, r"num_hidden_layers must be an integer, got True"),
    ({"head_dim": None, "hidden_size": 50}, r"hidden_size must be a multiple of num_attention_heads=4, got 50"),
    ({"num_key_value_heads": 3}, r"num_attention_heads must be a multiple of num_key_value_heads=3, got 4"),
    ({"head_dim": 15}, r"head_dim must be even .* got 15"),
    ({"rms_norm_eps": 0.0}, r"rms_norm_eps must be a finite number above 0, got 0"),
    ({"rms_norm_eps": float("nan")}, r"rms_norm_eps must be a finite number above 0, got nan"),
    ({"tie_word_embeddings": 1}, r"tie_word_embeddings must be true or false, got 1"),
    ({"eos_token_id": 96}, r"eos_token_id must hold ids in \[0, 96\), got 96"),
    ({"dtype": "float8"}, r"dtype must be one of float32, bfloat16, float16, got 'float8'"),
    ({"hidden_act": "gelu"}, r"hidden_act must be 'silu', got 'gelu'"),
    ({"mlp_bias": True}, r"mlp_bias must be false"),
    (
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}},
        r"rope_parameters: rope_type 'yarn' is not supported",
    ),
    ({"rope_parameters": {"rope_theta": -1.0}}, r"rope_theta must be a finite number above 0, got -1"),
    ({"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0}}, r"field 'high_freq_factor' is missing"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_parameters and rope_scaling are both set"),
    (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        r"partial_rotary_factor must be 1, got 0.5",
    ),
    ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types must all be 'full_attention'"),
    ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, r"use_sliding_window must be false"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_values_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_json({**tiny_config(), **changes})


@pytest.mark.parametrize("content", [c for family, _ in FAMILIES.values() for c in family])
def test_every_required_field_is_named_with_its_file(tmp_path: Path, content: dict[str, Any]) -> None:
    optional = {"hidden_act", "torch_dtype", "dtype", "rope_scaling", "attention_bias", "mlp_bias", "eos_token_id"}
    optional |= {
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
        "tie_word_embeddings",
        "layer_types",
        "use_bias",
        "num_experts",  # has two names: test_mixtures_that_are_refused
        "norm_topk_prob",
        "decoder_sparse_step",
        "mlp_only_layers",
        "moe_layer_start_index",
        "moe_layer_end_index",
        "moe_layer_interval",
    }
    if content["architectures"] == ["LlamaForCausalLM"]:
        optional |= {"rope_theta", "rope_parameters", "num_key_value_heads"}
    if "head_dim" in content and not content["architectures"][0].startswith("Qwen3"):
        optional |= {"head_dim"}
    file = tmp_path / "config.json"
    for field in set(content) - optional:
        file.write_text(json.dumps({name: value for name, value in content.items() if name != field}))
        reported = "rope_theta" if field == "rope_parameters" else field
        with pytest.raises(ValueError, match=f"{file}: field '{reported}' is missing"):
            ModelConfig.from_json(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_broken_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: "):
        ModelConfig.from_json(tmp_path)
    with pytest.raises(ValueError, match=r"elsewhere/config\.json: no such file"):
        ModelConfig.from_json(tmp_path / "elsewhere" / "config.json")
