"""Stop strings: found in the text of an output as it grows, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.request import Request
from zerokl.rollout.text import Detokenizer, Tokenizer


def find_stop(text: str, num_seen: int, stop: Sequence[str]) -> tuple[int, str] | None:
    """(start, string) of the stop string completed after the first `num_seen` characters, or None.

    Of several, the one that starts first; at the same start, the one given first.
    """
    best: tuple[int, str] | None = None
    for string in stop:
        start = text.find(string, max(0, num_seen - len(string) + 1))
        if start >= 0 and (best is None or start < best[0]):
            best = (start, string)
    return best


class StopWatch:
    """The text of one output and the stop string that ended it, if one did.

    `push` is called with each new token. A stop string counts if it is completed by a token after the first
    `min_tokens - 1`; one completed earlier is passed over.
    """

    __slots__ = ("_detokenizer", "_min_tokens", "_num_tokens", "_stop", "_text")

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: NDArray[np.int32], stop: Sequence[str], min_tokens: int
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids)
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._text = ""

    def push(self, token_id: int) -> str | None:
        """Take one token; return the stop string that its text completes. `text` ends before it from then on."""
        num_seen = len(self._text)
        self._text += self._detokenizer.push((token_id,))
        self._num_tokens += 1
        if self._num_tokens < self._min_tokens:
            return None
        found = find_stop(self._text, num_seen, self._stop)
        if found is None:
            return None
        self._text = self._text[: found[0]]
        return found[1]

    def finish(self) -> str:
        """The text at the end of an output that no stop string ended, incomplete characters as U+FFFD."""
        self._text += self._detokenizer.flush()
        return self._text

    @property
    def text(self) -> str:
        """The text so far, complete characters only."""
        return self._text

    @property
    def num_tokens(self) -> int:
        """Tokens taken so far."""
        return self._num_tokens


def whole_text(tokenizer: Tokenizer, request: Request) -> str:
    """Text of all tokens of an output that no stop string ended."""
    detokenizer = Detokenizer(tokenizer, request.prompt_token_ids)
    return detokenizer.push(request.output_token_ids) + detokenizer.flush()


class StopStrings:
    """The scheduler's StopChecker: a StopWatch per request that has stop strings."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._watches: dict[str, StopWatch] = {}

    def check(self, request: Request) -> str | None:
        """The stop string that the newest token of `request` completes, or None."""
        assert self._tokenizer is not None, "stop strings need a tokenizer; refused at submission"
        watch = self._watches.get(request.request_id)
        if watch is None:
            params = request.sampling_params
            watch = StopWatch(self._tokenizer, request.prompt_token_ids, params.stop, params.min_tokens)
            self._watches[request.request_id] = watch
        found = None
        for token in request.output_token_ids[watch.num_tokens :]:
            found = watch.push(int(token))
        return found

    def forget(self, request: Request) -> None:
        """The request begins anew: what was seen of its output does not count."""
        self._watches.pop(request.request_id, None)

    def take_text(self, request: Request) -> str | None:
        """Forget a finished request; its text if a stop string ended it."""
        watch = self._watches.pop(request.request_id, None)
        return watch.text if watch is not None and isinstance(request.stop_reason, str) else None
