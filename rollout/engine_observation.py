"""The engine's methods that say how it fares: telemetry, and the mismatch KL of what the trainer reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.engine_loop import EngineLoop
from zerokl.rollout.kl import KLReport
from zerokl.rollout.mismatch import AlarmHook, MismatchMonitor, ReportedTokens
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.scheduler import Scheduler


class ObservationMethods(ABC):
    """The part of `RolloutEngine` that is observed; the engine makes the collaborators."""

    _loop: EngineLoop
    _mismatch: MismatchMonitor
    _scheduler: Scheduler

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Counters and sizes."""

    @abstractmethod
    def health(self) -> dict[str, Any]:
        """State and facts."""

    def telemetry(self) -> dict[str, Any]:
        """All that can be observed, at one moment and as plain data: what Prometheus and `rollout-top` are told.

        `metrics` and `health` as of the methods of these names; `version_tokens`: tokens sampled by version of the
        policy, the newest few, then those of "older" ones; `histograms`: `HistogramData` as dicts; `mismatch`: what was
        reported by `report_trainer_logprobs`.
        """
        return {
            "metrics": self.metrics(),
            "health": self.health(),
            "version_tokens": self._scheduler.meter.version_tokens(),
            "histograms": [histogram.to_wire() for histogram in self._loop.histograms()],
            "mismatch": self._mismatch.facts(),
        }

    def report_trainer_logprobs(
        self,
        rollouts: Rollout | Sequence[Rollout],
        logprobs: NDArray[np.float32] | Sequence[NDArray[np.float32]],
        *,
        version: int | None = None,
    ) -> KLReport:
        """Compare the trainer's own forward with the rollouts' `policy_logprobs`: the mismatch KL, exactly 0.0.

        `logprobs`: float32, an array [N] for each rollout of N tokens, or one of all tokens in the rollouts' order;
        what they hold for tokens that the policy did not sample (`Rollout.loss_mask`) does not count.
        `version`: of the weights that the forward had; None: the newest that sampled one of the tokens. Tokens of other
        versions, and of rollouts that are `inexact` or have `num_kept_updates`, are counted apart and never alarm: the
        report returned is about the others, or where there are none about all, with `inexact`.

        Above `EngineConfig.k3_alarm` it alarms: a warning in the log, a counter, the hooks of `on_k3_alarm`.
        Raises ValueError naming field, value and bound for arrays that do not fit the rollouts or are not finite.
        """
        return self._mismatch.report(ReportedTokens.of_rollouts(rollouts, logprobs), version)[0]

    def receive_trainer_logprobs(self, tokens: ReportedTokens, version: int | None) -> tuple[KLReport, bool]:
        """`report_trainer_logprobs` for a server: (report, whether it alarmed)."""
        return self._mismatch.report(tokens, version)

    def on_k3_alarm(self, hook: AlarmHook) -> Callable[[], None]:
        """Have `hook(KLReport)` called for each alarm, in the thread that reported; returns what removes it.

        What a hook raises is logged.
        """
        return self._mismatch.hooks.add(hook)
