"""Kills and stops rank processes under load; a fault counts if it hit a rank with a step in flight."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np

from chaos_run.server_process import ServerProcess
from zerokl.rollout.client import RolloutClient

KINDS = ("rank_kill", "rank_kill", "rank_stop", "two_ranks_kill", "rank_blink")
GAP_SECONDS = 1.0
"""Between a recovery and the next fault, on average."""
RECOVERY_SECONDS = 60.0
"""No machine is so busy that a rank takes longer."""
_POLL_SECONDS = 0.02


class RankFaults:
    """Hits ranks in a thread of its own until `done` is set; `faults` counts those in a step that were survived."""

    def __init__(self, server: ServerProcess, seed: int, done: threading.Event) -> None:
        self.faults: Counter[str] = Counter()
        self.num_idle = 0
        """Faults that hit a rank without a step in flight: survived, but they prove less."""
        self.wrong: list[str] = []
        self.recovery_seconds: list[float] = []
        self._random = np.random.default_rng([seed, 1 << 22])
        self._server = server
        self._client = RolloutClient(server.endpoint)
        self._done = done
        self._thread = threading.Thread(target=self._run, name="chaos-rank-faults", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for the last recovery."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.wrong.append("a rank was not restarted")
        self._client.close()

    def _run(self) -> None:
        order: list[str] = []
        try:
            while not self._done.wait(float(self._random.exponential(GAP_SECONDS))):
                if not order:  # each once, then each again
                    order = [KINDS[index] for index in self._random.permutation(len(KINDS))]
                kind = order.pop()
                if kind == "rank_blink":
                    self._blink()
                else:
                    self._hit(kind)
        except Exception as error:  # noqa: BLE001 - the verdict tells it
            self.wrong.append(f"rank faults: {error!r}")

    def _hit(self, kind: str) -> None:
        """Kill or stop one or two ranks, and wait until all are back."""
        before, pids = self._client.metrics(), self._pids()
        count = 2 if kind == "two_ranks_kill" else 1
        victims = [pids[index] for index in self._random.choice(len(pids), count, replace=False)]
        start = time.monotonic()
        for pid in victims:
            with suppress(ProcessLookupError):  # its group was restarted for the first one
                os.kill(pid, signal.SIGSTOP if kind == "rank_stop" else signal.SIGKILL)
        if not self._recovered(victims, before["rank_restarts"]):
            self.wrong.append(f"{kind}: ranks {victims} of {pids} were not restarted in {RECOVERY_SECONDS:g} s")
            return
        self.recovery_seconds.append(time.monotonic() - start)
        in_step = int(self._client.metrics()["rank_faults_in_step"] - before["rank_faults_in_step"])
        self.faults[kind] += int(in_step > 0)
        self.num_idle += int(in_step == 0)

    def _blink(self) -> None:
        """Stop a rank for less than what makes it count as lost, and let it go on."""
        pid = int(self._random.choice(self._pids()))
        os.kill(pid, signal.SIGSTOP)
        self._done.wait(float(self._random.uniform(0.0, 0.5)))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        self.faults["rank_blink"] += 1

    def _recovered(self, victims: list[int], restarts: float) -> bool:
        """Whether new processes took the victims' places in time."""
        pause, deadline = threading.Event(), time.monotonic() + RECOVERY_SECONDS
        while time.monotonic() < deadline:
            metrics = self._client.metrics()
            if metrics["rank_restarts"] >= restarts + len(victims) and not set(victims) & set(self._pids()):
                return True
            pause.wait(_POLL_SECONDS)
        return False

    def _pids(self) -> list[int]:
        """The ranks' processes of now."""
        self._server.look()
        ranks: Any = self._client.health()["ranks"]
        return [facts["pid"] for facts in ranks]
