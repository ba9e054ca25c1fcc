"""Client processes that are killed in mid-stream, one after the other, and what they had heard until then."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from chaos_run.processes import LineProcess
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams


class Mortals:
    """Starts and kills clients in a thread of its own until `done` is set."""

    def __init__(self, endpoint: str, seed: int, done: threading.Event) -> None:
        self.partial: list[Rollout] = []
        """What each killed client had of its rollouts; columns that a stream does not bring are zeros."""
        self.num_killed = 0
        """Those that were killed with tokens received and more to come."""
        self.wrong: list[str] = []
        self._endpoint = endpoint
        self._random = np.random.default_rng([seed, 1 << 21])
        self._done = done
        self._thread = threading.Thread(target=self._run, name="chaos-mortals", daemon=True)
        self._current: LineProcess | None = None
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Kill the last one, and wait for the thread."""
        self._thread.join(seconds)
        if self._thread.is_alive() and self._current is not None:
            self.wrong.append("a client waits for its tokens for ever")
            self._current.process.kill()
            self._thread.join()

    def _run(self) -> None:
        while not self._done.is_set():
            self._live_and_die()

    def _live_and_die(self) -> None:
        self._current = LineProcess("mortal_client.py", self._endpoint, str(int(self._random.integers(1 << 31))))
        facts = self._current.receive()
        chunks, life = [], int(self._random.integers(1, 30))
        while len(chunks) < life and not self._done.is_set():
            line = self._current.receive()
            if line is None or "ended" in line:
                break
            chunks.append(line)
        status = self._current.kill()
        if status > 0:
            self.wrong.append(f"a streaming client failed with exit status {status}")
        self.num_killed += int(status < 0 and bool(chunks))
        if facts is not None:
            self.partial += [partial_rollout(facts, chunks, index) for index in range(len(facts["prompts"]))]


def partial_rollout(facts: dict[str, Any], chunks: list[dict[str, Any]], index: int) -> Rollout:
    """What was streamed of a rollout, as if it had been aborted there."""
    mine = [one for one in chunks if one["index"] == index]
    mine = [one for one in mine if one["restarts"] == mine[-1]["restarts"]]
    assert [one["start"] for one in mine] == np.cumsum([0, *(len(one["token_ids"]) for one in mine)])[:-1].tolist()

    def column(name: str, kind: Any) -> Any:
        return np.array([value for one in mine for value in one[name]], kind)

    tokens = column("token_ids", np.int32)
    return Rollout(
        prompt_token_ids=np.array(facts["prompts"][index], np.int32),
        token_ids=tokens,
        text=None,
        logprobs=column("logprobs", np.int32).view(np.float32),
        policy_logprobs=column("policy_logprobs", np.int32).view(np.float32),
        entropy=np.zeros(len(tokens), np.float32),
        raw_logprobs=None,
        policy_versions=column("policy_versions", np.int64),
        steps=np.zeros(len(tokens), np.int64),
        phases=np.zeros(len(tokens), np.uint8),
        cached_lens=np.zeros(len(tokens), np.int32),
        ranks=np.zeros(len(tokens), np.int16),
        finish_reason="abort",
        stop_reason=None,
        num_cached_tokens=0,
        num_preemptions=0,
        num_restarts=0,
        num_kept_updates=0,
        seed=facts["params"]["seed"],
        sample_index=0,
        prompt_index=index,
        sampling_params=SamplingParams(**facts["params"]),
    )
