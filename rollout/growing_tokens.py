"""A request's tokens and results, and how they grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.result_columns import ResultColumns
from zerokl.rollout.results import CELL, ResultArrays, Rows, enlarged
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.sampling_state import SamplingState

if TYPE_CHECKING:
    from zerokl.rollout.row_log import RowLog

RequestKind = Literal["generate", "score"]

FIRST_OUTPUT_CAPACITY = 64


class GrowingTokens(ResultColumns):
    """A sequence as those see it who give it tokens and results; `Request` adds how far it is."""

    __slots__ = (
        "_tokens",
        "compute_target",
        "kind",
        "lane",
        "log",
        "max_num_tokens",
        "num_output_tokens",
        "num_prompt_tokens",
        "num_tokens",
        "request_id",
        "results",
        "sampling",
        "sampling_params",
    )

    request_id: str
    kind: RequestKind
    sampling: SamplingState
    sampling_params: SamplingParams

    def _begin_tokens(self, tokens: NDArray[np.int32], num_prompt_tokens: int) -> None:
        """At first; `sampling_params` and `kind` are set before."""
        sampling_params, kind = self.sampling_params, self.kind
        self.num_prompt_tokens = num_prompt_tokens
        self.num_tokens = len(tokens)
        self.num_output_tokens = 0
        self.max_num_tokens = len(tokens) + (sampling_params.max_tokens if kind == "generate" else 0)
        """Prompt and output tokens at its longest."""
        self.compute_target = len(tokens) if kind == "generate" else len(tokens) - 1
        """Tokens to compute: those known, for a score request without the last one. While a step is under way that
        draws the next token, that one too."""
        if kind == "generate":
            capacity = min(sampling_params.max_tokens, FIRST_OUTPUT_CAPACITY)
            self._tokens: NDArray[np.int32] = np.concatenate([tokens, np.zeros(capacity, np.int32)])
        else:
            capacity = len(tokens) - num_prompt_tokens
            self._tokens = tokens.copy()
        self.log: RowLog | None = None
        self.lane = -1
        """Of the log, where rows wait that `results` lacks: `settle` before anything is read."""
        self.results = ResultArrays(capacity, want_raw=sampling_params.raw_logprobs)

    def take_token(self, token: int, cell: Any) -> bool:
        """Grow by a token that was drawn; `cell` is its row, of `zerokl.rollout.results.cells_of`.

        False where the request goes on without a doubt; else it may be the first token, or the last.
        """
        if self.log is not None:
            self.log.leave(self)
        at, size, results, sampling = self.num_output_tokens, self.num_tokens, self.results, self.sampling
        if at == results.capacity:
            results.reserve(at + 1)
        results.cells[at] = cell
        if size == len(self._tokens):
            self._tokens = enlarged(self._tokens, 2 * size)
        self._tokens[size] = token
        self.num_output_tokens = at + 1
        self.num_tokens = self.compute_target = size = size + 1
        if sampling.history is not None:
            sampling.history.append(token)
        return at == 0 or token in sampling.stop_ids or size == self.max_num_tokens or sampling.has_stop_strings

    def settle(self) -> None:
        """Take what waits in the log. On the scheduler's thread, while the request runs."""
        if self.log is not None:
            self.log.settle(self)

    def store(self, tokens: NDArray[np.int32], cells: NDArray[np.void]) -> None:
        """Keep the last n tokens [n] and their rows [n], of type CELL; they count as known already."""
        size, end = len(tokens), self.num_tokens
        self.results.put(self.num_output_tokens - size, cells)
        if end > len(self._tokens):
            self._tokens = enlarged(self._tokens, max(end, 2 * len(self._tokens)))
        self._tokens[end - size : end] = tokens

    def take_rows(self, rows: Rows) -> None:
        """The next forced tokens of a score request are rated by these rows."""
        self.results.put(self.num_output_tokens, rows.view(CELL))
        begin = self.num_prompt_tokens + self.num_output_tokens
        self.num_output_tokens += len(rows)
        if self.sampling.history is not None:
            for token in self._tokens[begin : begin + len(rows)].tolist():
                self.sampling.history.append(token)

    def take_over(self, token_ids: NDArray[np.int32], results: ResultArrays) -> None:
        """Go on after N tokens [N] that an earlier request sampled, with their results; before it is queued."""
        assert self.kind == "generate" and not self.num_output_tokens, self.request_id
        self._tokens = np.concatenate([self.prompt_token_ids, token_ids, np.zeros(FIRST_OUTPUT_CAPACITY, np.int32)])
        self.results = results
        self.num_output_tokens = len(token_ids)
        self.num_tokens = self.compute_target = self.num_prompt_tokens + len(token_ids)
        if self.sampling.history is not None:
            for token in token_ids.tolist():
                self.sampling.history.append(token)
