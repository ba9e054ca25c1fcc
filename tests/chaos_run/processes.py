"""Processes of the run that are told what to do by lines, tell lines, and may die of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class LineProcess:
    """A script of this folder: orders and answers are lines of JSON."""

    def __init__(self, script: str, *arguments: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, order: Any) -> None:
        """Tell it something; nothing happens where it is dead."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def receive(self) -> Any:
        """What it tells next; None at its end."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

    def kill(self) -> int:
        """SIGKILL, if it lives; its exit status."""
        self.process.kill()
        self.process.communicate()
        return self.process.returncode

    def end(self) -> None:
        """End its input, and wait for its end."""
        self.process.communicate()
