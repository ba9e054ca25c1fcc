"""Part `ranks` of run_all.py: an engine in the process, one in a process of its own, and two ranks on two GPUs.

All read the same random weights from a folder in memory, and get as many sequences for each rank. One host plans for
all of them, beside the GPUs: `awaited_share` is the part of a step in which it waits for them, and near 0 it is they
that wait for it. Tokens, logprobs and entropies of a smaller load must be those of the first engine, bit for bit.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from load_shape import OUTPUT, SAMPLES
from numpy.typing import NDArray
from refusal import PartRefusedError

Row = dict[str, Any]

FORMS: dict[str, Row] = {
    "in process": {"worker": "inprocess"},
    "a process": {"worker": "process"},
    "2 processes, 2 GPUs": {"data_parallel_size": 2},
}
IN_MEMORY, ROOM = Path("/dev/shm"), 4 << 30
"""Where the weights are written if that many bytes are free."""
CHECKED = 16, 64
"""Prompts and new tokens of the load whose bits are compared."""


def rank_rows(folder: Path, model: str, sizes: tuple[int, ...], repeats: int) -> list[Row]:
    """Rows of each form that this machine has GPUs for; `sizes` are sequences for each rank.

    Raises PartRefusedError where it has none.
    """
    count = _num_gpus()
    has_room = IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > ROOM
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if has_room else folder) as scratch:
        weights = write_model(Path(scratch), model)
        rows: list[Row] = []
        bits: list[NDArray[Any]] = []
        for form, options in FORMS.items():
            ranks = options.get("data_parallel_size", 1)
            if ranks > count:
                print(f"{form}: not run, this machine has {count} GPU", flush=True)
                continue
            rows += _rows_of(weights, form, ranks, options, sizes, repeats, bits)
    return with_scaling(rows)


def with_scaling(rows: Sequence[Row]) -> list[Row]:
    """Rows with the tok/s of each over that of one rank in a process, and in this one, at as many sequences a rank."""

    def best(form: str, row: Row) -> float | None:
        found = [other["tok_s"] for other in rows if other["form"] == form and other["per_rank"] == row["per_rank"]]
        return max(found) if found else None

    return [
        row
        | {
            f"over_{name}": round(row["tok_s"] / base, 3)
            for name, form in (("in_process", "in process"), ("a_process", "a process"))
            if (base := best(form, row)) is not None
        }
        for row in rows
    ]


def write_model(folder: Path, name: str) -> Path:
    """A folder with random bfloat16 weights: matrices N(0, 0.02), embeddings N(0, 0.05), vectors 1."""
    from models import model_folder
    from zerokl.rollout.models.config import ModelConfig
    from zerokl.rollout.models.layout import expected_tensors

    shapes = expected_tensors(ModelConfig.from_json(str(model_folder(name, folder))))
    entries, end = {}, 0
    for tensor, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        entries[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for part in _values(shapes):
            stream.write(part.data)
    return folder


def _values(shapes: dict[str, tuple[int, ...]]) -> Iterator[NDArray[np.uint16]]:
    random = np.random.default_rng(1)
    normal = random.standard_normal(1 << 16).astype(np.float32)
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        if len(shape) == 1:
            yield np.full(size, 0x3F80, np.uint16)
            continue
        scale = np.float32(0.05 if "embed" in name or "lm_head" in name else 0.02)
        table = ((normal * scale).view(np.uint32) >> 16).astype(np.uint16)
        yield table[random.integers(0, 1 << 16, size, np.uint16)]


def _rows_of(
    weights: Path,
    form: str,
    ranks: int,
    options: Row,
    sizes: tuple[int, ...],
    repeats: int,
    bits: list[NDArray[Any]],
) -> Iterator[Row]:
    """Rows of one form; the first one's results of the smaller load become `bits`."""
    from workload import load, make_engine

    begun = time.perf_counter()
    with make_engine(weights, make_worker=None, **options) as engine:
        load(engine, SAMPLES, 1, 0)
        first = round(time.perf_counter() - begun, 1)
        made = _bits_of(engine)
        differ = num_differing(bits or made, made)
        bits[:] = bits or made
        for size in sizes:
            load(engine, size * ranks, 32, 1000 + size)
            for repeat in range(repeats):
                before = engine.metrics()
                seconds = load(engine, size * ranks, OUTPUT, 2000 + size + repeat)
                after = engine.metrics()
                spent = {name: after[f"{name}_seconds"] - before[f"{name}_seconds"] for name in ("step", "worker")}
                row = {
                    "form": form, "ranks": ranks, "per_rank": size, "sequences": size * ranks,
                    "tok_s": round(size * ranks * OUTPUT / seconds), "first_token_s": first,
                    "steps": int(after["steps"] - before["steps"]),
                    "awaited_share": round(spent["worker"] / max(spent["step"], 1e-9), 3),
                    "values": sum(array.size for array in made), "differ": differ, "passed": differ == 0,
                }  # fmt: skip
                print(json.dumps(row), flush=True)
                yield row


def _bits_of(engine: Any) -> list[NDArray[Any]]:
    from workload import prompts

    from zerokl.rollout.sampling_params import SamplingParams

    count, tokens = CHECKED
    asked = prompts(count, engine.model_config.vocab_size, 77)
    rollouts = engine.generate(asked, SamplingParams(n=SAMPLES, max_tokens=tokens, ignore_eos=True, seed=78))
    return [values for one in rollouts for values in (one.token_ids, one.logprobs, one.policy_logprobs, one.entropy)]


def num_differing(one: Sequence[NDArray[Any]], other: Sequence[NDArray[Any]]) -> int:
    """Values that differ, arrays of the same shapes."""
    return sum(int((a != b).sum()) for a, b in zip(one, other, strict=True))


def _num_gpus() -> int:
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise PartRefusedError("the package cuda-bindings is not installed") from None
    error, count = runtime.cudaGetDeviceCount()
    if int(error) != 0 or count < 1:
        raise PartRefusedError(f"this machine has no GPU that CUDA can use ({error.name})")
    return int(count)
