"""Strict loading: what is read, bit for bit, and what is refused, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.layout import EMBED, LM_HEAD, expected_tensors, num_parameters
from zerokl.rollout.models.loader import check_tensors, load_tensors, open_tensors
from zerokl.rollout.models.safetensors_file import read_header
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_config

CONTENT = tiny_config(vocab_size=40, hidden_size=16, intermediate_size=24, head_dim=4)
CONFIG = ModelConfig.from_json(CONTENT)
TIED = ModelConfig.from_json({**CONTENT, "tie_word_embeddings": True})


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == np.float32, name
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.parametrize("max_shard_bytes", [None, 4000, 1])
def test_round_trip_single_and_sharded(tmp_path: Path, max_shard_bytes: int | None) -> None:
    tensors = random_tensors(CONFIG, seed=1)
    save_pretrained(tmp_path, CONTENT, random_tensors(CONFIG, seed=2), max_shard_bytes=100)  # is replaced
    save_pretrained(tmp_path, CONTENT, tensors, max_shard_bytes=max_shard_bytes)
    assert ModelConfig.from_json(tmp_path) == CONFIG
    assert (tmp_path / "model.safetensors").exists() == (max_shard_bytes is None)
    assert_same(load_tensors(tmp_path, CONFIG), tensors)
    assert sum(array.size for array in tensors.values()) == num_parameters(CONFIG)


def write_raw(file: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """A safetensors file with any dtype, bfloat16 included."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_half_precisions_are_widened_exactly(tmp_path: Path) -> None:
    patterns = np.arange(65536, dtype="<u2")
    file = tmp_path / "model.safetensors"
    write_raw(file, {"b": ("BF16", (256, 256), patterns.tobytes()), "h": ("F16", (65536,), patterns.tobytes())})
    header = read_header(file)
    bfloat16 = header["b"].read()
    assert bfloat16.shape == (256, 256) and bfloat16.dtype == np.float32
    np.testing.assert_array_equal(bfloat16.reshape(-1).view(np.uint32), patterns.astype(np.uint32) << 16)
    np.testing.assert_array_equal(header["h"].read(), patterns.view(np.float16).astype(np.float32))


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
    tensors["model.norm.weight"] = np.zeros(17, np.float32)
    save_pretrained(tmp_path, CONTENT, tensors)
    for attempt in (lambda: load_tensors(tmp_path, CONFIG), lambda: check_tensors(tensors, CONFIG)):
        with pytest.raises(ValueError) as error:
            attempt()
        assert "missing: model.layers.1.mlp.up_proj.weight;" in str(error.value)
        assert "not in LlamaForCausalLM: model.layers.2.mlp.up_proj.weight;" in str(error.value)
        assert "wrong shape: model.norm.weight [17] (must be [16])" in str(error.value)


def test_families_expect_their_own_tensors() -> None:
    expected = {
        "LlamaForCausalLM": set(),
        "Qwen2ForCausalLM": {"q_proj.bias", "k_proj.bias", "v_proj.bias"},
        "Qwen3ForCausalLM": {"q_norm.weight", "k_norm.weight"},
        "Ernie4_5ForCausalLM": set(),
    }
    llama = set(expected_tensors(CONFIG))
    for name, extra in expected.items():
        config = ModelConfig.from_json({**CONTENT, "architectures": [name]})
        more = {f"model.layers.{i}.self_attn.{tensor}" for i in range(2) for tensor in extra}
        assert set(expected_tensors(config)) - llama == more
    biased = ModelConfig.from_json({**CONTENT, "attention_bias": True})
    assert expected_tensors(biased)["model.layers.0.self_attn.o_proj.bias"] == (16,)


def test_tied_head_may_be_absent_or_equal_but_not_different(tmp_path: Path) -> None:
    tensors = random_tensors(TIED)
    assert LM_HEAD not in tensors
    save_pretrained(tmp_path, CONTENT, tensors)
    assert_same(load_tensors(tmp_path, TIED), tensors)
    save_pretrained(tmp_path, CONTENT, {**tensors, LM_HEAD: tensors[EMBED]})
    assert_same(load_tensors(tmp_path, TIED), tensors)
    other = {**tensors, LM_HEAD: tensors[EMBED] + 1}
    save_pretrained(tmp_path, CONTENT, other)
    for attempt in (lambda: load_tensors(tmp_path, TIED), lambda: check_tensors(other, TIED)):
        with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            attempt()
    with pytest.raises(ValueError, match=r"wrong shape: lm_head\.weight"):
        check_tensors({**tensors, LM_HEAD: np.zeros((2, 16), np.float32)}, TIED)


def test_derived_rotary_buffers_of_early_checkpoints_are_no_tensors(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_pretrained(tmp_path, CONTENT, {**tensors, name: np.zeros(2, np.float32)})
    assert_same(load_tensors(tmp_path, CONFIG), tensors)


def test_wrong_dtype_is_named(tmp_path: Path) -> None:
    tensors: dict[str, Any] = random_tensors(CONFIG)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
    with pytest.raises(ValueError, match=r"model.norm.weight has dtype float64; must be float32"):
        check_tensors(tensors, CONFIG)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight has dtype F64"):
        load_tensors(tmp_path, CONFIG)


def test_reading_is_on_access_and_fresh(tmp_path: Path) -> None:
    save_pretrained(tmp_path, CONTENT, random_tensors(CONFIG))
    tensors = open_tensors(tmp_path, CONFIG)
    assert len(tensors) == len(expected_tensors(CONFIG))
    first = tensors[EMBED]
    first[:] = 0
    assert tensors[EMBED].any()


def broken_single_files(good: bytes) -> dict[str, bytes]:
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"][1] += 4
    text = json.dumps(header).encode()
    header["model.norm.weight"]["dtype"] = ["F32"]
    listed = json.dumps(header).encode()
    header = json.loads(good[8 : 8 + length])
    layers = [f"model.layers.{index}.mlp.down_proj.weight" for index in range(2)]
    header[layers[1]]["data_offsets"] = header[layers[0]]["data_offsets"]
    shared = json.dumps(header).encode()
    return {
        "empty": b"",
        "short": good[:5],
        "huge header": (2**63).to_bytes(8, "little") + good[8:],
        "cut": good[:-4],
        "longer": good + b"1234",
        "not json": good[:8] + b"#" * length + good[8 + length :],
        "wrong offsets": len(text).to_bytes(8, "little") + text + good[8 + length :],
        "wrong dtype": len(listed).to_bytes(8, "little") + listed + good[8 + length :],
        "shared bytes": len(shared).to_bytes(8, "little") + shared + good[8 + length :],
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1000\n",
    }


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "short",
        "huge header",
        "cut",
        "longer",
        "not json",
        "wrong offsets",
        "wrong dtype",
        "shared bytes",
        "pointer",
    ],
)
def test_broken_files_are_named(tmp_path: Path, kind: str) -> None:
    save_pretrained(tmp_path, CONTENT, random_tensors(CONFIG))
    file = tmp_path / "model.safetensors"
    file.write_bytes(broken_single_files(file.read_bytes())[kind])
    with pytest.raises(ValueError, match=f"{file}: "):
        load_tensors(tmp_path, CONFIG)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read: Is a directory"):
        load_tensors(tmp_path, CONFIG)


def test_broken_indices_are_named(tmp_path: Path) -> None:
    save_pretrained(tmp_path, CONTENT, random_tensors(CONFIG), max_shard_bytes=4000)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first_shard = good["weight_map"][EMBED]
    cases = [
        ("{", f"{index}: not valid JSON"),
        ("{}", f"{index}: weight_map must map"),
        ({**good["weight_map"], EMBED: "../x.safetensors"}, f"{index}: weight_map must map"),
        ({**good["weight_map"], EMBED: ""}, f"{index}: weight_map must map"),
        ({**good["weight_map"], "extra": "x.safetensors"}, "x.safetensors: no such file"),
        ({**good["weight_map"], "extra": first_shard}, f"{index}: the shards lack tensors that it lists: extra"),
        (
            {**good["weight_map"], "model.norm.weight": first_shard},
            "holds 'model.norm.weight', which the index puts in",
        ),
    ]
    for content, message in cases:
        index.write_text(content if isinstance(content, str) else json.dumps({"weight_map": content}))
        with pytest.raises(ValueError, match=message):
            load_tensors(tmp_path, CONFIG)
    index.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
        load_tensors(tmp_path, CONFIG)
