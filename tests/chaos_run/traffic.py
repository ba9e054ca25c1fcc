"""Clients that ask for rollouts and scores all the time, and keep what they asked and every answer."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from exactness_harness import SETTINGS, differing

from zerokl.rollout.client import RolloutClient
from zerokl.rollout.client_calls import TokenChunk
from zerokl.rollout.errors import AbortedError
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.protocol.codec import Message
from zerokl.rollout.sampling_params import SamplingParams

VOCAB = 96
PINNED = "reference"


@dataclass(kw_only=True)
class Asked:
    """One call of `generate` or `stream`, and what became of it."""

    prompts: list[list[int]]
    params: list[SamplingParams]
    resumed: list[Rollout] | None = None
    """Aborted rollouts that the call continues; `prompts` and `params` are theirs."""
    answers: list[list[Rollout]] = field(default_factory=list)
    streamed_wrong: int = 0
    """Values that the stream brought otherwise than the answer has them."""
    error: str | None = None

    @property
    def keys(self) -> Counter[tuple[int, int]]:
        """(prompt, sample) of each request of the call."""
        if self.resumed is not None:
            return Counter((one.prompt_index, one.sample_index) for one in self.resumed)
        return Counter((prompt, sample) for prompt, one in enumerate(self.params) for sample in range(one.n))

    @property
    def num_answered_once(self) -> int:
        """Requests of the call that have exactly one rollout, of their own prompt."""
        got = Counter((one.prompt_index, one.sample_index) for answer in self.answers for one in answer)
        strange = {
            (one.prompt_index, one.sample_index)
            for answer in self.answers
            for one in answer
            if self.resumed is None and one.prompt_token_ids.tolist() != self.prompts[one.prompt_index]
        }
        return sum(count for key, count in self.keys.items() if key not in strange and got[key] == count)


@dataclass(kw_only=True)
class Scored:
    """A score under the pinned weights, those of version 0."""

    tokens: list[int]
    logprobs: Any = None
    error: str | None = None


class Witness:
    """Counts the last messages of each call as they come from the wire, below all that could hide a second one."""

    def __init__(self, client: RolloutClient) -> None:
        self.ends: Counter[int] = Counter()
        link: Any = client._link
        act = link._act

        def counted(message: Message) -> None:
            if message.kind in ("result", "error"):
                self.ends[message.call] += 1
            act(message)

        link._act = counted

    @property
    def num_repeated(self) -> int:
        """Calls that were answered more than once."""
        return sum(count > 1 for count in self.ends.values())


class TrafficClient:
    """One client, calling in a thread of its own until `done` is set."""

    def __init__(self, number: int, seed: int, endpoint: str, done: threading.Event) -> None:
        self.number = number
        self.asked: list[Asked] = []
        self.scored: list[Scored] = []
        self.client = RolloutClient(endpoint)
        self.witness = Witness(self.client)
        self.in_flight: list[str] = []
        """Ids of the requests of the call in hand, for `abort`."""
        self._random = np.random.default_rng([seed, number])
        self._common = np.random.default_rng(seed).integers(0, VOCAB, 60).tolist()
        self.is_lost = False
        """A call failed: the run has, and nothing more is asked."""
        self._resumable: list[Rollout] = []
        self._done = done
        self._thread = threading.Thread(target=self._run, name=f"chaos-traffic-{number}", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait until the call in hand is answered; what is not in time never will be."""
        self._thread.join(seconds)
        self.client.close()  # what still waits raises now
        self._thread.join(10)

    def _run(self) -> None:
        while not self._done.is_set() and not self.is_lost:
            action = int(self._random.integers(8))
            if action == 0 and self._resumable:
                self._resume()
            elif action == 1 and self.asked and self.asked[-1].answers:
                self._score(self.asked[-1].answers[0][0])
            else:
                self._generate(streams=action >= 5)

    def _generate(self, *, streams: bool) -> None:
        random = self._random
        prompts = [self._prompt() for _ in range(int(random.integers(1, 4)))]
        asked = Asked(prompts=prompts, params=[self._params() for _ in prompts])
        self.asked.append(asked)
        ids = [f"{self.number}-{len(self.asked)}-{index}" for index in range(len(prompts))]
        self.in_flight = ids
        try:
            if streams:
                stream = self.client.stream(
                    prompts, asked.params, request_ids=ids, chunk=int(random.choice([1, 4, 16]))
                )
                chunks = list(stream)
                asked.answers.append(stream.rollouts())
                asked.streamed_wrong = streamed_wrong(chunks, asked.answers[0])
            else:
                asked.answers.append(self.client.generate(prompts, asked.params, request_ids=ids))
        except Exception as error:  # noqa: BLE001 - the verdict tells it
            self._lose(asked, error)
            return
        self._resumable += [one for one in asked.answers[0] if one.finish_reason == "abort"]

    def _resume(self) -> None:
        rollout = self._resumable.pop()
        asked = Asked(prompts=[rollout.prompt_token_ids.tolist()], params=[rollout.sampling_params], resumed=[rollout])
        self.asked.append(asked)
        try:
            asked.answers.append(self.client.generate(resume_from=[rollout]))
        except Exception as error:  # noqa: BLE001 - the verdict tells it
            self._lose(asked, error)

    def _score(self, rollout: Rollout) -> None:
        tokens = np.concatenate([rollout.prompt_token_ids, rollout.token_ids]).tolist()
        if len(tokens) < 2:
            return
        scored = Scored(tokens=tokens)
        self.scored.append(scored)
        try:
            (scored.logprobs,) = self.client.score([tokens], policy=PINNED)
        except AbortedError:  # by an `abort_all`, which is for the requests of all clients
            self.scored.pop()
        except Exception as error:  # noqa: BLE001 - the verdict tells it
            self._lose(scored, error)

    def _lose(self, call: Asked | Scored, error: Exception) -> None:
        call.error = repr(error)
        self.is_lost = True

    def _prompt(self) -> list[int]:
        shared = self._common[: int(self._random.choice([0, 8, 24, 40]))]
        return shared + self._random.integers(0, VOCAB, self._random.integers(1, 20)).tolist()

    def _params(self) -> SamplingParams:
        random = self._random
        settings = list(SETTINGS.values())[int(random.integers(len(SETTINGS)))]
        return SamplingParams(
            **settings,
            n=int(random.integers(1, 4)),
            max_tokens=int(random.choice([1, 8, 40, 80])),
            ignore_eos=bool(random.integers(2)),
            seed=int(random.integers(1 << 62)) if random.integers(4) else None,
        )


def streamed_wrong(chunks: Sequence[TokenChunk], rollouts: Sequence[Rollout]) -> int:
    """Values of a stream that are not those of its answer, lost and doubled tokens included."""
    wrong = 0
    for index, rollout in enumerate(rollouts):
        for name in ("token_ids", "logprobs", "policy_logprobs"):
            parts = [getattr(one, name) for one in kept(chunks, index)]
            wanted = getattr(rollout, name)
            wrong += differing(np.concatenate(parts) if parts else wanted[:0], wanted)
    return wrong


def kept(chunks: Sequence[TokenChunk], index: int) -> list[TokenChunk]:
    """The chunks of a rollout, without those that it forgot as it began anew."""
    mine = [one for one in chunks if one.index == index]
    return [one for one in mine if one.num_restarts == mine[-1].num_restarts]


def seeded(rollout: Rollout) -> SamplingParams:
    """Parameters that give this very sample, whoever asks."""
    return replace(rollout.sampling_params, seed=rollout.seed)
