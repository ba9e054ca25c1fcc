"""Watches the mismatch KL: the trainer's forward against the rollouts' logprobs, with an alarm. Never the reference KL.

Tokens are told apart by what may be asked of them:

    exact          drawn by the version that the trainer's forward had: the same bits, or something is broken
    inexact        drawn by weights that were rounded otherwise than the trainer's, or with keys and values of weights
                   before them
    other_version  drawn by another version than the trainer's forward had

Only the first kind can alarm.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.kl import KLReport, mismatch_kl
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.validation import check_int

TokenKind = Literal["exact", "inexact", "other_version"]
KINDS: tuple[TokenKind, ...] = get_args(TokenKind)
AlarmHook = Callable[[KLReport], Any]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReportedTokens:
    """T tokens that the trainer has rated. Raises ValueError naming field, value and bound for anything else."""

    trainer_logprobs: NDArray[np.float32]
    """[T], of the trainer's forward."""
    rollout_logprobs: NDArray[np.float32]
    """[T], `policy_logprobs` of the rollouts."""
    policy_versions: NDArray[np.int64]
    """[T]"""
    inexact: NDArray[np.uint8]
    """[T], 1 where a difference is no defect."""

    def __post_init__(self) -> None:
        size = len(self.rollout_logprobs)
        if not size:
            raise ValueError("rollouts must hold at least one token, got none")
        for field in dataclasses.fields(self):
            length = len(getattr(self, field.name))
            if length != size:
                raise ValueError(f"{field.name} must have an entry for each of the {size} tokens, got {length}")
        for name in ("trainer_logprobs", "rollout_logprobs"):
            values = getattr(self, name)
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                raise ValueError(f"{name} must be finite, got {values[bad[0]]} at token {bad[0]}")

    @classmethod
    def of_rollouts(cls, rollouts: Rollout | Sequence[Rollout], logprobs: Any) -> ReportedTokens:
        """`logprobs`: float32, an array [N] for each rollout of N tokens, or one of all of them in their order.

        Tokens that the policy did not sample, those of tools in a conversation, are left out.
        """
        listed = [rollouts] if isinstance(rollouts, Rollout) else rollouts
        if not isinstance(listed, Sequence) or not all(isinstance(one, Rollout) for one in listed):
            raise ValueError(f"rollouts must be a Rollout or a sequence of them, got {type(rollouts).__name__}")
        sizes = [len(one.token_ids) for one in listed]
        kept = [one.inexact or one.num_kept_updates > 0 for one in listed]
        generated = np.concatenate([np.zeros(0, bool), *(one.generated for one in listed)])
        rolled = np.concatenate([np.zeros(0, np.float32), *(one.policy_logprobs for one in listed)])
        versions = np.concatenate([np.zeros(0, np.int64), *(one.policy_versions for one in listed)])
        return cls(
            trainer_logprobs=_joined(logprobs, sizes)[generated],
            rollout_logprobs=rolled[generated],
            policy_versions=versions[generated],
            inexact=np.repeat(np.array(kept, np.uint8), sizes)[generated],
        )

    def kinds(self, version: int | None) -> dict[TokenKind, NDArray[np.bool_]]:
        """Masks [T] of each kind; `version` as `MismatchMonitor.report` takes it."""
        live = int(self.policy_versions.max()) if version is None else check_int("version", version, 0)
        other = self.policy_versions != live
        inexact = self.inexact.astype(bool) & ~other
        return {"exact": ~(other | inexact), "inexact": inexact, "other_version": other}


class AlarmHooks:
    """Functions of the user that are called with the report that alarmed, in the thread that reported."""

    def __init__(self) -> None:
        self.num_errors = 0
        """Exceptions that hooks raised; they are logged."""
        self._lock = threading.Lock()
        self._hooks: tuple[AlarmHook, ...] = ()

    def add(self, hook: AlarmHook) -> Callable[[], None]:
        """Register a hook; the callable returned removes it. Raises ValueError for what cannot be called."""
        if not callable(hook):
            raise ValueError(f"hook must be callable, got {hook!r}")
        with self._lock:
            self._hooks = (*self._hooks, hook)

        def remove() -> None:
            with self._lock:
                self._hooks = tuple(other for other in self._hooks if other is not hook)

        return remove

    def call(self, report: KLReport) -> None:
        """Call them all."""
        for hook in self._hooks:
            try:
                hook(report)
            except Exception:
                self.num_errors += 1
                _logger.exception("k3 alarm hook raised")


class MismatchMonitor:
    """Owner of what was reported. Any thread may report and read."""

    def __init__(self, k3_alarm: float | None) -> None:
        """`k3_alarm`: alarm where the k3_kl_mean of exact tokens is above it; at 0.0 by any token that differs."""
        self.hooks = AlarmHooks()
        self._k3_alarm = k3_alarm
        self._lock = threading.Lock()
        self._last: dict[TokenKind, KLReport] = {}
        self._tokens = dict.fromkeys(KINDS, 0)
        self._differing = dict.fromkeys(KINDS, 0)
        self._num_reports = 0
        self._num_alarms = 0
        self._is_alarming = False

    def report(self, tokens: ReportedTokens, version: int | None = None) -> tuple[KLReport, bool]:
        """(report, whether it alarmed). `version`: as `ObservationMethods.report_trainer_logprobs` takes it.

        The report is about the exact tokens; without any, about all, and says that it is inexact.
        """
        kinds = tokens.kinds(version)
        trainer, rolled = tokens.trainer_logprobs, tokens.rollout_logprobs
        reports = {
            kind: mismatch_kl(trainer, rolled, mask, inexact=kind != "exact")
            for kind, mask in kinds.items()
            if mask.any()
        }
        alarms = "exact" in reports and self._is_over(reports["exact"])
        with self._lock:
            self._num_reports += 1
            for kind, report in reports.items():
                self._last[kind] = report
                self._tokens[kind] += report.num_tokens
                self._differing[kind] += report.differing_logprobs
            if "exact" in reports:
                self._is_alarming = alarms
                self._num_alarms += alarms
        told = reports["exact"] if "exact" in reports else mismatch_kl(trainer, rolled, inexact=True)
        if alarms:
            self._alarm(told, tokens, kinds["exact"])
        return told, alarms

    def facts(self) -> dict[str, Any]:
        """Plain numbers: reports, alarms, the alarm's threshold and whether the last report is over it; of each kind of
        token the counts since the start and the last report.
        """
        with self._lock:
            return {
                "reports": self._num_reports,
                "alarms": self._num_alarms,
                "k3_alarm": self._k3_alarm,
                "is_alarming": self._is_alarming,
                "hook_errors": self.hooks.num_errors,
                "tokens": dict(self._tokens),
                "differing_logprobs": dict(self._differing),
                "last": {kind: report.to_dict() for kind, report in self._last.items()},
            }

    def _is_over(self, report: KLReport) -> bool:
        threshold = self._k3_alarm
        # Near probability 1 two logprobs may differ by so little that k3 underflows.
        return threshold is not None and (
            report.k3_kl_mean > threshold or (threshold == 0.0 and report.differing_logprobs > 0)
        )

    def _alarm(self, report: KLReport, tokens: ReportedTokens, mask: NDArray[np.bool_]) -> None:
        _logger.warning(
            "k3 alarm: the trainer's logprobs are not the rollout's",
            extra={
                "k3_kl_mean": report.k3_kl_mean,
                "k3_kl_max": report.k3_kl_max,
                "k3_alarm": self._k3_alarm,
                "num_tokens": report.num_tokens,
                "differing_logprobs": report.differing_logprobs,
                "version": int(tokens.policy_versions[mask][0]),
            },
        )
        self.hooks.call(report)


def report_from_dict(fields: Mapping[str, Any]) -> KLReport:
    """Inverse of `KLReport.to_dict`. Raises ValueError for other fields, or ones that are no numbers."""
    names = {field.name for field in dataclasses.fields(KLReport)}
    if set(fields) != names or not all(isinstance(value, (int, float)) for value in fields.values()):
        raise ValueError(f"a report must have the numbers {sorted(names)}, got {fields!r:.300}")
    return KLReport(**fields)


def _joined(logprobs: Any, sizes: Sequence[int]) -> NDArray[np.float32]:
    total = sum(sizes)
    if isinstance(logprobs, np.ndarray) and logprobs.ndim == 1 and logprobs.dtype != object:
        return _checked("logprobs", logprobs, total)
    if not isinstance(logprobs, Sequence) or len(logprobs) != len(sizes):
        raise ValueError(
            f"logprobs must be one array for each of the {len(sizes)} rollouts, or one of all their {total} tokens, "
            f"got {type(logprobs).__name__}" + (f" of {len(logprobs)}" if hasattr(logprobs, "__len__") else "")
        )
    pairs = enumerate(zip(logprobs, sizes, strict=True))
    parts = [_checked(f"logprobs[{index}]", part, size) for index, (part, size) in pairs]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def _checked(name: str, part: Any, size: int) -> NDArray[np.float32]:
    if not isinstance(part, np.ndarray) or part.dtype != np.float32:
        found = part.dtype if isinstance(part, np.ndarray) else type(part).__name__
        raise ValueError(f"{name} must be a float32 array, got {found}")
    if part.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), one entry per token, got {part.shape}")
    return part
