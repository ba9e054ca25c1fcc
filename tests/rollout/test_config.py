"""EngineConfig and SchedulerConfig: ranges, unknown options, completion from the model."""

from pathlib import Path

import pytest

from zerokl.rollout.config import EngineConfig, SchedulerConfig


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [
        ("model", "", "path"),
        ("model", 3, "path"),
        ("model", b"bytes", "path"),
        ("tokenizer", 3, "path"),
        ("block_size", 12, "multiple of 8"),
        ("block_size", 0, "[8, 128]"),
        ("block_size", 136, "[8, 128]"),
        ("max_model_len", 1, ">= 2"),
        ("num_blocks", 0, ">= 1"),
        ("kv_cache_bytes", 0, ">= 1"),
        ("max_num_seqs", 0, ">= 1"),
        ("max_num_batched_tokens", 1.5, ">= 1"),
        ("enable_prefix_caching", 1, "True or False"),
        ("seed", -1, "[0, 18446744073709551615]"),
        ("num_threads", 0, ">= 1"),
        ("worker", "thread", "inprocess"),
        ("device", "", "device"),
    ],
)
def test_a_bad_value_is_refused_by_name_value_and_bound(field, value, bound):
    with pytest.raises(ValueError, match=field) as raised:
        EngineConfig.from_dict({"model": "folder", field: value})
    assert bound in str(raised.value) and repr(value) in str(raised.value)


def test_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"no option 'blocksize' \(did you mean 'block_size'\?\); known options: .*num_threads"
    ):
        EngineConfig.from_dict({"model": "folder", "blocksize": 16})


def test_a_missing_model_is_refused():
    with pytest.raises(ValueError, match=r"EngineConfig: .*'model'"):
        EngineConfig.from_dict({})


def test_every_field_is_documented():
    source = Path(__import__("zerokl.rollout.config", fromlist=["x"]).__file__).read_text()
    for cls in (EngineConfig, SchedulerConfig):
        for name in cls.__dataclass_fields__:
            declared = source.index(f"\n    {name}: ")
            assert source[declared:].split("\n")[2].lstrip().startswith('"""'), name


def test_resolve_fills_in_what_the_model_gives():
    config = EngineConfig(model=Path("folder"), block_size=16, kv_cache_bytes=1000)
    assert config.model == "folder"
    resolved = config.resolve(max_position_embeddings=64, kv_bytes_per_token=4)
    assert (resolved.max_model_len, resolved.num_blocks) == (64, 15)
    assert config.num_blocks is None
    kept = EngineConfig(model="folder", max_model_len=32, num_blocks=7).resolve(
        max_position_embeddings=64, kv_bytes_per_token=4
    )
    assert (kept.max_model_len, kept.num_blocks) == (32, 7)


def test_resolve_refuses_what_the_model_cannot_do():
    with pytest.raises(ValueError, match=r"max_model_len must be <= .* \(64\), got 65"):
        EngineConfig(model="folder", max_model_len=65).resolve(max_position_embeddings=64, kv_bytes_per_token=4)
    with pytest.raises(ValueError, match=r"kv_cache_bytes must hold at least one KV block \(64 bytes\), got 63"):
        EngineConfig(model="folder", kv_cache_bytes=63).resolve(max_position_embeddings=64, kv_bytes_per_token=4)


def test_scheduler_config_checks_its_ranges():
    with pytest.raises(ValueError, match="max_overtakes must be an integer >= 1, got 0"):
        SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=1, max_overtakes=0)
