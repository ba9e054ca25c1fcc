"""What a trainer's routers choose for rollouts: the truth that recorded routing is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.integrations.batch import pack_rollouts
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.routing_capture import RoutingCapture
from zerokl.rollout.step_order import RoutedTokens


@contextmanager
def captured(model: Any) -> Iterator[RoutingCapture[Any]]:
    """Inside, `take` of what is given holds the routing of the PolicyModel's last forward."""
    plain = model._forward.ops
    to_host = plain.device.get if model.device == "gpu" else np.asarray
    model._forward.ops = RoutingCapture(plain, model.config.moe, to_host)
    try:
        yield model._forward.ops
    finally:
        model._forward.ops = plain


def trainer_routing(model: Any, rollouts: Sequence[Rollout], **replay: Any) -> RoutedTokens:
    """[M, T, k] of the rollouts packed end to end, by the trainer's own forward."""
    batch = pack_rollouts(rollouts)
    with captured(model) as capture:
        model.logprobs(batch.token_ids, batch.cu_seqlens, rows=batch.rows, **replay)
        return capture.take()


def packed_logprobs(model: Any, rollouts: Sequence[Rollout], **replay: Any) -> NDArray[np.float32]:
    """[R] of the sampled tokens."""
    batch = pack_rollouts(rollouts)
    logprobs, _ = model.logprobs(batch.token_ids, batch.cu_seqlens, rows=batch.rows, **replay)
    return np.asarray(logprobs, np.float32)


def per_rollout(array: NDArray[Any], rollouts: Sequence[Rollout]) -> list[NDArray[Any]]:
    """[M, T, k] cut into [positions, M, k] of each rollout, its last token left out."""
    ends = np.cumsum([len(one.prompt_token_ids) + len(one.token_ids) for one in rollouts])
    return [part.swapaxes(0, 1)[:-1] for part in np.split(array, ends[:-1], axis=1)]
