"""What an operator and a trainer do to a busy server, well or badly: pauses, aborts, updates, lost connections."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from leftovers import segments_of

from chaos_run.processes import LineProcess
from chaos_run.traffic import TrafficClient
from zerokl.rollout.client import RolloutClient
from zerokl.weight_sync import PublishedFile, PublishedWeights

BROKEN = ("misshapen", "flipped", "wrong_version")
DEATHS = ("copy:3", "hash:3", "publish", "write:4", "upload:6")
GAP_SECONDS = 0.15
"""Between two disturbances, on average."""


class Disturber:
    """Disturbs the server in a thread of its own until `done` is set; `faults` counts what was survived, by kind."""

    def __init__(
        self,
        endpoint: str,
        model: Path,
        folder: Path,
        seed: int,
        traffic: Sequence[TrafficClient],
        done: threading.Event,
        version: int | None,
    ) -> None:
        """`version`: what serves; None for no updates."""
        self.faults: Counter[str] = Counter()
        self.wrong: list[str] = []
        """What did not go as it must, in words."""
        self.trainer_pids: list[int] = []
        self.version = version or 0
        self._random = np.random.default_rng([seed, 1 << 20])
        self._client = RolloutClient(endpoint)
        self._traffic = traffic
        self._done = done
        self._arguments = (endpoint, str(model), str(folder))
        self._trainer: LineProcess | None = None
        calm = [self._pause, self._abort, self._abort_all, self._lose_connection, self._forget_prefixes]
        changes = [self._update, self._update, self._update_while_paused, self._broken_update, self._dying_trainer]
        self._actions = calm + ([] if version is None else changes)
        self._thread = threading.Thread(target=self._run, name="chaos-disturber", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for the end of what it is about, and of its trainer."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.wrong.append("a command hangs")
        if self._trainer is not None and not self._thread.is_alive():
            self._trainer.end()
        elif self._trainer is not None:
            self._trainer.kill()
        self._client.close()
        for pid in self.trainer_pids:
            self.wrong += [f"trainer {pid} left {name}" for name in segments_of(pid)]

    def _run(self) -> None:
        order: list[Callable[[], None]] = []
        while not self._done.wait(float(self._random.exponential(GAP_SECONDS))):
            if not order:  # each once, then each again: a short run has them all
                order = [self._actions[index] for index in self._random.permutation(len(self._actions))]
            action = order.pop()
            try:
                action()
            except Exception as error:  # noqa: BLE001 - the verdict tells it
                self.wrong.append(f"{action.__name__.strip('_')}: {error!r}")

    # -- operator -----------------------------------------------------------------------------------------------------
    def _pause(self) -> None:
        mode = str(self._random.choice(["wait", "keep", "abort"]))
        self._client.pause_generation(mode)  # type: ignore[arg-type]
        self._done.wait(float(self._random.uniform(0.0, 0.2)))
        self._client.resume_generation()
        self.faults[f"pause_{mode}"] += 1

    def _abort(self) -> None:
        victim = self._victim()
        self.faults["abort"] += int(self._client.abort(list(victim.in_flight)) > 0)

    def _abort_all(self) -> None:
        self.faults["abort_all"] += int(self._client.abort_all() > 0)

    def _lose_connection(self) -> None:
        self._victim().client._link.drop_connection()
        self.faults["connection_loss"] += 1

    def _forget_prefixes(self) -> None:
        self._client.reset_prefix_cache()

    def _victim(self) -> TrafficClient:
        return self._traffic[int(self._random.integers(len(self._traffic)))]

    # -- trainer ------------------------------------------------------------------------------------------------------
    def _update(self) -> None:
        mode = str(self._random.choice(["wait", "keep", "abort", "retract"]))
        staleness = int(self._random.integers(2)) if mode in ("keep", "retract") and self._random.integers(2) else None
        transport = str(self._random.choice(["shared", "shared", "file", "upload"]))
        if transport == "upload":
            answer = self._order(self.version + 1, transport)
            assert answer["live"] == self.version + 1, answer
        else:
            source = self._published(self.version + 1, transport)
            self._client.update_weights(source, mode=mode, max_staleness=staleness)  # type: ignore[arg-type]
        self.version += 1
        self.faults[f"update_{transport}"] += 1

    def _update_while_paused(self) -> None:
        self._client.pause_generation("keep")
        try:
            source = self._published(self.version + 1, "shared")
            self._client.update_weights(source, mode="keep")
            self.version += 1
        finally:
            self._client.resume_generation()
        self.faults["update_while_paused"] += 1

    def _broken_update(self) -> None:
        fault = str(self._random.choice(BROKEN))
        transport = str(self._random.choice(["shared", "file"]))
        version = self.version + (2 if fault == "wrong_version" else 1)
        source = self._published(version, transport, fault=None if fault == "wrong_version" else fault)
        try:
            self._client.update_weights(source, mode=str(self._random.choice(["wait", "keep"])))  # type: ignore[arg-type]
        except (ValueError, RuntimeError):
            self.faults[f"broken_update_{fault}"] += 1
        else:
            self.wrong.append(f"a broken update ({fault}, {transport}) was taken")
        self._expect_version()

    def _dying_trainer(self) -> None:
        die = str(self._random.choice(DEATHS))
        transport = {"write": "file", "upload": "upload"}.get(die.partition(":")[0], "shared")
        answer = self._order(self.version + 1, transport, die=die)
        if answer is not None:
            self.wrong.append(f"a trainer that was to die at {die} answered {str(answer)[:200]}")
        assert self._trainer is not None
        self._trainer.kill()
        self._trainer = None
        self.faults["trainer_killed"] += 1
        self._expect_version()
        self._update()  # the next publisher removes what the dead one left

    def _expect_version(self) -> None:
        live = self._client.get_weight_version()
        if live != self.version:
            self.wrong.append(f"version {live} serves, {self.version} was the last good one")

    def _published(self, version: int, transport: str, *, fault: str | None = None) -> PublishedWeights | PublishedFile:
        answer = self._order(version, transport, fault=fault)
        if "path" in answer:
            return PublishedFile(path=answer["path"], version=version)
        return PublishedWeights.from_bytes(bytes.fromhex(answer["published"]))

    def _order(self, version: int, transport: str, *, fault: str | None = None, die: str | None = None) -> Any:
        if self._trainer is None:
            self._trainer = LineProcess("trainer.py", *self._arguments)
            self.trainer_pids.append(self._trainer.process.pid)
        self._trainer.send({"version": version, "transport": transport, "fault": fault, "die": die})
        return self._trainer.receive()
