"""NVIDIA's compute-sanitizer: where it is, and what its output says."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from refusal import PartRefusedError

PROGRAM = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")

_SUMMARIES = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) errors?"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed"),
}
_ENDINGS = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run of tests under a tool has found. None: the output does not say."""

    findings: int | None
    tests_passed: int
    tests_failed: int

    @property
    def clean(self) -> bool:
        """Tests ran, all of them passed, and the tool says that it has nothing to say."""
        return self.findings == 0 and self.tests_passed > 0 and self.tests_failed == 0


def find_program() -> str:
    """Its path: on PATH, in a CUDA toolkit, or in the package nvidia-cuda-sanitizer-api.

    Raises PartRefusedError naming where it is not.
    """
    found = shutil.which(PROGRAM)
    if found is not None:
        return found
    places = [folder / PROGRAM for folder in _folders()]
    for place in places:
        if place.is_file():
            # A wheel's files may lack the bit.
            if not os.access(place, os.X_OK):
                place.chmod(place.stat().st_mode | 0o111)
            return str(place)
    looked = ", ".join(map(str, places)) or "no CUDA toolkit and no package nvidia-cuda-sanitizer-api"
    raise PartRefusedError(f"{PROGRAM} is not on PATH; looked for: {looked}")


def _folders() -> Iterator[Path]:
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for root in [*roots, *sorted(Path("/usr/local").glob("cuda*"), reverse=True)]:
        yield root / "bin"
        yield root / "compute-sanitizer"
    try:
        import nvidia
    except ImportError:
        return
    for folder in nvidia.__path__:
        yield from sorted(Path(folder).glob("cu*/bin"))


def read(tool: str, output: str) -> Verdict:
    """The verdict of a run of pytest under `tool`; several summaries (one a process) add up."""
    counts = [int(count) for count in _SUMMARIES[tool].findall(output)]
    ends = [line for line in output.splitlines() if " in " in line and _ENDINGS.search(line)]
    tests = dict.fromkeys(("passed", "failed", "error", "errors"), 0)
    for count, kind in _ENDINGS.findall(ends[-1] if ends else ""):
        tests[kind] = int(count)
    failed = tests["failed"] + tests["error"] + tests["errors"]
    return Verdict(sum(counts) if counts else None, tests["passed"], failed)
