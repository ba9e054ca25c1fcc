"""Trainers' names and layouts of tensors, turned into Hugging Face's and back.

A trainer may keep the matrices that share an input in one (`qkv_proj`, `gate_up_proj`), or its matrices transposed.
Nothing is computed: parts are views where the layout permits, and joined copies where it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from zerokl.weight_sync.errors import ManifestError

Arrays = Mapping[str, NDArray[Any]]
QkvOrder = Literal["blocks", "groups"]

_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerLayout:
    """How a trainer's decoder tensors differ from Hugging Face's, whose matrices are [outputs, inputs]."""

    num_heads: int
    num_kv_heads: int
    fused_qkv: str | None = None
    """Name of the fused module beside `o_proj`, such as "qkv_proj"; None: q_proj, k_proj and v_proj."""
    qkv_order: QkvOrder = "blocks"
    """"blocks": all queries, all keys, all values; "groups": for each key head its queries, its key, its value."""
    fused_gate_up: str | None = None
    """Name of the fused module beside `down_proj`, such as "gate_up_proj"; None: gate_proj and up_proj."""
    up_first: bool = False
    """Whether the up matrix comes first in it."""
    transposed: bool = False
    """Whether matrices are [inputs, outputs], as `paddle.nn.Linear` keeps them."""
    prefix: tuple[str, str] = ("", "")
    """Start of the names there and here."""

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")


def paddleformers_layout(
    num_heads: int, num_kv_heads: int, *, fused: bool = True, qkv_order: QkvOrder = "groups"
) -> TrainerLayout:
    """PaddleFormers' decoders: matrices transposed and, if `fused`, qkv_proj and up_gate_proj (gate first).

    Of the fused queries, keys and values Llama and Qwen there have the order "groups", ERNIE has "blocks".
    """
    return TrainerLayout(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        fused_qkv="qkv_proj" if fused else None,
        qkv_order=qkv_order,
        fused_gate_up="up_gate_proj" if fused else None,
        transposed=True,
    )


def to_hugging_face(tensors: Arrays, layout: TrainerLayout) -> dict[str, NDArray[Any]]:
    """The trainer's tensors, named and laid out as Hugging Face's. Raises ManifestError for sizes that do not fit."""
    made: dict[str, NDArray[Any]] = {}
    for name, array in tensors.items():
        name = _renamed(name, *layout.prefix)
        array = _turned(name, array, layout)
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if layout.fused_qkv and last == layout.fused_qkv:
            parts = zip(_QKV, _split_qkv(name, array, layout), strict=True)
        elif layout.fused_gate_up and last == layout.fused_gate_up:
            if len(array) % 2:
                raise ManifestError(f"tensor {name!r}: {len(array)} rows are not two halves")
            names = ("up_proj", "gate_proj") if layout.up_first else ("gate_proj", "up_proj")
            parts = zip(names, np.split(array, 2), strict=True)
        else:
            made[name] = array
            continue
        made.update({f"{parent}.{part}.{kind}": values for part, values in parts})
    return made


def from_hugging_face(tensors: Arrays, layout: TrainerLayout) -> dict[str, NDArray[Any]]:
    """Inverse of `to_hugging_face`. Raises ManifestError when a part of a fused tensor is missing."""
    groups: dict[str, tuple[str, ...]] = {}
    if layout.fused_qkv:
        groups[layout.fused_qkv] = _QKV
    if layout.fused_gate_up:
        groups[layout.fused_gate_up] = ("up_proj", "gate_proj") if layout.up_first else ("gate_proj", "up_proj")
    fused_of = {part: fused for fused, parts in groups.items() for part in parts}
    made: dict[str, NDArray[Any]] = {}
    for name, array in tensors.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused_of:
            fused = fused_of[last]
            names = [f"{parent}.{part}.{kind}" for part in groups[fused]]
            if missing := [part for part in names if part not in tensors]:
                raise ManifestError(f"tensor {missing[0]!r} is missing: {fused} is made of {', '.join(groups[fused])}")
            name = f"{parent}.{fused}.{kind}"
            if name in made:
                continue
            parts = [tensors[part] for part in names]
            array = _join_qkv(parts, layout) if fused == layout.fused_qkv else np.concatenate(parts)
        made[name] = array
    return {_renamed(name, *reversed(layout.prefix)): _turned(name, array, layout) for name, array in made.items()}


def _renamed(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name.startswith(old) else name


def _turned(name: str, array: NDArray[Any], layout: TrainerLayout) -> NDArray[Any]:
    matrix = layout.transposed and array.ndim == 2 and not name.endswith("embed_tokens.weight")
    return array.T if matrix else array


def _split_qkv(name: str, array: NDArray[Any], layout: TrainerLayout) -> list[NDArray[Any]]:
    heads, kv_heads = layout.num_heads, layout.num_kv_heads
    size, rest = divmod(len(array), heads + 2 * kv_heads)
    if rest:
        raise ManifestError(f"tensor {name!r}: {len(array)} rows are not {heads} + 2 x {kv_heads} heads")
    if layout.qkv_order == "blocks":
        return np.split(array, [heads * size, (heads + kv_heads) * size])
    per_group = heads // kv_heads
    groups = array.reshape(kv_heads, (per_group + 2) * size, *array.shape[1:])
    parts = np.split(groups, [per_group * size, (per_group + 1) * size], axis=1)
    return [part.reshape(-1, *array.shape[1:]) for part in parts]


def _join_qkv(parts: list[NDArray[Any]], layout: TrainerLayout) -> NDArray[Any]:
    if layout.qkv_order == "blocks":
        return np.concatenate(parts)
    groups = [part.reshape(layout.num_kv_heads, -1, *part.shape[1:]) for part in parts]
    return np.concatenate(groups, axis=1).reshape(-1, *parts[0].shape[1:])
