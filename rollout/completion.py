"""When a request is done, and why."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from zerokl.rollout.request import FinishReason, Request


class StopChecker(Protocol):
    """Looks for stop strings; the scheduler knows no text."""

    def check(self, request: Request) -> str | None:
        """The stop string that the output now holds, if any.

        Called once per sampled token of a request with `sampling_params.stop`, from its min_tokens on.
        """
        ...


class End(NamedTuple):
    """`reason` is a stop token id or a stop string, None where neither ended the request."""

    finish_reason: FinishReason
    reason: int | str | None = None


def find_end(request: Request, token: int, stop_checker: StopChecker | None) -> End | None:
    """Why a request ends with the result just recorded, of which `token` is the sampled one; None if it goes on.

    A stop token comes before a stop string, and both come before max_tokens.
    """
    if request.kind == "score":
        return End("length") if request.num_computed_tokens >= request.compute_target else None
    params = request.sampling_params
    if token in request.sampling.stop_ids:
        return End("stop", token)
    if params.stop and stop_checker is not None and request.num_output_tokens >= params.min_tokens:
        string = stop_checker.check(request)
        if string is not None:
            return End("stop", string)
    return End("length") if request.num_output_tokens >= params.max_tokens else None
