"""EngineConfig and SchedulerConfig: ranges, unknown options, completion from the model."""

import inspect
from pathlib import Path

import pytest

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.scheduler_config import SchedulerConfig


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
        ("expert_parallel_size", 0, ">= 1"),
        ("data_parallel_size", True, ">= 1"),
        ("batched_token_timeout", -0.1, "seconds >= 0"),
        ("batched_token_timeout", "0.1", "seconds >= 0"),
        ("rank_roles", ("mixed", "mixed"), "each of the 1 ranks"),
        ("rank_roles", ["decode"], "can prefill"),
        ("rank_roles", 5, "a sequence of"),
        ("rank_roles", {"mixed"}, "a sequence of"),  # in no order
        ("rank_roles", {"mixed": 1}, "a sequence of"),
        ("expert_parallel_size", 10**30, "<= 32768"),
        ("data_parallel_size", 1 << 16, "<= 32768"),
        ("num_redundant_experts", -1, ">= 0"),
        ("expert_rebalance_interval", 0, ">= 1"),
        ("return_routing", "some", "output"),
        ("gpus", 0, "a sequence of numbers of GPUs"),
        ("gpus", (0,), "None on device 'cpu'"),
    ],
)
def test_a_bad_value_is_refused_by_name_value_and_bound(field, value, bound):
    with pytest.raises(ValueError, match=field) as raised:
        EngineConfig.from_dict({"model": "folder", field: value})
    assert bound in str(raised.value) and repr(value) in str(raised.value)


def test_ranks_are_on_the_gpus_that_are_named():
    assert EngineConfig(model="folder", device="gpu").gpu_of(0) == 0
    named = EngineConfig.from_dict({"model": "folder", "device": "gpu", "gpus": [3, 1], "data_parallel_size": 2})
    assert named.gpus == (3, 1) and [named.gpu_of(rank) for rank in range(2)] == [3, 1]
    assert EngineConfig(model="folder", device="gpu", data_parallel_size=2).gpu_of(1) == 1
    shared = {"device": "gpu", "gpus": [0, 0], "data_parallel_size": 2}
    with pytest.raises(ValueError, match=r"gpus must differ, unless num_blocks or kv_cache_bytes .* got \(0, 0\)"):
        EngineConfig(model="folder", **shared)
    for pool in ({"num_blocks": 8}, {"kv_cache_bytes": 1 << 20}):
        assert EngineConfig(model="folder", **shared, **pool).gpus == (0, 0)
    for gpus, message in (
        ([-1], r"gpus\[0\] must be an integer >= 0, got -1"),
        ([1.0], r"gpus\[0\] must be an integer >= 0, got 1.0"),
        ([], r"gpus must name the GPU of each of the 1 ranks, got \(\)"),
        ([0, 1], r"gpus must name the GPU of each of the 1 ranks, got \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            EngineConfig(model="folder", device="gpu", gpus=gpus)


def test_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"no option 'blocksize' \(did you mean 'block_size'\?\); known options: .*num_threads"
    ):
        EngineConfig.from_dict({"model": "folder", "blocksize": 16})


def test_a_missing_model_is_refused():
    with pytest.raises(ValueError, match=r"EngineConfig: .*'model'"):
        EngineConfig.from_dict({})


def test_every_field_is_documented():
    for cls in (EngineConfig, SchedulerConfig):
        source = inspect.getsource(cls)
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


def test_several_ranks_are_processes_that_share_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(7)))
    model = {"max_position_embeddings": 64, "kv_bytes_per_token": 4}
    alone = EngineConfig(model="folder").resolve(**model)
    assert alone.rank_heartbeat_timeout == 1.5
    gpu = EngineConfig(model="folder", device="gpu", num_blocks=8)
    assert not gpu.has_processes and gpu.resolve(**model).rank_heartbeat_timeout == 10.0
    assert (alone.num_ranks, alone.worker, alone.num_threads, alone.rank_roles) == (1, "inprocess", None, ("mixed",))
    spread = EngineConfig(model="folder", data_parallel_size=3).resolve(**model)
    assert (spread.num_ranks, spread.worker, spread.num_threads) == (3, "process", 2)
    assert spread.rank_roles == ("mixed",) * 3
    assert EngineConfig(model="folder", data_parallel_size=9).resolve(**model).num_threads == 1
    with pytest.raises(ValueError, match="worker must be 'process' or None with 2 ranks, got 'inprocess'"):
        EngineConfig(model="folder", data_parallel_size=2, worker="inprocess")


@pytest.mark.parametrize(
    ("options", "num_experts", "message"),
    [
        ({"expert_parallel_size": 2}, None, "expert_parallel_size must be 1 for a model without mixtures .*, got 2"),
        ({"expert_parallel_size": 3}, 8, "expert_parallel_size must divide the model's 8 experts, got 3"),
        (
            {"expert_parallel_size": 2, "num_redundant_experts": 1},
            8,
            "expert_parallel_size must divide the model's 8 experts and 1 redundant ones, got 2",
        ),
        ({"num_redundant_experts": 2}, 8, "num_redundant_experts must be <= 0, .*, got 2"),
        ({"expert_parallel_size": 2, "num_redundant_experts": 10}, 8, "num_redundant_experts must be <= 8, .*, got 10"),
    ],
)
def test_experts_must_spread_evenly(options, num_experts, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(model="folder", **options).resolve(
            max_position_embeddings=64, kv_bytes_per_token=4, num_experts=num_experts
        )


def test_the_window_is_the_options_else_the_environments_else_a_tenth_of_a_second(monkeypatch):
    def timeout(**options):
        config = EngineConfig(model="folder", **options)
        return config.resolve(max_position_embeddings=64, kv_bytes_per_token=4).batched_token_timeout

    monkeypatch.delenv("ZEROKL_EP_BATCHED_TOKEN_TIMEOUT", raising=False)
    assert timeout() == 0.1 and timeout(batched_token_timeout=0) == 0.0
    monkeypatch.setenv("ZEROKL_EP_BATCHED_TOKEN_TIMEOUT", "0.25")
    assert timeout() == 0.25 and timeout(batched_token_timeout=3) == 3.0
    for bad in ("soon", "-1", "nan"):
        monkeypatch.setenv("ZEROKL_EP_BATCHED_TOKEN_TIMEOUT", bad)
        with pytest.raises(ValueError, match=r"ZEROKL_EP_BATCHED_TOKEN_TIMEOUT must be .* >= 0, got"):
            timeout()
