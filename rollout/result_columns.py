"""The results of a request, column by column."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.results import ResultArrays


class ResultColumns:
    """Views of the rows collected so far, for a class that has `results` and `num_output_tokens`."""

    __slots__ = ()

    results: ResultArrays
    num_output_tokens: int

    @property
    def logprobs(self) -> NDArray[np.float32]:
        """[num_output_tokens] view, under the distribution sampled from."""
        return self.results.logprobs[: self.num_output_tokens]

    @property
    def policy_logprobs(self) -> NDArray[np.float32]:
        """[num_output_tokens] view, under softmax(logits / temperature)."""
        return self.results.policy_logprobs[: self.num_output_tokens]

    @property
    def entropy(self) -> NDArray[np.float32]:
        """[num_output_tokens] view, nats, of softmax(logits / temperature)."""
        return self.results.entropy[: self.num_output_tokens]

    @property
    def raw_logprobs(self) -> NDArray[np.float32] | None:
        """[num_output_tokens] view, under softmax(logits); None unless asked for."""
        raw = self.results.raw_logprobs
        return None if raw is None else raw[: self.num_output_tokens]

    @property
    def policy_versions(self) -> NDArray[np.int64]:
        """[num_output_tokens] view: version of the weights that gave each result."""
        return self.results.versions[: self.num_output_tokens]

    @property
    def steps(self) -> NDArray[np.int64]:
        """[num_output_tokens] view: number of the step that gave each result."""
        return self.results.steps[: self.num_output_tokens]

    @property
    def phases(self) -> NDArray[np.uint8]:
        """[num_output_tokens] view: DECODE where the forward computed one token, itself sampled; else PREFILL."""
        return self.results.phases[: self.num_output_tokens]

    @property
    def cached_lens(self) -> NDArray[np.int32]:
        """[num_output_tokens] view: tokens of which that forward found keys and values in the prefix cache."""
        return self.results.cached_lens[: self.num_output_tokens]

    @property
    def ranks(self) -> NDArray[np.int16]:
        """[num_output_tokens] view: rank that computed each result."""
        return self.results.ranks[: self.num_output_tokens]
