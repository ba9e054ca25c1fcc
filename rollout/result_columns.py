"""The tokens of a request and its results, column by column."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.results import ResultArrays


class ResultColumns:
    """Views of the tokens that are known and the rows collected so far, for a class that has the fields below.

    Columns lie row by row in memory: entries of a view are not next to each other.
    """

    __slots__ = ()

    results: ResultArrays
    num_output_tokens: int
    num_prompt_tokens: int
    num_tokens: int
    _tokens: NDArray[np.int32]

    def settle(self) -> None:
        """Fetch tokens and rows that wait elsewhere."""
        raise NotImplementedError

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """[num_tokens] int32 view: prompt and output, or all tokens to score."""
        self.settle()
        return self._tokens[: self.num_tokens]

    @property
    def prompt_token_ids(self) -> NDArray[np.int32]:
        """[num_prompt_tokens] int32 view."""
        return self._tokens[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> NDArray[np.int32]:
        """[num_output_tokens] int32 view: sampled tokens, or the forced tokens scored so far."""
        self.settle()
        return self._tokens[self.num_prompt_tokens : self.num_prompt_tokens + self.num_output_tokens]

    @property
    def logprobs(self) -> NDArray[np.float32]:
        """[num_output_tokens] view, under the distribution sampled from."""
        return self._column("logprobs")

    @property
    def policy_logprobs(self) -> NDArray[np.float32]:
        """[num_output_tokens] view, under softmax(logits / temperature)."""
        return self._column("policy_logprobs")

    @property
    def entropy(self) -> NDArray[np.float32]:
        """[num_output_tokens] view, nats, of softmax(logits / temperature)."""
        return self._column("entropy")

    @property
    def raw_logprobs(self) -> NDArray[np.float32] | None:
        """[num_output_tokens] view, under softmax(logits); None unless asked for."""
        self.settle()
        raw = self.results.column("raw_logprobs")
        return None if raw is None else raw[: self.num_output_tokens]

    @property
    def policy_versions(self) -> NDArray[np.int64]:
        """[num_output_tokens] view: version of the weights that gave each result."""
        return self._column("policy_versions")

    @property
    def steps(self) -> NDArray[np.int64]:
        """[num_output_tokens] view: number of the step that gave each result."""
        return self._column("steps")

    @property
    def phases(self) -> NDArray[np.uint8]:
        """[num_output_tokens] view: DECODE where the forward computed one token, itself sampled; else PREFILL."""
        return self._column("phases")

    @property
    def cached_lens(self) -> NDArray[np.int32]:
        """[num_output_tokens] view: tokens of which that forward found keys and values in the prefix cache."""
        return self._column("cached_lens")

    @property
    def ranks(self) -> NDArray[np.int16]:
        """[num_output_tokens] view: rank that computed each result."""
        return self._column("ranks")

    def _column(self, name: str) -> NDArray[Any]:
        self.settle()
        column = self.results.column(name)
        assert column is not None, name
        return column[: self.num_output_tokens]
