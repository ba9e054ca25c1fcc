"""A Paddle trainer with weights on the GPU, in a process of its own: python gpu_trainer.py MODEL DTYPE BUFFERS

MODEL is a config.json as text. Says {"pid"} when it is up, then does what it is told, one JSON list a line, and answers
each with a line: ["publish", seed, version] gives {"published"}, ["write"] waits for readers and writes zeros,
["flip", name] changes a bit of a tensor, published or not, ["close"].
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray

from zerokl.kernels.dispatch import device_memory
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.synthetic import random_tensors
from zerokl.weight_sync import DevicePublisher


class Trainer:
    """Parameters, written to by copies from the host: Paddle's own kernels need not run on this GPU."""

    def __init__(self, content: dict[str, Any], dtype: str, buffers: int) -> None:
        self._config, self._dtype = ModelConfig.from_json(content), dtype
        self._memory = device_memory()
        self._publisher = DevicePublisher(self._memory, "trainer", buffers=buffers)
        place = paddle.CUDAPlace(0)
        self.parameters = {
            name: paddle.to_tensor(self._patterns(values), place=place)
            for name, values in random_tensors(self._config, 0).items()
        }
        paddle.device.cuda.synchronize()  # copies on Paddle's streams, which ours does not wait for here

    def publish(self, seed: int, version: int) -> dict[str, Any]:
        self._publisher.withdraw()
        for name, values in random_tensors(self._config, seed, gain=2.0).items():
            self._write(name, self._patterns(values))
        return {"published": self._publisher.publish(self.parameters, version).to_bytes().hex()}

    def write(self) -> None:
        self._publisher.withdraw()
        for name, tensor in self.parameters.items():
            self._write(name, np.zeros(tensor.shape, np.uint16 if self._dtype == "bfloat16" else np.float32))

    def flip(self, name: str) -> None:
        values = np.ascontiguousarray(self.parameters[name].numpy())
        values.reshape(-1).view(np.uint8)[values.nbytes // 2] ^= 1
        self._write(name, values)

    def close(self) -> None:
        self._publisher.close()

    def _patterns(self, values: NDArray[np.float32]) -> NDArray[Any]:
        if self._dtype == "float32":
            return values
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    def _write(self, name: str, values: NDArray[Any]) -> None:
        calls = self._memory._calls
        calls.upload(self.parameters[name].data_ptr(), values.ctypes.data, values.nbytes)
        calls.synchronize()


def main() -> None:
    trainer = Trainer(json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    print(json.dumps({"pid": os.getpid()}), flush=True)
    for line in sys.stdin:
        order, *arguments = json.loads(line)
        print(json.dumps(getattr(trainer, order)(*arguments)), flush=True)
        if order == "close":
            break


if __name__ == "__main__":
    main()
