"""Whether each request was answered once, with the bits that a fresh engine gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from exactness_harness import differing, differing_places
from span_replay import PROVENANCE, STREAMED, VALUES, Difference, differences

from chaos_run.layouts import Layout
from chaos_run.traffic import Asked, Scored, seeded
from chaos_run.weights import tensors_of
from zerokl.rollout.client import RolloutClient
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams

_REQUESTS_AT_ONCE = 2000


@dataclass(kw_only=True)
class Verdict:
    """Counts of requests, and what is wrong in words."""

    requests: int = 0
    answered_once: int = 0
    bit_equal: int = 0
    """Requests answered once whose answer is a fresh engine's, and the undisturbed run's where there was one."""
    aborted: int = 0
    tokens: int = 0
    partial_streams: int = 0
    """Rollouts of clients that died, compared as far as they were heard."""
    scores: int = 0
    updated_in_flight: int = 0
    """Answers with tokens of several versions."""
    wrong: list[str] = field(default_factory=list)
    evidence: list[dict[str, Any]] = field(default_factory=list)
    """Of the first answers that differ."""


def count_answers(asked: Sequence[Asked]) -> Verdict:
    """Whether every request has one answer; nothing is compared yet."""
    verdict = Verdict()
    for one in asked:
        requests, once = one.keys.total(), one.num_answered_once
        verdict.requests += requests
        verdict.answered_once += once
        if once != requests:
            missing = f"{requests - once} of {requests} requests of a call were not answered once"
            verdict.wrong.append(f"{missing}: {one.error}")
        if one.streamed_wrong:
            verdict.wrong.append(f"a stream brought {one.streamed_wrong} values that are not its answer's")
    return verdict


def compare(
    verdict: Verdict,
    layout: Layout,
    model: Path,
    asked: Sequence[Asked],
    partial: Sequence[Rollout],
    scored: Sequence[Scored],
    *,
    last_version: int,
    undisturbed: RolloutClient | None = None,
) -> None:
    """Hold all answers against a fresh one-rank engine, brought to each version in turn, and against an undisturbed
    server of the same layout if one is given."""
    answers = [rollout for one in asked for answer in one.answers for rollout in answer]
    wrong = {index for index, rollout in enumerate(answers) if not _can_be_held(rollout, last_version)}
    unlike: Sequence[Scored] = ()
    with layout.plain_engine(model) as plain:
        for version in range(last_version + 1):
            if version:
                plain.update_weights(tensors_of(model, version))
            unlike = _compare_scores(verdict, plain, scored if not version else unlike, version)
            for one in differences(plain, answers, version):
                wrong.add(one.index)
                verdict.evidence.append(evidence(one, answers[one.index]))
            for one in differences(plain, partial, version, STREAMED):
                if one.column != "routing":  # a stream has none
                    verdict.wrong.append(f"a client that died had been told other values: {one}")
    if undisturbed is not None:
        wrong |= set(_unlike_undisturbed(undisturbed, answers))
    verdict.scores = len(scored)
    verdict.bit_equal = verdict.answered_once - len(wrong)
    verdict.aborted = sum(one.finish_reason == "abort" for one in answers)
    verdict.tokens = sum(len(one.token_ids) for one in answers)
    verdict.updated_in_flight = sum(len(one.version_spans) > 1 for one in answers)
    verdict.partial_streams = sum(len(one.token_ids) > 0 for one in partial)
    if wrong:
        verdict.wrong.append(f"{len(wrong)} answers are not those of a fresh engine")


def _can_be_held(rollout: Rollout, last_version: int) -> bool:
    """Whether all of it is of versions that served, and only an abort ended it before its first token."""
    versions = rollout.policy_versions
    return bool(((versions >= 0) & (versions <= last_version)).all()) and (
        len(versions) > 0 or rollout.finish_reason == "abort"
    )


def _compare_scores(verdict: Verdict, plain: RolloutEngine, scored: Sequence[Scored], version: int) -> list[Scored]:
    """Hold scores against an engine that is at a version, which must be the pinned one, 0; gives those that differ.

    Of those that differ a later version may tell that they are its own.
    """
    unlike = []
    for one in scored:
        if one.error is not None:
            verdict.wrong.append(f"a score was not answered: {one.error}")
            continue
        (expected,) = plain.score([one.tokens])
        places = differing_places(one.logprobs, expected)
        if len(places):
            unlike.append(one)
        if len(places) and not version:
            where = f"{len(places)} of {len(expected)} values, from {places[0]} on"
            verdict.wrong.append(f"a score under the pinned weights is not theirs: {where}")
        if not len(places) and version:
            verdict.wrong.append(f"a score under the pinned weights is version {version}'s")
    return unlike


def _unlike_undisturbed(client: RolloutClient, answers: Sequence[Rollout]) -> Iterator[int]:
    """Places of the answers that the undisturbed server, asked for all of them again, does not give."""
    for first in range(0, len(answers), _REQUESTS_AT_ONCE):
        part = answers[first : first + _REQUESTS_AT_ONCE]
        wanted = {_key(rollout): rollout for rollout in part}
        whole = client.generate(
            [rollout.prompt_token_ids for rollout in wanted.values()], [seeded(rollout) for rollout in wanted.values()]
        )
        keys = list(wanted)
        samples = {(keys[rollout.prompt_index], rollout.sample_index): rollout for rollout in whole}
        for index, rollout in enumerate(part):
            if _differs(rollout, samples[_key(rollout), rollout.sample_index]):
                yield first + index


def _key(rollout: Rollout) -> tuple[bytes, int, str]:
    """Of the prompt as it was asked for, all its samples together."""
    return rollout.prompt_token_ids.tobytes(), rollout.seed, _text(rollout.sampling_params)


def _text(params: SamplingParams) -> str:
    return repr(dataclasses.asdict(replace(params, seed=0)))


def _differs(rollout: Rollout, whole: Rollout) -> bool:
    """Whether an answer is not the undisturbed one; an aborted one not its beginning."""
    size = len(rollout.token_ids)
    is_shorter = rollout.finish_reason != "abort" and (
        size != len(whole.token_ids) or rollout.finish_reason != whole.finish_reason
    )
    return is_shorter or any(differing(getattr(rollout, name), getattr(whole, name)[:size]) for name in VALUES)


def evidence(difference: Difference, rollout: Rollout) -> dict[str, Any]:
    """All that is known of where the values came from."""
    around = slice(max(0, difference.places[0] - 2), difference.places[0] + 3) if difference.places else slice(0, 0)
    return {
        "column": difference.column,
        "version": difference.version,
        "count": difference.count,
        "places": list(difference.places[:20]),
        "num_tokens": len(rollout.token_ids),
        "prompt": rollout.prompt_token_ids.tolist(),
        "spans": rollout.version_spans,
        "seed": rollout.seed,
        "sample_index": rollout.sample_index,
        "params": _text(rollout.sampling_params),
        "finish_reason": rollout.finish_reason,
        "preemptions": rollout.num_preemptions,
        "restarts": rollout.num_restarts,
        "cached": rollout.num_cached_tokens,
        "provenance_around_first": {name: getattr(rollout, name)[around].tolist() for name in PROVENANCE},
        "ranks": np.unique(rollout.ranks).tolist(),
    }
