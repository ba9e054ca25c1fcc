"""What a request contributes to `SamplingBatch`: constants of its rows, logit bias and token history."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.sampling_params import SamplingParams

BiasArrays = tuple[NDArray[np.int32], NDArray[np.float32]]
RowConstants = tuple[float, int, float, float, float, float, float, int, int]


class TokenHistory:
    """Distinct tokens of prompt and output with their counts in the output: what the penalties look at.

    Kept up token by token, so that a step costs a copy of two arrays and not a sort of the whole sequence.
    """

    __slots__ = ("_counts", "_index", "_size", "_tokens")

    def __init__(self, prompt: NDArray[np.int32]) -> None:
        distinct = np.unique(prompt)
        self._size = len(distinct)
        self._tokens = np.concatenate([distinct, np.zeros(self._size + 16, np.int32)])
        self._counts = np.zeros(len(self._tokens), np.int32)
        self._index: dict[int, int] = {token: index for index, token in enumerate(distinct.tolist())}

    def append(self, token: int) -> None:
        """Count one more token of the output."""
        index = self._index.setdefault(token, self._size)
        if index == self._size:
            if index == len(self._tokens):
                self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._tokens[index] = token
            self._size += 1
        self._counts[index] += 1

    def copy(self) -> TokenHistory:
        """An independent copy: scoring looks ahead over forced tokens without committing them."""
        twin = object.__new__(TokenHistory)
        twin._size = self._size
        twin._tokens = self._tokens.copy()
        twin._counts = self._counts.copy()
        twin._index = dict(self._index)
        return twin

    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(tokens, counts in the output), copies."""
        return self._tokens[: self._size].copy(), self._counts[: self._size].copy()


class SamplingState:
    """The sampling inputs of one request; everything here follows from its parameters and its tokens alone."""

    __slots__ = (
        "_ban",
        "_bias",
        "constants",
        "has_stop_strings",
        "history",
        "is_constant",
        "min_tokens",
        "stop_ids",
        "uses_bias",
        "want_raw",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt: NDArray[np.int32],
        *,
        seed: int,
        sample_index: int,
        eos_token_ids: Iterable[int],
    ) -> None:
        self.constants: RowConstants = (
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            seed,
            sample_index,
        )
        """temperature, top_k, top_p, min_p, repetition, presence and frequency penalty, seed, sample_index."""
        self.stop_ids = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        )
        self.has_stop_strings = bool(params.stop)
        self.min_tokens = params.min_tokens
        self.want_raw = params.raw_logprobs
        self.history = TokenHistory(prompt) if params.uses_penalties else None
        bias = dict(params.logit_bias or {})
        self._bias = _bias_arrays(bias)
        bans = bool(self.stop_ids) and self.min_tokens > 0
        self._ban = _bias_arrays(bias | dict.fromkeys(self.stop_ids, -np.inf)) if bans else self._bias
        self.uses_bias = bool(bias) or bans
        self.is_constant = self.history is None and not self.uses_bias
        """Whether rows differ by their position alone."""

    def restart(self, prompt: NDArray[np.int32]) -> None:
        """Forget the output: the history is that of the prompt."""
        if self.history is not None:
            self.history = TokenHistory(prompt)

    def bias(self, output_index: int) -> BiasArrays:
        """(token ids, values to add) for the row of output token `output_index`: at first, stop tokens are banned."""
        return self._ban if output_index < self.min_tokens else self._bias


def _bias_arrays(bias: dict[int, float]) -> BiasArrays:
    tokens = sorted(bias)
    return np.array(tokens, np.int32), np.array([bias[token] for token in tokens], np.float32)
