"""Trainers that die where they are told to: NumPy only, forked from one process that has imported everything.

    python trainer_host.py < lines of JSON > lines of JSON

An order is {"seed", "version", "shapes", "die", "limit"}; a trainer publishes the tensors of `seed`. `die` is None,
"sent" (when it has said so) or one of those of `dying_trainer.arm`. The answer is {"pid", "status", "published" (hex,
or None), "error"}. A trainer that lives closes its publisher at the next order.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np

from zerokl.weight_sync import WeightPublisher
from zerokl.weight_sync.errors import WeightSyncError

sys.path.append(str(Path(__file__).resolve().parents[1]))

from dying_trainer import arm, die_now


def tensors_of(order: dict[str, Any]) -> dict[str, Any]:
    random = np.random.default_rng(order["seed"])
    return {name: (random.standard_normal(shape) * 0.1).astype(np.float32) for name, shape in order["shapes"].items()}


def train(order: dict[str, Any], answers: int, hold: int) -> None:
    if order.get("limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    arm(order["die"])
    answer: dict[str, Any] = {"published": None, "error": None}
    with WeightPublisher("crash") as made:
        try:
            answer["published"] = made.publish(tensors_of(order), order["version"]).to_bytes().hex()
        except WeightSyncError as error:
            answer["error"] = [type(error).__name__, str(error)]
        os.write(answers, json.dumps(answer).encode() + b"\n")
        os.close(answers)
        if order["die"] == "sent":
            die_now()
        os.read(hold, 1)
    os._exit(0)


def main() -> None:
    previous: list[tuple[int, int]] = []
    for line in sys.stdin:
        for pid, hold in previous:
            os.close(hold)
            os.waitpid(pid, 0)
        previous.clear()
        order = json.loads(line)
        if order is None:
            print("null", flush=True)
            continue
        readable, writable = os.pipe()
        waiting, hold = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(hold)
            os.close(readable)
            train(order, writable, waiting)
        os.close(writable)
        os.close(waiting)
        with os.fdopen(readable) as stream:
            answer = json.loads(stream.readline() or '{"published": null, "error": null}')
        if order["die"]:
            os.close(hold)
            answer["status"] = os.waitpid(pid, 0)[1]
        else:
            previous.append((pid, hold))
        print(json.dumps({"pid": pid, **answer}), flush=True)


if __name__ == "__main__":
    main()
