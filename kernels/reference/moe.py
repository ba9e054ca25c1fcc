"""Definition of the mixture of experts, float64, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.experts import Replay, RouterSpec, Routing
from zerokl.kernels.reference import elementwise

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ReferenceExpert:
    """The matrices of a SwiGLU block: gate and up [F, E], down [E, F]."""

    gate: Floats
    up: Floats
    down: Floats


def route(logits: Floats, correction: Floats | None, spec: RouterSpec, replay: Replay | None) -> Routing[Floats]:
    """Top-k of softmax(logits [T, X]) + correction, lower ids first among equals, but for rows that `replay` gives."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=-1, keepdims=True)
    scores = probabilities if correction is None else probabilities + correction
    best = np.argsort(-scores, axis=-1, kind="stable")[:, : spec.top_k].astype(np.int32)
    ids = best if replay is None else np.where(replay.experts < 0, best, replay.experts)
    weights = np.take_along_axis(probabilities, ids.astype(np.int64), axis=-1)
    if spec.normalise:
        weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), spec.norm_min)
    if replay is not None:
        replay.put_weights(weights)
    return Routing(ids, weights)


def moe(x: Floats, routing: Routing[Floats], experts: Sequence[ReferenceExpert], shared: Floats | None) -> Floats:
    """The weighted sum of what each token's experts give, plus `shared` [T, E]."""
    out = np.zeros_like(x)
    for token, (ids, weights) in enumerate(zip(routing.experts, routing.weights, strict=True)):
        for expert, weight in zip((experts[index] for index in ids), weights, strict=True):
            inner = elementwise.swiglu(expert.gate @ x[token], expert.up @ x[token])
            out[token] += weight * (expert.down @ inner)
    return out if shared is None else out + shared
