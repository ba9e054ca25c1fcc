"""What an engine and a worker in another process say to each other. `zerokl.rollout.wire` turns it into frames."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

from zerokl.kernels.communicator import CommunicatorError, PeerLostError
from zerokl.rollout.errors import WorkerError
from zerokl.rollout.named_errors import COMMON_ERRORS, NamedErrors
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.weight_source import DeviceWeights, FolderWeights, SharedWeights

_TRACEBACK_CHARS = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Worker to engine, first of all: the process is up."""

    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Configure:
    """Be reachable for the other ranks, with this worker in the making; answered by Done.

    A worker that is complete leaves the others to be linked anew, and keeps what it is and holds.
    """

    options: dict[str, Any]
    """Fields of `zerokl.rollout.config.EngineConfig`."""
    rank: int
    """The worker's place among the config's ranks."""
    folder: str
    """Where ranks reach each other by sockets, until they are connected."""
    placement: list[list[list[int]]]
    """[M, E, slots]: where experts are, as `ExpertPlacement.experts`. Empty: where they are at first, if anywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    """Reach the other ranks, all of which are configured, and make the worker; answered by Done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Execute:
    """Run a step; answered by Sampled."""

    order: StepOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """Launch a step; not answered. Further steps may be begun before its result is asked for, and nothing else."""

    order: StepOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class Collect:
    """Wait for the first step that was begun and not asked for; answered by Sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Worker.stage_weights; answered by Done."""

    source: FolderWeights | SharedWeights | DeviceWeights
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Worker.commit_weights; answered by Done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Discard:
    """Worker.discard_staged; answered by Done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Worker.pin_weights; answered by Done."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Worker.drop_weights; answered by Done."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PutAway:
    """Worker.sleep; answered by Done."""

    weights: bool
    kv_cache: bool
    level: int
    spill_dir: str
    """Empty: the default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BringBack:
    """Worker.wake_up; answered by Done."""

    weights: bool
    kv_cache: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rearrange:
    """Worker.rearrange_experts; answered by Done."""

    placement: list[list[list[int]]]
    """[M, E, slots], as `ExpertPlacement.experts`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Describe:
    """Worker.describe; answered by Facts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """End the process; not answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """It is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Outcome of a step."""

    result: StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What Describe asked for."""

    facts: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The request raised; the worker goes on."""

    error: str
    """Name of a class in the list of `exception_of`."""
    text: str
    traceback: str
    """For people."""


Message = (
    Hello
    | Configure
    | Connect
    | Execute
    | Begin
    | Collect
    | Stage
    | Commit
    | Discard
    | Pin
    | Drop
    | PutAway
    | BringBack
    | Rearrange
    | Describe
    | Close
    | Done
    | Sampled
    | Facts
    | Failed
)

_ERRORS = NamedErrors(
    (
        *COMMON_ERRORS,
        CommunicatorError,
        FileNotFoundError,
        FloatingPointError,
        NotADirectoryError,
        PeerLostError,
        PermissionError,
        WorkerError,
    )
)


def failure_of(error: Exception) -> Failed:
    """The exception as a message."""
    name, text = _ERRORS.describe(error)
    return Failed(error=name, text=text, traceback="".join(traceback.format_exception(error))[-_TRACEBACK_CHARS:])


def exception_of(failed: Failed) -> Exception:
    """The message as an exception to raise; a class that is not in the list becomes RuntimeError."""
    # The rank that is lost stands in the text.
    lost = failed.error == PeerLostError.__name__
    return _ERRORS.make(CommunicatorError.__name__ if lost else failed.error, failed.text)


def is_consequence(failed: Failed) -> bool:
    """Whether it only says that another rank is gone: what became of that one is the cause."""
    return failed.error == PeerLostError.__name__
