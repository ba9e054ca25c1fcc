"""Options of an engine: immutable, checked when made."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from zerokl.rollout.scheduler_config import Role, check_roles
from zerokl.rollout.validation import UINT64_LIMIT, build_options, check_bool, check_float, check_int

WorkerKind = Literal["inprocess", "process"]
ReturnRouting = Literal["none", "output", "all"]

TIMEOUT_VARIABLE = "ZEROKL_EP_BATCHED_TOKEN_TIMEOUT"
"""Environment variable with `EngineConfig.batched_token_timeout` where that is None."""
DEFAULT_BATCHED_TOKEN_TIMEOUT = 0.1
"""Seconds."""

MAX_RANKS = 1 << 15
"""Results hold the number of their rank as int16."""

MIN_HEARTBEAT_TIMEOUT = 0.5
"""Seconds: signs of life come every 0.2, and not always on time."""
HEARTBEAT_TIMEOUT, GPU_HEARTBEAT_TIMEOUT = 1.5, 10.0
"""Seconds, where `EngineConfig.rank_heartbeat_timeout` is None. Libraries of a GPU that are loaded, and a first look at
it, hold the interpreter for seconds."""

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of a `RolloutEngine`. A bad value raises ValueError naming field, value and bound."""

    model: str
    """Folder with config.json and safetensors files in Hugging Face layout."""
    tokenizer: str | None = None
    """Path of tokenizer.json or of the folder that holds it. None: the model folder's, if there is one."""
    max_model_len: int | None = None
    """Prompt and output tokens of a request at most. None: the model's max_position_embeddings."""
    block_size: int = 16
    """Tokens per KV block: a multiple of 8 in [8, 128]. Changes no output bit."""
    num_blocks: int | None = None
    """KV blocks in the pool. None: as many as fit kv_cache_bytes."""
    kv_cache_bytes: int | None = None
    """Bytes for the KV pool where num_blocks is None. None: 1 GiB on the CPU; on a GPU what `gpu_memory_fraction`
    leaves beside weights and steps."""
    max_num_seqs: int = 128
    """Requests that run at the same time at most."""
    max_num_batched_tokens: int = 2048
    """Tokens computed per step at most, a hard cap; a longer prompt is computed in chunks. Changes no output bit."""
    enable_prefix_caching: bool = True
    """Reuse KV blocks between prompts with equal beginnings. The n samples of a prompt share its blocks either way."""
    seed: int = 0
    """In [0, 2^64): seeds of requests without their own are derived from it."""
    num_threads: int | None = None
    """Threads of the CPU kernels, per rank. None: the cores this process may use, divided by the ranks."""
    worker: WorkerKind | None = None
    """"inprocess" runs the model in the caller's process, "process" in a child process for each rank. None: in-process
    for one rank, processes for several, which must be."""
    device: str = "cpu"
    """Device of the op table, as `zerokl.kernels.dispatch.get_ops` takes it."""
    dtype: str | None = None
    """Type of weights, keys and values on the device. None: "float32" on the CPU, "bfloat16" on a GPU."""
    gpus: Sequence[int] | None = None
    """Number of the GPU of each rank, as CUDA counts those that the process sees. None: 0, 1, and so on. One process
    computes on one GPU: an engine in the caller's process takes its GPU for all that runs there. Ranks may share a GPU
    where num_blocks or kv_cache_bytes says how large the pool of each is."""
    gpu_memory_fraction: float = 0.9
    """Part of a GPU's memory that the engine may use, in (0, 1]. Ranks on several GPUs have pools of one size, as large
    as the GPU with the least room allows."""
    weight_slots: int = 2
    """Sets of weights that a GPU's memory is to hold: the live one, and those that are staged or pinned beside it."""
    record_graphs: bool = True
    """Record the launches of decode steps on a GPU, to make them at once. Changes no output bit."""
    expert_parallel_size: int = 1
    """Ranks that the experts of one model are spread over. It divides the experts, redundant ones included. 1 on GPUs,
    where each rank has all experts."""
    data_parallel_size: int = 1
    """Whole models, each on `expert_parallel_size` ranks. Requests are spread over all ranks, whose KV pools and
    budgets (num_blocks, max_num_seqs, max_num_batched_tokens) are each their own. Changes no output bit, as the other
    options of ranks."""
    batched_token_timeout: float | None = None
    """Seconds >= 0 for which, with several ranks, the first prompt may wait for others to fill the step. None: what the
    environment variable ZEROKL_EP_BATCHED_TOKEN_TIMEOUT says, else 0.1."""
    rank_roles: Sequence[Role] | None = None
    """One per rank: "prefill" ranks compute prompts and hand their KV blocks over to "decode" ranks, "mixed" ones do
    both. None: all mixed, as ranks on GPUs must be. Otherwise some rank must prefill and some rank decode."""
    num_redundant_experts: int = 0
    """Second copies of busy experts in each mixture, over all ranks of a model: at most one copy per rank."""
    expert_rebalance_interval: int | None = None
    """Steps after which experts move between ranks by their load. None: when `rebalance_experts` is called."""
    max_rank_restarts: int = 0
    """Ranks lost in the engine's life that are replaced: a rank is lost when its process ends, is stopped or is stuck.
    Its requests go on from their tokens so far, with the same bits. 0: a lost rank fails the engine. Above 0 the engine
    keeps a copy of each set of weights that came by an update, in shared memory. Of ranks that are processes alone."""
    rank_heartbeat_timeout: float | None = None
    """Seconds without a sign of life, of which there are five a second, after which a rank's process is killed. None:
    1.5 on the CPU, 10 on a GPU."""
    step_timeout_base: float = 60.0
    """A step that takes longer than this and `step_timeout_per_token` allow is stuck; ranks that have not done their
    part are killed. Seconds."""
    step_timeout_per_token: float = 0.1
    """Seconds more for each token of the step, of all ranks together."""
    return_routing: ReturnRouting = "none"
    """Whether a rollout holds the routers' choices: for no token, those of the "output", or "all", the prompt's too.

    A mixture-of-experts model only. Costs 6 bytes per KV slot, mixture and expert of a token in the controller.
    """
    k3_alarm: float | None = 0.0
    """`report_trainer_logprobs` alarms where the mismatch k3_kl_mean is above it; at 0.0 by any token that differs.
    None: never."""

    def __post_init__(self) -> None:
        self._set("model", _path("model", self.model))
        if self.tokenizer is not None:
            self._set("tokenizer", _path("tokenizer", self.tokenizer))
        for name in _COUNTS:
            self._set(name, check_int(name, getattr(self, name), 1))
        for name in ("max_model_len", "num_blocks", "kv_cache_bytes", "num_threads", "expert_rebalance_interval"):
            value = getattr(self, name)
            if value is not None:
                self._set(name, check_int(name, value, 2 if name == "max_model_len" else 1))
        self._set("seed", check_int("seed", self.seed, 0, UINT64_LIMIT - 1))
        self._set("block_size", check_int("block_size", self.block_size, 8, 128))
        if self.block_size % 8:
            raise ValueError(f"block_size must be a multiple of 8 in [8, 128], got {self.block_size}")
        check_bool("enable_prefix_caching", self.enable_prefix_caching)
        if self.worker is not None and self.worker not in get_args(WorkerKind):
            raise ValueError(f"worker must be one of {get_args(WorkerKind)}, got {self.worker!r}")
        if self.return_routing not in get_args(ReturnRouting):
            raise ValueError(f"return_routing must be one of {get_args(ReturnRouting)}, got {self.return_routing!r}")
        if self.k3_alarm is not None:
            self._set("k3_alarm", check_float("k3_alarm", self.k3_alarm, "None or a number >= 0", 0.0))
        if not isinstance(self.device, str) or not self.device:
            raise ValueError(f"device must be the name of a device such as 'cpu', got {self.device!r}")
        self._check_gpu()
        self._check_ranks()
        self._check_supervision()

    def _check_supervision(self) -> None:
        self._set("max_rank_restarts", check_int("max_rank_restarts", self.max_rank_restarts, 0))
        if self.rank_heartbeat_timeout is not None:
            bound = f"seconds >= {MIN_HEARTBEAT_TIMEOUT}"
            timeout = check_float("rank_heartbeat_timeout", self.rank_heartbeat_timeout, bound, MIN_HEARTBEAT_TIMEOUT)
            self._set("rank_heartbeat_timeout", timeout)
        for name in ("step_timeout_base", "step_timeout_per_token"):
            self._set(name, _timeout(name, getattr(self, name)))

    def _check_gpu(self) -> None:
        if self.dtype is not None and (not isinstance(self.dtype, str) or not self.dtype):
            raise ValueError(f"dtype must be None or the name of a type such as 'bfloat16', got {self.dtype!r}")
        check_bool("record_graphs", self.record_graphs)
        fraction = check_float(
            "gpu_memory_fraction", self.gpu_memory_fraction, "a part in (0, 1]", 0.0, 1.0, open_low=True
        )
        self._set("gpu_memory_fraction", fraction)
        if self.device == "gpu" and self.expert_parallel_size > 1:
            raise ValueError(f"expert_parallel_size must be 1 on device 'gpu', got {self.expert_parallel_size}")
        if self.gpus is not None:
            self._set("gpus", self._checked_gpus(self.gpus))

    def _checked_gpus(self, given: Any) -> tuple[int, ...]:
        if not isinstance(given, (list, tuple)):
            raise ValueError(f"gpus must be None or a sequence of numbers of GPUs, got {given!r}")
        gpus = tuple(check_int(f"gpus[{rank}]", number, 0) for rank, number in enumerate(given))
        if self.device != "gpu":
            raise ValueError(f"gpus must be None on device {self.device!r}, got {gpus!r}")
        if len(gpus) != self.num_ranks:
            raise ValueError(f"gpus must name the GPU of each of the {self.num_ranks} ranks, got {gpus!r}")
        if len(set(gpus)) < len(gpus) and self.num_blocks is None and self.kv_cache_bytes is None:
            raise ValueError(f"gpus must differ, unless num_blocks or kv_cache_bytes is given, got {gpus!r}")
        return gpus

    def _check_ranks(self) -> None:
        self._set("num_redundant_experts", check_int("num_redundant_experts", self.num_redundant_experts, 0))
        if self.batched_token_timeout is not None:
            self._set("batched_token_timeout", _timeout("batched_token_timeout", self.batched_token_timeout))
        if self.num_ranks > MAX_RANKS:
            sizes = f"{self.expert_parallel_size} * {self.data_parallel_size}"
            raise ValueError(f"expert_parallel_size * data_parallel_size must be <= {MAX_RANKS}, got {sizes}")
        if self.num_ranks > 1 and self.worker == "inprocess":
            raise ValueError(f"worker must be 'process' or None with {self.num_ranks} ranks, got 'inprocess'")
        if self.rank_roles is not None:
            self._set("rank_roles", check_roles("rank_roles", self.rank_roles))
            if len(self.rank_roles) != self.num_ranks:
                raise ValueError(f"rank_roles must name each of the {self.num_ranks} ranks, got {self.rank_roles!r}")
            if self.device == "gpu" and set(self.rank_roles) != {"mixed"}:
                raise ValueError(f"rank_roles must all be 'mixed' on device 'gpu', got {self.rank_roles!r}")

    @property
    def num_ranks(self) -> int:
        """expert_parallel_size * data_parallel_size."""
        return self.expert_parallel_size * self.data_parallel_size

    @property
    def has_processes(self) -> bool:
        """Whether ranks are processes."""
        return self.worker == "process" or self.num_ranks > 1

    def gpu_of(self, rank: int) -> int:
        """The number of the rank's GPU."""
        return rank if self.gpus is None else self.gpus[rank]

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> EngineConfig:
        """From a mapping of options; an unknown or missing one raises ValueError naming it and the known ones."""
        return build_options(cls, [field.name for field in dataclasses.fields(cls)], options)

    def resolve(
        self, *, max_position_embeddings: int, kv_bytes_per_token: int, num_experts: int | None = None
    ) -> EngineConfig:
        """A config with everything filled in that follows from the model, the ranks and the environment.

        `kv_bytes_per_token` counts keys and values of all layers, `num_experts` the experts of a mixture (None: the
        model has none). Raises ValueError where max_model_len is over the model's positions, the pool would not hold
        one block, the experts cannot be spread over the ranks, or the environment holds a bad value.
        """
        max_model_len = max_position_embeddings if self.max_model_len is None else self.max_model_len
        if max_model_len > max_position_embeddings:
            raise ValueError(
                f"max_model_len must be <= the model's max_position_embeddings ({max_position_embeddings}), "
                f"got {max_model_len}"
            )
        block_bytes = kv_bytes_per_token * self.block_size
        kv_cache_bytes = GIB if self.kv_cache_bytes is None else self.kv_cache_bytes
        num_blocks = kv_cache_bytes // block_bytes if self.num_blocks is None else self.num_blocks
        if num_blocks < 1:
            raise ValueError(
                f"kv_cache_bytes must hold at least one KV block ({block_bytes} bytes), got {kv_cache_bytes}"
            )
        self._check_experts(num_experts)
        return dataclasses.replace(self, max_model_len=max_model_len, num_blocks=num_blocks, **self._of_ranks())

    def _check_experts(self, num_experts: int | None) -> None:
        size, redundant = self.expert_parallel_size, self.num_redundant_experts
        if num_experts is None and size > 1:
            raise ValueError(f"expert_parallel_size must be 1 for a model without mixtures of experts, got {size}")
        most = (num_experts or 0) * (size - 1)
        if redundant > most:
            raise ValueError(f"num_redundant_experts must be <= {most}, a copy per other rank, got {redundant}")
        if num_experts is not None and (num_experts + redundant) % size:
            of = f"{num_experts} experts" + (f" and {redundant} redundant ones" if redundant else "")
            raise ValueError(f"expert_parallel_size must divide the model's {of}, got {size}")

    def _of_ranks(self) -> dict[str, Any]:
        several = self.num_ranks > 1
        num_threads = self.num_threads
        if num_threads is None and several:
            num_threads = max(1, len(os.sched_getaffinity(0)) // self.num_ranks)
        timeout = self.batched_token_timeout
        heartbeat = GPU_HEARTBEAT_TIMEOUT if self.device == "gpu" else HEARTBEAT_TIMEOUT
        return {
            "num_threads": num_threads,
            "worker": "process" if self.has_processes else "inprocess",
            "batched_token_timeout": _timeout_of_environment() if timeout is None else timeout,
            "rank_roles": self.rank_roles or ("mixed",) * self.num_ranks,
            "rank_heartbeat_timeout": self.rank_heartbeat_timeout or heartbeat,
        }


_COUNTS = (
    "weight_slots",
    "max_num_seqs",
    "max_num_batched_tokens",
    "expert_parallel_size",
    "data_parallel_size",
)


def _timeout(name: str, value: Any) -> float:
    return check_float(name, value, "a number of seconds >= 0", 0.0)


def _timeout_of_environment() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return DEFAULT_BATCHED_TOKEN_TIMEOUT
    try:
        value: Any = float(text)
    except ValueError:
        value = text  # refused, as it was written
    return _timeout(TIMEOUT_VARIABLE, value)


def _path(name: str, value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ValueError(f"{name} must be a path, got {value!r}")
    path = os.fspath(value)
    if not isinstance(path, str):
        raise ValueError(f"{name} must be a text path, got {value!r}")
    return path
