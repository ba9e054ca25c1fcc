"""Requests that continue a rollout which an abort cut off: as after a preemption, with the same bits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from zerokl.rollout.admission import AdmissionLimits
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.request import Request
from zerokl.rollout.results import ResultArrays


def rollout_list(resume_from: Any) -> list[Rollout]:
    """The rollouts to continue, from one or a sequence. Raises ValueError for anything else."""
    given = [resume_from] if isinstance(resume_from, Rollout) else resume_from
    if not isinstance(given, Sequence) or not given or not all(isinstance(one, Rollout) for one in given):
        raise ValueError(f"resume_from must be a Rollout or a non-empty sequence of them, got {resume_from!r:.200}")
    return list(given)


def resumed_request(
    request_id: str, name: str, rollout: Rollout, limits: AdmissionLimits, eos_token_ids: Iterable[int]
) -> Request:
    """A request that holds the rollout's tokens and results and goes on after them.

    Seed, sample index and parameters are the rollout's, so the next token is the one that would have come. Raises
    ValueError, naming `name`, for a rollout that was not aborted or does not fit the model.
    """
    if rollout.finish_reason != "abort":
        raise ValueError(f"{name} must be a rollout cut by an abort, got finish_reason={rollout.finish_reason!r}")
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
    request.take_over(rollout.token_ids, _results(name, rollout))
    request.num_preemptions = rollout.num_preemptions
    request.num_restarts = rollout.num_restarts
    request.num_kept_updates = rollout.num_kept_updates
    return request


def _results(name: str, rollout: Rollout) -> ResultArrays:
    size, want_raw = len(rollout.token_ids), rollout.sampling_params.raw_logprobs
    results = ResultArrays(size, want_raw=want_raw)
    columns = {
        "logprobs": results.logprobs,
        "policy_logprobs": results.policy_logprobs,
        "entropy": results.entropy,
        "policy_versions": results.versions,
        **({} if results.raw_logprobs is None else {"raw_logprobs": results.raw_logprobs}),
    }
    for column, target in columns.items():
        given = getattr(rollout, column)
        if given is None or len(given) != size:
            raise ValueError(f"{name}.{column} must have an entry for each of its {size} tokens")
        target[:] = given
    results.size = size
    return results
