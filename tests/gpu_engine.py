"""An engine in the process that runs this, on a GPU of its own: python gpu_engine.py OPTIONS

OPTIONS are fields of EngineConfig as JSON. Says {"pid"} when it is up, then does what it is told, one JSON list a line,
and answers each with a line: ["digest"], ["update", publication as hex] (its version, or the error), ["close"].
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from typing import Any

import numpy as np

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.weight_sync import PublishedDeviceWeights, WeightSyncError

PROMPTS = [list(range(5 + index, 9 + 7 * index)) for index in range(1, 12)]
PARAMS = [
    SamplingParams(n=2, max_tokens=40, seed=100 + index, ignore_eos=True, **({"top_p": 0.9} if index % 3 else {}))
    for index in range(len(PROMPTS))
]


def digest(engine: RolloutEngine) -> str:
    """Of the bits of some rollouts: tokens, logprobs, policy logprobs and entropies."""
    engine.reset_prefix_cache()
    made = hashlib.sha256()
    for rollout in engine.generate(PROMPTS, PARAMS):
        for name in ("token_ids", "logprobs", "policy_logprobs", "entropy"):
            made.update(np.ascontiguousarray(getattr(rollout, name)).tobytes())
    return made.hexdigest()


def update(engine: RolloutEngine, published: str) -> dict[str, Any]:
    """An update from a GPU's memory."""
    try:
        return {"version": engine.update_weights(PublishedDeviceWeights.from_bytes(bytes.fromhex(published)))}
    except WeightSyncError as error:
        return {"error": type(error).__name__, "text": str(error)}


def main() -> None:
    with RolloutEngine(EngineConfig.from_dict(json.loads(sys.argv[1]))) as engine:
        print(json.dumps({"pid": os.getpid()}), flush=True)
        for line in sys.stdin:
            order, *arguments = json.loads(line)
            if order == "close":
                break
            answer = {"digest": digest(engine)} if order == "digest" else update(engine, *arguments)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
