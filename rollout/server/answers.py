"""Results of calls as messages of moderate size, made one at a time as the client takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.mismatch import ReportedTokens
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.protocol.codec import Message
from zerokl.rollout.protocol.records import rollouts_to_wire
from zerokl.rollout.sampling_params import SamplingParams

if TYPE_CHECKING:
    from zerokl.rollout.engine import RolloutEngine

PIECE_BYTES = 256 << 10
"""Size at which a result is cut; a single rollout is never."""
_ROW_BYTES = 512
"""A rollout's fields beside its arrays."""
_TOKEN_BYTES = 32
"""A sampled token's entries in all arrays, and its text."""
_MODEL_FILES = ("config.json", "generation_config.json")


def result_cost(
    prompt_lens: NDArray[np.int64], samples: NDArray[np.int64], params: Sequence[SamplingParams] | None
) -> int:
    """Bytes of the results of a generate call at their longest."""
    longest = np.array([one.max_tokens for one in params or [SamplingParams()]], np.float64)
    return int((samples * (4.0 * prompt_lens + _ROW_BYTES + _TOKEN_BYTES * longest)).sum())


def rollout_messages(call: int, rollouts: Sequence[Rollout]) -> Iterator[Message]:
    """`rollouts` messages, the last one with their number; a `result` where there are none."""
    sizes = [
        _ROW_BYTES + 4 * len(rollout.prompt_token_ids) + _TOKEN_BYTES * len(rollout.token_ids) for rollout in rollouts
    ]
    for start, end in cut(sizes):
        body, arrays = rollouts_to_wire(rollouts[start:end])
        yield Message(kind="rollouts", call=call, body={**_piece(start, end, len(rollouts)), **body}, arrays=arrays)
    if not rollouts:
        yield Message(kind="result", call=call, body={"value": 0})


def score_messages(call: int, scores: Sequence[NDArray[np.float32]]) -> Iterator[Message]:
    """`scores` messages, the last one with the number of sequences; a `result` where there are none."""
    for start, end in cut([4 * len(score) + 4 for score in scores]):
        arrays = {
            "lens": np.array([len(score) for score in scores[start:end]], np.int32),
            "logprobs": np.concatenate(scores[start:end]),
        }
        yield Message(kind="scores", call=call, body=_piece(start, end, len(scores)), arrays=arrays)
    if not scores:
        yield Message(kind="result", call=call, body={"value": 0})


def _piece(start: int, end: int, total: int) -> dict[str, int]:
    return {"first": start, "total": total} if end == total else {"first": start}


def cut(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive items of about PIECE_BYTES together."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > PIECE_BYTES:
            yield start, index
            start, total = index, 0
        total += size
    if sizes:
        yield start, len(sizes)


def expert_load(engine: RolloutEngine, reset: bool) -> dict[str, Any]:
    """The engine's expert load as plain values: `shape` [M, X], and each count's entries row by row."""
    load = engine.expert_load(reset=reset)
    counts = {name: getattr(load, name).reshape(-1).tolist() for name in ("last_step", "total")}
    return {"shape": list(load.total.shape), **counts}


def telemetry(engine: RolloutEngine, server_facts: Mapping[str, float]) -> dict[str, Any]:
    """The engine's telemetry with the server's counters among its metrics."""
    seen = engine.telemetry()
    return {**seen, "metrics": {**seen["metrics"], **server_facts}}


def take_report(engine: RolloutEngine, message: Message) -> dict[str, Any]:
    """Have the engine take what a trainer reports. Raises ValueError for arrays that do not fit."""
    report, alarms = engine.receive_trainer_logprobs(ReportedTokens(**message.arrays), message.body.get("version"))
    return {"report": report.to_dict(), "alarm": alarms}


def describe_engine(engine: RolloutEngine, call: int) -> Message:
    """The engine's configuration as a `result`; model's and tokenizer's files, one after the other, are its data."""
    config = engine.config
    files = [Path(config.model) / name for name in _MODEL_FILES]
    tokenizer = Path(config.tokenizer or config.model)
    files.append(tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer)
    contents = {
        name: path.read_bytes()
        for name, path in zip((*_MODEL_FILES, "tokenizer.json"), files, strict=True)
        if path.is_file()
    }
    value: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "files": [[name, len(content)] for name, content in contents.items()],
    }
    data = np.frombuffer(b"".join(contents.values()), np.uint8)
    return Message(kind="result", call=call, body={"value": value}, arrays={"data": data})
