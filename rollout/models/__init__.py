"""Decoder models: configuration, tensor layout, strict loading and the one forward definition over the op table.

Names are resolved on first use, so that importing one module here does not load the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "DecoderSpec": "decoder",
    "ModelConfig": "config",
    "MoeConfig": "moe_config",
    "RopeConfig": "config",
    "attention_spec": "decoder",
    "build_params": "decoder_params",
    "check_tensors": "loader",
    "expected_tensors": "layout",
    "forward": "decoder",
    "load_tensors": "loader",
    "open_tensors": "loader",
    "random_tensors": "synthetic",
    "rope_table": "rope",
    "save_pretrained": "saver",
    "tiny_config": "synthetic",
    "tiny_moe_config": "synthetic",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
