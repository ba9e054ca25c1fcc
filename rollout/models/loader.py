"""Strict loading of a Hugging Face folder: every tensor that the layout lists, in its shape, and no other.

Tensors are read one at a time on access, so that packing a model never holds a second float32 copy of all of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig
from .layout import EMBED, LM_HEAD, expected_tensors
from .registry import find_architecture
from .safetensors_file import StoredTensor, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Derived from the configuration; early Llama checkpoints hold it, transformers ignores it likewise.
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"
_MAX_NAMES = 8


@runtime_checkable
class HasShapes(Protocol):
    """A mapping of tensors that are made or read on access, and whose shapes are known before."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, without reading data."""
        ...


class TensorFolder(Mapping[str, NDArray[Any]]):
    """Tensors of a checked folder by name; each access reads from disk and gives a fresh float32 array.

    With `patterns`, bfloat16 ones are given as uint16 patterns.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], *, patterns: bool = False) -> None:
        self._tensors = dict(tensors)
        self._patterns = patterns

    def __getitem__(self, name: str) -> NDArray[Any]:
        tensor = self._tensors[name]
        return tensor.read_stored() if self._patterns and tensor.dtype == "BF16" else tensor.read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, without reading data."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}


def open_tensors(folder: str | Path, config: ModelConfig, *, patterns: bool = False) -> TensorFolder:
    """Check a folder against the layout and return its tensors, to be read on access; `patterns` as `TensorFolder`.

    The folder holds model.safetensors, or the shards that model.safetensors.index.json names. Raises ValueError naming
    the file for a broken file, and naming the tensors where some are missing, extra or misshapen. A tied
    `lm_head.weight` may be there if it equals the embedding; it is left out of the result.
    """
    folder = Path(folder)
    index = folder / INDEX_FILE
    stored = _read_shards(index) if index.is_file() else read_header(folder / SINGLE_FILE)
    unused = find_architecture(config.architecture, str(folder)).ignored_tensors
    stored = {
        name: tensor
        for name, tensor in stored.items()
        if not name.endswith(_DERIVED_SUFFIX) and not name.startswith(unused)
    }
    tensors = TensorFolder(stored, patterns=patterns)
    check_shapes(tensors.shapes(), config, str(folder))
    if config.tie_word_embeddings and LM_HEAD in tensors:
        _check_tied(tensors, str(folder))
        del stored[LM_HEAD]
        tensors = TensorFolder(stored, patterns=patterns)
    return tensors


def load_tensors(folder: str | Path, config: ModelConfig) -> dict[str, NDArray[np.float32]]:
    """All tensors of a folder in memory; otherwise as `open_tensors`."""
    return dict(open_tensors(folder, config))


def check_tensors(tensors: Mapping[str, Any], config: ModelConfig, source: str = "tensors") -> None:
    """Raise ValueError naming what is missing, extra, misshapen, of another dtype, or a tied head unlike its embedding.

    `tensors` are NumPy arrays of float32, or Paddle tensors; `source` starts the message.
    """
    if isinstance(tensors, TensorFolder):
        check_shapes(tensors.shapes(), config, source)
        return
    if isinstance(tensors, HasShapes):
        check_shapes(tensors.shapes(), config, source)
        if config.tie_word_embeddings and LM_HEAD in tensors:
            _check_tied(tensors, source)
        return
    check_shapes({name: tuple(array.shape) for name, array in tensors.items()}, config, source)
    for name, array in tensors.items():
        if str(array.dtype).rpartition(".")[2] != "float32":
            raise ValueError(f"{source}: {name} has dtype {array.dtype}; must be float32")
    if config.tie_word_embeddings and LM_HEAD in tensors:
        _check_tied(tensors, source)


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, source: str) -> None:
    """The part of `check_tensors` that needs no data."""
    expected = expected_tensors(config)
    allowed = dict(expected)
    if config.tie_word_embeddings:
        allowed[LM_HEAD] = expected[EMBED]
    problems = []
    if missing := [name for name in expected if name not in shapes]:
        problems.append(f"missing: {_some(missing)}")
    if extra := [name for name in shapes if name not in allowed]:
        problems.append(f"not in {config.architecture}: {_some(extra)}")
    misshapen = [
        f"{name} {list(shape)} (must be {list(allowed[name])})"
        for name, shape in shapes.items()
        if name in allowed and shape != allowed[name]
    ]
    if misshapen:
        problems.append(f"wrong shape: {_some(misshapen)}")
    if problems:
        raise ValueError(f"{source}: tensors do not fit the configuration; " + "; ".join(problems))


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{index}: not valid JSON: {error}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(_is_file_name(value) for value in weight_map.values()):
        raise ValueError(f"{index}: weight_map must map tensor names to file names in the same folder")
    stored: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        for name, tensor in read_header(index.with_name(shard)).items():
            if weight_map.get(name) != shard:
                raise ValueError(
                    f"{index.with_name(shard)}: holds {name!r}, which the index puts in {weight_map.get(name)}"
                )
            stored[name] = tensor
    if absent := [name for name in weight_map if name not in stored]:
        raise ValueError(f"{index}: the shards lack tensors that it lists: {_some(absent)}")
    return stored


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value == Path(value).name and value not in ("", "..")


def _check_tied(tensors: Mapping[str, NDArray[Any]], source: str) -> None:
    if not np.array_equal(tensors[LM_HEAD], tensors[EMBED]):
        raise ValueError(f"{source}: tie_word_embeddings is true, but {LM_HEAD} differs from {EMBED}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
