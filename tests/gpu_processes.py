"""Processes of tests on GPUs that are told what to do, a JSON list a line, and answer with a line."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from leftovers import wait_for_end

from zerokl.weight_sync import PublishedDeviceWeights

ANSWER_SECONDS = 240
"""For imports and kernels that Triton has not compiled before."""


class ToldProcess:
    """The process of a script of this folder, which says {"pid"} once it is up."""

    def __init__(self, script: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
        self._read = b""
        self.pid = self._answer()["pid"]

    def do(self, *order: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        return self._answer()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert wait_for_end(self.pid)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> Any:
        line = b""
        while not line.startswith((b"{", b"null")):  # Paddle may print lines of its own
            line = self._line()
        return json.loads(line)

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        while b"\n" not in self._read:
            ready = select.select([self.process.stdout], [], [], ANSWER_SECONDS)[0]
            assert ready, f"{self.process.args} does not answer"
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            assert more, f"{self.process.args} has ended"
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return line


class Trainer(ToldProcess):
    """`gpu_trainer.py`: a trainer with a model's weights on GPU 0."""

    def __init__(self, model: dict[str, Any], dtype: str = "bfloat16", buffers: int = 0) -> None:
        super().__init__("gpu_trainer.py", json.dumps(model), dtype, str(buffers))

    def publish(self, seed: int, version: int) -> PublishedDeviceWeights:
        return PublishedDeviceWeights.from_bytes(bytes.fromhex(self.do("publish", seed, version)["published"]))


class EngineProcess(ToldProcess):
    """`gpu_engine.py`: an engine in a process of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__("gpu_engine.py", json.dumps(options))

    def digest(self) -> str:
        made: str = self.do("digest")["digest"]
        return made

    def update(self, published: PublishedDeviceWeights) -> dict[str, Any]:
        answer: dict[str, Any] = self.do("update", published.to_bytes().hex())
        return answer
