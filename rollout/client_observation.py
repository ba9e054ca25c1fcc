"""The client's methods that say how the engine fares; see `zerokl.rollout.engine_observation`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.client_calls import PendingCall
from zerokl.rollout.kl import KLReport
from zerokl.rollout.mismatch import AlarmHook, AlarmHooks, ReportedTokens, report_from_dict
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.protocol.codec import Message
from zerokl.rollout.protocol.records import reported_to_arrays
from zerokl.rollout.validation import check_int


class _ReportCall(PendingCall):
    def result(self, message: Message) -> tuple[KLReport, bool]:
        value = message.body["value"]
        return report_from_dict(value["report"]), bool(value["alarm"])


class ClientObservationMethods(ABC):
    """The part of `RolloutClient` that observes."""

    _alarm_hooks: AlarmHooks

    @abstractmethod
    def _call(self, kind: str, **body: Any) -> Any:
        """Make a call and wait for its value."""

    @abstractmethod
    def _wait(self, call: PendingCall) -> Any:
        """Send a call and wait for its value."""

    def metrics(self) -> dict[str, float]:
        """The engine's counters, and the server's under names with `server_`."""
        metrics: dict[str, float] = self._call("metrics")
        return metrics

    def health(self) -> dict[str, Any]:
        """See `RolloutEngine.health`."""
        health: dict[str, Any] = self._call("health")
        return health

    @property
    def rank_pids(self) -> list[int]:
        """See `RolloutEngine.rank_pids`: processes of the server's machine. A call, as `health`."""
        return [rank["pid"] for rank in self.health()["ranks"]]

    def telemetry(self) -> dict[str, Any]:
        """See `RolloutEngine.telemetry`; `metrics` has the server's counters too."""
        telemetry: dict[str, Any] = self._call("telemetry")
        return telemetry

    def report_trainer_logprobs(
        self,
        rollouts: Rollout | Sequence[Rollout],
        logprobs: NDArray[np.float32] | Sequence[NDArray[np.float32]],
        *,
        version: int | None = None,
    ) -> KLReport:
        """See `RolloutEngine.report_trainer_logprobs`. Only logprobs and versions are sent, no tokens."""
        tokens = ReportedTokens.of_rollouts(rollouts, logprobs)
        body = {} if version is None else {"version": check_int("version", version, 0, 2**63 - 1)}
        report, alarms = self._wait(_ReportCall("report_trainer_logprobs", body, reported_to_arrays(tokens)))
        if alarms:
            self._alarm_hooks.call(report)
        assert isinstance(report, KLReport)
        return report

    def on_k3_alarm(self, hook: AlarmHook) -> Callable[[], None]:
        """See `RolloutEngine.on_k3_alarm`. Hooks are this client's and are called for its own reports."""
        return self._alarm_hooks.add(hook)
