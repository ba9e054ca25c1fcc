"""A trainer with tensors in a fake GPU, in a process of its own: python device_trainer.py FOLDER BUFFERS

Publishes version 1, says {"pid", "published"} and then does what it is told, a line each: "publish" (other values, the
next version), "publish, no checksums" (they never come), "publish, no checksums, fork" (there is a child that lives
until the input ends), "write" (to its tensors), "close". It is killed by whoever started it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import numpy as np

from zerokl.weight_sync import DevicePublisher

sys.path.append(str(Path(__file__).resolve().parents[1]))

from fake_gpu import FakeGpu, FakeTensor


def fill(tensors: dict[str, FakeTensor], seed: int) -> None:
    random = np.random.default_rng(seed)
    for tensor in tensors.values():
        values = random.standard_normal(tensor.shape).astype(np.float32).view(np.uint32)
        tensor.values[...] = values if tensor.dtype == "paddle.float32" else values >> 16


def main() -> None:
    gpu, shapes = FakeGpu(Path(sys.argv[1])), json.loads(sys.argv[3])
    tensors = {name: gpu.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
    publisher, version = DevicePublisher(gpu, "trainer", buffers=int(sys.argv[2])), 0
    order = "publish"
    while order != "close":
        if order.startswith("publish"):
            version += 1
            if order.startswith("publish, no checksums"):
                gpu.before_checksums = threading.Event().wait
            fill(tensors, version)
            published = publisher.publish(tensors, version)
            if order.endswith("fork") and not os.fork():
                os.read(0, 1)
                os._exit(0)
            print(json.dumps({"pid": os.getpid(), "published": published.to_bytes().hex()}), flush=True)
        elif order == "write":
            publisher.withdraw()
            fill(tensors, 100)
            print("null", flush=True)
        order = sys.stdin.readline().strip() or "close"
    publisher.close()
    print("null", flush=True)


if __name__ == "__main__":
    main()
