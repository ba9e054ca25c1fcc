"""What an engine refuses at submit: requests that could never run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.request import Request
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.token_ids import as_token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """The bounds that a request must keep. Everything is checked before anything is queued, all by ValueError."""

    max_model_len: int
    """Prompt and output tokens at most."""
    num_blocks: int
    """Blocks in the KV pool: one request may use them all."""
    block_size: int
    vocab_size: int

    @classmethod
    def of_engine(cls, config: EngineConfig, vocab_size: int) -> AdmissionLimits:
        """Those of an engine with these options, which must be resolved."""
        assert config.max_model_len is not None and config.num_blocks is not None, "an unresolved config"
        return cls(
            max_model_len=config.max_model_len,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            vocab_size=vocab_size,
        )

    def check_prompt(self, token_ids: ArrayLike, name: str = "prompt_token_ids") -> NDArray[np.int32]:
        """`token_ids` as int32[N]; non-empty, flat, within the vocabulary, not longer than the model."""
        tokens = as_token_ids(name, token_ids)
        if len(tokens) > self.max_model_len:
            raise ValueError(f"{name} must hold at most max_model_len ({self.max_model_len}) tokens, got {len(tokens)}")
        highest = int(tokens.max())
        if highest >= self.vocab_size:
            raise ValueError(f"{name} must hold token ids below vocab_size ({self.vocab_size}), got {highest}")
        return tokens

    def check_params(self, params: SamplingParams) -> None:
        """Token ids of the parameters are within the vocabulary."""
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias or ())):
            highest = max(ids, default=0)
            if highest >= self.vocab_size:
                raise ValueError(f"{name} must hold token ids below vocab_size ({self.vocab_size}), got {highest}")

    def check(self, request: Request) -> None:
        """The whole request: its tokens, its parameters, and room for it at its longest."""
        self.check_prompt(request.token_ids, "prompt_token_ids" if request.kind == "generate" else "token_ids")
        self.check_params(request.sampling_params)
        self._check_something_is_allowed(request)
        longest = request.num_tokens
        if request.kind == "generate":
            max_tokens = request.sampling_params.max_tokens
            longest += max_tokens
            if longest > self.max_model_len:
                raise ValueError(
                    f"max_tokens ({max_tokens}) after a prompt of {request.num_tokens} tokens makes {longest}, "
                    f"over max_model_len ({self.max_model_len})"
                )
        # The last token is never computed: it has no next row to give.
        needed = -(-(longest - 1) // self.block_size)
        if needed > self.num_blocks:
            raise ValueError(
                f"{longest} tokens need {needed} KV blocks of {self.block_size}, over num_blocks ({self.num_blocks}); "
                "raise kv_cache_bytes or num_blocks, or ask for fewer tokens"
            )

    def _check_something_is_allowed(self, request: Request) -> None:
        # The first row: min_tokens bans the stop tokens there.
        _, bias = request.sampling.bias(0)
        if not len(bias):
            return
        banned = int(np.isneginf(bias).sum())
        if banned == self.vocab_size:
            raise ValueError(
                f"logit_bias and min_tokens must leave a token to draw, got a ban on all {banned} of the vocabulary"
            )
