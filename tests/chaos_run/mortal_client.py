"""A client that streams long rollouts and tells each chunk, until it is killed.

    python mortal_client.py ENDPOINT SEED > lines of JSON

First {"prompts": [...], "params": {...}}, then a line for each chunk: {"index", "restarts", "start"} and its columns,
floats as the integers of their bits; {"ended": true} where the stream was over before the client was.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from zerokl.rollout.client import RolloutClient
from zerokl.rollout.sampling_params import SamplingParams


def main() -> None:
    endpoint, seed = sys.argv[1], int(sys.argv[2])
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, 96, random.integers(1, 30)).tolist() for _ in range(3)]
    params = {"max_tokens": 150, "ignore_eos": True, "seed": seed}
    tell({"prompts": prompts, "params": params})
    with RolloutClient(endpoint) as client:
        for chunk in client.stream(prompts, SamplingParams(**params), chunk=4):
            tell(
                {
                    "index": chunk.index,
                    "restarts": chunk.num_restarts,
                    "start": chunk.start,
                    "token_ids": chunk.token_ids.tolist(),
                    "logprobs": chunk.logprobs.view(np.int32).tolist(),
                    "policy_logprobs": chunk.policy_logprobs.view(np.int32).tolist(),
                    "policy_versions": chunk.policy_versions.tolist(),
                }
            )
    tell({"ended": True})


def tell(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
