"""The trainer of part `sync`: random weights of a model on the GPU. python sync_trainer.py MODEL BUFFERS

Says {"bytes", "tensors"}, then for each line "VERSION" on its input writes new values, publishes them and says
{"begun", "published", "size"}, and as many bytes: the encoded publication. `begun` and `published` are the system's
monotonic clock when it began to publish and when it had, in seconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import paddle

from models import fill, model_folder
from zerokl.kernels.dispatch import device_memory
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.layout import expected_tensors
from zerokl.weight_sync import DevicePublisher


def main() -> None:
    name, buffers = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        config = ModelConfig.from_json(str(model_folder(name, Path(folder))))
    memory = device_memory()
    parameters = {}
    for tensor, shape in expected_tensors(config).items():
        parameters[tensor] = paddle.empty(list(shape), "bfloat16")
        if len(shape) == 1:
            ones = np.full(shape, 0x3F80, np.uint16)
            parameters[tensor] = paddle.to_tensor(ones, place=paddle.CUDAPlace(0))
    with DevicePublisher(memory, "sync", buffers=buffers) as publisher:
        size = sum(int(np.prod(tensor.shape)) * 2 for tensor in parameters.values())
        print(json.dumps({"bytes": size, "tensors": len(parameters)}), flush=True)
        for line in sys.stdin:
            publisher.withdraw()
            for tensor, values in parameters.items():
                if len(values.shape) == 2:
                    fill(values, tensor, int(line))
            paddle.device.cuda.current_stream().synchronize()
            begun = time.monotonic()
            published = publisher.publish(parameters, int(line))
            ended = time.monotonic()
            encoded = published.to_bytes()
            answer = json.dumps({"begun": begun, "published": ended, "size": len(encoded)})
            sys.stdout.buffer.write(b"%s\n%s" % (answer.encode(), encoded))
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
