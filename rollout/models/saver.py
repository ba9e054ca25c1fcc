"""Writing a Hugging Face style folder: config.json and float32 safetensors, sharded if asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from .loader import INDEX_FILE, SINGLE_FILE


def save_pretrained(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, NDArray[np.float32]],
    *,
    max_shard_bytes: int | None = None,
) -> Path:
    """Write `config` (the content of config.json) and `tensors` under their names; returns the folder.

    The folder is made if need be; model files of an earlier call are replaced. With `max_shard_bytes` the tensors are
    spread over shards of at most that size (a larger tensor gets a shard of its own) beside an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (folder / INDEX_FILE, *folder.glob("model*.safetensors")):
        stale.unlink(missing_ok=True)
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write(folder / SINGLE_FILE, tensors, shards[0])
    else:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write(folder / file, tensors, names)
            weight_map.update(dict.fromkeys(names, file))
        total = sum(array.nbytes for array in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    return folder


def _split(tensors: Mapping[str, NDArray[Any]], max_shard_bytes: int | None) -> list[list[str]]:
    if max_shard_bytes is None:
        return [list(tensors)]
    shards: list[list[str]] = [[]]
    filled = 0
    for name, array in tensors.items():
        if shards[-1] and filled + array.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += array.nbytes
    return shards


def _write(file: Path, tensors: Mapping[str, NDArray[np.float32]], names: list[str]) -> None:
    save_file({name: np.ascontiguousarray(tensors[name], np.float32) for name in names}, file, {"format": "pt"})
