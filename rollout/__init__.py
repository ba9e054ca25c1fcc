"""The engine's room: prompts in, rollouts with exact logprobs out.

Names load on first use: importing this room, or one of its pure modules, loads no kernels.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerokl.rollout.client import RolloutClient
    from zerokl.rollout.config import EngineConfig
    from zerokl.rollout.engine import RolloutEngine
    from zerokl.rollout.errors import (
        AbortedError,
        EngineAsleepError,
        EngineClosedError,
        EngineFailedError,
        HookError,
        PauseLiftedError,
        SessionBusyError,
        SessionClosedError,
        StaleRequestError,
        WorkerError,
    )
    from zerokl.rollout.expert_balance import ExpertLoad
    from zerokl.rollout.hooks import UpdateEvent
    from zerokl.rollout.outputs import Rollout
    from zerokl.rollout.routing import RolloutRouting, replay_arrays
    from zerokl.rollout.sampling_params import SamplingParams
    from zerokl.rollout.session import Session
    from zerokl.rollout.text import Tokenizer

_MODULES = {
    "AbortedError": "errors",
    "EngineAsleepError": "errors",
    "EngineClosedError": "errors",
    "EngineConfig": "config",
    "EngineFailedError": "errors",
    "ExpertLoad": "expert_balance",
    "HookError": "errors",
    "PauseLiftedError": "errors",
    "Rollout": "outputs",
    "RolloutClient": "client",
    "RolloutEngine": "engine",
    "RolloutRouting": "routing",
    "SamplingParams": "sampling_params",
    "Session": "session",
    "SessionBusyError": "errors",
    "SessionClosedError": "errors",
    "StaleRequestError": "errors",
    "Tokenizer": "text",
    "UpdateEvent": "hooks",
    "WorkerError": "errors",
    "replay_arrays": "routing",
}

__all__ = [
    "AbortedError",
    "EngineAsleepError",
    "EngineClosedError",
    "EngineConfig",
    "EngineFailedError",
    "ExpertLoad",
    "HookError",
    "PauseLiftedError",
    "Rollout",
    "RolloutClient",
    "RolloutEngine",
    "RolloutRouting",
    "SamplingParams",
    "Session",
    "SessionBusyError",
    "SessionClosedError",
    "StaleRequestError",
    "Tokenizer",
    "UpdateEvent",
    "WorkerError",
    "replay_arrays",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
