"""Rollouts of a disturbed engine, generated again by a plain one: every span of a version, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from exactness_harness import differing_places, routing_differs

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout

COLUMNS = ("token_ids", "logprobs", "policy_logprobs", "entropy", "policy_versions")
PROVENANCE = ("steps", "phases", "cached_lens", "ranks")
VALUES = COLUMNS[:4]
"""Columns that a plain engine gives with the same bits."""
STREAMED = COLUMNS[:3]
"""Those of them that a stream brings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Values of one rollout, of one span, that the plain engine does not give."""

    index: int
    """Which rollout."""
    version: int
    column: str
    """One of VALUES, "routing", or "finish" where the rollout ended otherwise."""
    places: tuple[int, ...]
    """Output positions; of routing and of the end none."""
    count: int


def cut(rollout: Rollout, size: int) -> Rollout:
    """The rollout as an abort after `size` tokens would have left it."""
    columns = {name: getattr(rollout, name)[:size] for name in (*COLUMNS, *PROVENANCE)}
    raw, routing = rollout.raw_logprobs, rollout.routing
    if routing is not None:
        kept = len(rollout.prompt_token_ids) + size - 1 - routing.start
        routing = replace(routing, experts=routing.experts[:kept], weights=routing.weights[:kept])
    raw = None if raw is None else raw[:size]
    return replace(
        rollout, **columns, raw_logprobs=raw, routing=routing, finish_reason="abort", stop_reason=None, text=None
    )


def differences(
    plain: RolloutEngine, rollouts: Sequence[Rollout], version: int, values: Sequence[str] = VALUES
) -> list[Difference]:
    """What differs in the rollouts' spans of a version from what the plain engine, which is at it, gives.

    A span is continued from the tokens before it. One that ends its rollout, but for an abort, must end it by itself,
    of the same cause. Routing is compared where all of a rollout is of the version.
    """
    spans = [
        (index, start, end)
        for index, rollout in enumerate(rollouts)
        for start, end, of in rollout.version_spans
        if of == version
    ]
    if not spans:
        return []
    begun = [_continuation(rollouts[index], start, end) for index, start, end in spans]
    found = []
    for (index, start, end), again in zip(spans, plain.generate(resume_from=begun), strict=True):
        rollout = rollouts[index]
        for name in values:
            places = start + differing_places(getattr(rollout, name)[start:end], getattr(again, name)[start:])
            found.append(_difference(index, version, name, places.tolist(), len(places)))
        if _is_whole(rollout, end):
            ends = (rollout.finish_reason, rollout.stop_reason) != (again.finish_reason, again.stop_reason)
            found.append(_difference(index, version, "finish", [], int(ends)))
        if (start, end) == (0, len(rollout.token_ids)):
            found.append(_difference(index, version, "routing", [], routing_differs(rollout.routing, again.routing)))
    return [one for one in found if one.count]


def _continuation(rollout: Rollout, start: int, end: int) -> Rollout:
    """To be continued up to the span's end, or to wherever it ends by itself."""
    params = rollout.sampling_params
    limit = params.max_tokens if _is_whole(rollout, end) else end
    return replace(cut(rollout, start), sampling_params=replace(params, max_tokens=limit), routing=None)


def _is_whole(rollout: Rollout, end: int) -> bool:
    return rollout.finish_reason != "abort" and end == len(rollout.token_ids)


def _difference(index: int, version: int, column: str, places: list[int], count: int) -> Difference:
    return Difference(index=index, version=version, column=column, places=tuple(places), count=count)
