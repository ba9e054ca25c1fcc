"""Publications of a GPU of ordinary bytes: tensors, what a receiver sees of them, and a trainer in another process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from fake_gpu import FakeGpu, FakeTensor, elements
from leftovers import wait_for_end
from numpy.typing import NDArray

from zerokl.weight_sync import PublishedDeviceWeights
from zerokl.weight_sync.device_receiver import DeviceLease, DeviceMappings

SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "embed": ((50, 24), "bfloat16"),
    "norm": ((7,), "float32"),
    "scalar": ((), "float32"),
    "empty": ((0, 4), "bfloat16"),
    "deep": ((2, 3, 5), "bfloat16"),
}
Copies = dict[str, NDArray[Any]]


def tensors_on(gpu: FakeGpu, seed: int = 0) -> dict[str, FakeTensor]:
    random = np.random.default_rng(seed)
    made = {}
    for name, (shape, dtype) in SHAPES.items():
        bits = random.standard_normal(shape).astype(np.float32).view(np.uint32)
        made[name] = gpu.put((bits >> 16).astype(np.uint16) if dtype == "bfloat16" else bits, dtype)
    return made


def copies_of(tensors: dict[str, FakeTensor]) -> Copies:
    return {name: tensor.values.copy() for name, tensor in tensors.items()}


def seen(lease: DeviceLease) -> Copies:
    return {
        spec.name: elements(lease.addresses[spec.name], spec.shape, spec.dtype).copy()
        for spec in lease.mapped.layout.tensors
    }


def assert_equal(actual: Copies, expected: Copies) -> None:
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(actual[name], values, err_msg=name)


class Trainer:
    """The process of `device_trainer.py`."""

    def __init__(self, folder: Path, buffers: int = 0) -> None:
        script = str(Path(__file__).with_name("weight_sync") / "device_trainer.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", script, str(folder), str(buffers),
             json.dumps(SHAPES)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.published = self._published()

    def _published(self) -> PublishedDeviceWeights:
        assert self.process.stdout is not None
        return PublishedDeviceWeights.from_bytes(bytes.fromhex(json.loads(self.process.stdout.readline())["published"]))

    def tell(self, order: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()

    def wait(self) -> None:
        assert self.process.stdout is not None
        assert json.loads(self.process.stdout.readline()) is None

    def publish(self, order: str = "publish") -> PublishedDeviceWeights:
        self.tell(order)
        return self._published()

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        assert wait_for_end(self.process.pid)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def await_checksums(gpu: FakeGpu, published: PublishedDeviceWeights) -> None:
    """Return once they have been computed: what is written from then on they do not tell."""
    with DeviceMappings(gpu).lease(published) as lease:
        assert lease.checksums


def trainers_on(folder: Path) -> Iterator[Callable[..., Trainer]]:
    """What a fixture yields: it starts a trainer over the GPU of this folder. All are ended with the test."""
    trainers: list[Trainer] = []

    def start(buffers: int = 0) -> Trainer:
        trainers.append(Trainer(folder, buffers))
        return trainers[-1]

    yield start
    for trainer in trainers:
        trainer.end()
