"""Requests that continue a rollout which an abort cut off: as after a preemption, with the same bits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from zerokl.rollout.admission import AdmissionLimits
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.request import Request
from zerokl.rollout.results import CELL, ROW, ResultArrays
from zerokl.rollout.routing import RolloutRouting


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingForm:
    """What routing an engine returns; a rollout's must be of the same form to be continued."""

    returned: Literal["output", "all"]
    num_mixtures: int
    top_k: int

    def check(self, name: str, rollout: Rollout) -> RolloutRouting | None:
        """The rollout's routing, or None where it is all to be found again. Raises ValueError for another form."""
        routing = rollout.routing
        if routing is None:
            return None
        num_prompt, size = len(rollout.prompt_token_ids), len(rollout.token_ids)
        start = 0 if self.returned == "all" else num_prompt - 1
        longest = num_prompt + size - 1 - start
        shape = (len(routing.experts) if not size else longest, self.num_mixtures, self.top_k)
        fits = routing.start == start and routing.experts.shape == routing.weights.shape == shape
        if not fits or shape[0] > longest or routing.experts.dtype.kind != "i":
            raise ValueError(
                f"{name}.routing must start at {start} and have shape ({longest}, {self.num_mixtures}, {self.top_k}), "
                f"got {routing.start} and {routing.experts.shape}"
            )
        return routing


def rollout_list(resume_from: Any) -> list[Rollout]:
    """The rollouts to continue, from one or a sequence. Raises ValueError for anything else."""
    given = [resume_from] if isinstance(resume_from, Rollout) else resume_from
    if not isinstance(given, Sequence) or not given or not all(isinstance(one, Rollout) for one in given):
        raise ValueError(f"resume_from must be a Rollout or a non-empty sequence of them, got {resume_from!r:.200}")
    return list(given)


def resumed_request(
    request_id: str,
    name: str,
    rollout: Rollout,
    limits: AdmissionLimits,
    eos_token_ids: Iterable[int],
    routing: RoutingForm | None,
) -> Request:
    """A request that holds the rollout's tokens and results and goes on after them.

    Seed, sample index and parameters are the rollout's, so the next token is the one that would have come. Raises
    ValueError, naming `name`, for a rollout that was not aborted or does not fit the model.
    """
    if rollout.finish_reason != "abort":
        raise ValueError(f"{name} must be a rollout cut by an abort, got finish_reason={rollout.finish_reason!r}")
    if rollout.loss_mask is not None:
        raise ValueError(f"{name} must have no loss_mask: a whole conversation is gone on with by Session.resume")
    params, size = rollout.sampling_params, len(rollout.token_ids)
    if size >= params.max_tokens:
        raise ValueError(f"{name} must hold fewer tokens than its max_tokens ({params.max_tokens}), got {size}")
    request = Request.generate(
        request_id,
        rollout.prompt_token_ids,
        params,
        seed=rollout.seed,
        sample_index=rollout.sample_index,
        prompt_index=rollout.prompt_index,
        eos_token_ids=eos_token_ids,
    )
    try:
        limits.check(request)
        if size:
            limits.check_prompt(rollout.token_ids, "token_ids")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    request.routing = None if routing is None else routing.check(name, rollout)
    request.take_over(rollout.token_ids, _results(name, rollout))
    request.num_preemptions = rollout.num_preemptions
    request.num_restarts = rollout.num_restarts
    request.num_kept_updates = rollout.num_kept_updates
    return request


def _results(name: str, rollout: Rollout) -> ResultArrays:
    size, want_raw = len(rollout.token_ids), rollout.sampling_params.raw_logprobs
    results = ResultArrays(size, want_raw=want_raw)
    rows = np.zeros(size, ROW)
    for column in ROW.names or ():
        if column == "raw_logprobs" and not want_raw:
            continue
        given = getattr(rollout, column)
        if given is None or len(given) != size:
            raise ValueError(f"{name}.{column} must have an entry for each of its {size} tokens")
        rows[column] = given
    results.put(0, rows.view(CELL))
    return results
