"""One run: a server, everything that goes wrong around it for a while, and the report."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chaos_run.disturber import Disturber
from chaos_run.layouts import LAYOUTS, Layout
from chaos_run.leaks import grown, holdings, left_behind, wait_idle
from chaos_run.mortals import Mortals
from chaos_run.rank_faults import RankFaults
from chaos_run.server_process import ServerProcess
from chaos_run.traffic import PINNED, TrafficClient
from chaos_run.verdict import Verdict, compare, count_answers
from chaos_run.weights import tensors_of
from zerokl.rollout.client import RolloutClient
from zerokl.rollout.sampling_params import SamplingParams

LONGEST_SECONDS = 60.0
"""For faults of all kinds wanted to have come."""
_POLL_SECONDS = 0.05
WARM_UPDATES = 3
"""Before the run: what is kept of weights goes through two buffers in turn, and one more while it changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosOptions:
    """What to run."""

    seconds: float
    until: tuple[str, ...] = ()
    """Kinds of faults that the run goes on for, after its seconds; the beginning of a name will do."""
    seed: int
    layout: str = "dense"
    updates: bool = True
    rank_faults: bool = True
    clients: int = 6
    breach: str | None = None
    """Some of `breached_server.BREACHES`, with commas: the run must then fail."""
    answer_seconds: float = 60.0
    """After the end of all disturbances, in which every call must have been answered."""
    idle_seconds: float = 30.0
    """After that, in which the server must have forgotten everything."""


@dataclass(kw_only=True)
class ChaosReport:
    """What a run came to."""

    options: dict[str, Any]
    requests: int = 0
    answered_once: int = 0
    bit_equal: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    """Survived, by kind; those of ranks only where a step was in flight there."""
    idle_rank_faults: int = 0
    leaks: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    evidence: list[dict[str, Any]] = field(default_factory=list)

    def lacking(self, kinds: Iterable[str]) -> list[str]:
        """Those of the kinds, or beginnings of kinds, that no fault was of."""
        return lacking(self.faults, kinds)

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failures and not self.leaks

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"passed": self.passed}


def lacking(faults: Mapping[str, int], kinds: Iterable[str]) -> list[str]:
    """Those of the kinds, or beginnings of kinds, that no fault was of."""
    return [kind for kind in kinds if not any(faults[name] for name in faults if name.startswith(kind))]


def run_chaos(options: ChaosOptions, folder: Path) -> ChaosReport:
    """Run it in `folder`, which is empty."""
    layout = LAYOUTS[options.layout]
    report = ChaosReport(options=asdict(options))
    model = layout.write(folder / "model")
    server = ServerProcess(layout, model, folder, options.breach)
    try:
        _disturb(options, layout, model, folder, server, report)
    except Exception:
        print(server.last_words())
        raise
    finally:
        server.kill()
    return report


def _disturb(
    options: ChaosOptions, layout: Layout, model: Path, folder: Path, server: ServerProcess, report: ChaosReport
) -> None:
    with RolloutClient(server.endpoint) as client:
        warm_up(client, model, updates=options.updates)
        before = holdings(server)
        run = _Run(options, server, model, folder)
        run.wait()
        report.leaks += wait_idle(client, options.idle_seconds)
        report.leaks += grown(before, holdings(server))
        report.figures |= _figures(client.metrics())
    status = server.end()
    report.leaks += left_behind(server)
    if status != 0:
        report.failures.append(f"the server ended with {status}: {server.last_words(12_000)}")
    verdict = run.verdict()
    with ExitStack() as stack:
        undisturbed = None
        if not options.updates:
            undisturbed = stack.enter_context(_undisturbed(layout, model, folder))
        run.compare(verdict, layout, model, undisturbed)
    run.tell(report, verdict)


@contextmanager
def _undisturbed(layout: Layout, model: Path, folder: Path) -> Iterator[RolloutClient]:
    """A client of another server of the same layout."""
    calm = folder / "undisturbed"
    calm.mkdir()
    server = ServerProcess(layout, model, calm)
    try:
        with RolloutClient(server.endpoint) as client:
            yield client
    finally:
        server.end()


def _figures(metrics: Mapping[str, float]) -> dict[str, float]:
    names = ("steps", "preemptions", "cached_tokens", "finished_abort", "rank_restarts", "rank_faults_in_step")
    return {name: metrics[name] for name in names if name in metrics}


def warm_up(client: RolloutClient, model: Path, *, updates: bool) -> None:
    """Have everything in use once that is kept. With updates the traffic begins under version WARM_UPDATES."""
    client.pin_weights(PINNED)
    for _ in range(2):
        client.generate([[1, 2, 3]] * 8, SamplingParams(max_tokens=4))
        client.score([[1, 2, 3]])
        client.pause_generation()
        client.resume_generation()
        client.reset_prefix_cache()
    for version in range(1, WARM_UPDATES + 1 if updates else 1):
        client.update_weights(tensors_of(model, version))


class _Run:
    """The threads of a run, from their start to their end."""

    def __init__(self, options: ChaosOptions, server: ServerProcess, model: Path, folder: Path) -> None:
        self._options = options
        self._done = threading.Event()
        publications = folder / "publications"
        publications.mkdir()
        endpoint, seed, done = server.endpoint, options.seed, self._done
        self.traffic = [TrafficClient(number, seed, endpoint, done) for number in range(options.clients)]
        self.mortals = Mortals(endpoint, seed, done)
        version = WARM_UPDATES if options.updates else None
        self.disturber = Disturber(endpoint, model, publications, seed, self.traffic, done, version)
        self.rank_faults = RankFaults(server, seed, done) if options.rank_faults else None

    def wait(self) -> None:
        """Let it go on for its time, and everything come to its end."""
        options = self._options
        end = time.monotonic() + options.seconds + LONGEST_SECONDS
        self._done.wait(options.seconds)
        while lacking(self.faults, options.until) and time.monotonic() < end:
            self._done.wait(_POLL_SECONDS)
        self._done.set()
        seconds = options.answer_seconds
        if self.rank_faults is not None:
            self.rank_faults.join(seconds)
        self.disturber.join(seconds)
        self.mortals.join(seconds)
        for client in self.traffic:
            client.join(seconds)

    @property
    def faults(self) -> Counter[str]:
        """Survived so far, by kind."""
        ranks = Counter[str]() if self.rank_faults is None else self.rank_faults.faults
        return self.disturber.faults + ranks + Counter(client_killed=self.mortals.num_killed)

    def verdict(self) -> Verdict:
        asked = [one for client in self.traffic for one in client.asked]
        verdict = count_answers(asked)
        repeated = sum(client.witness.num_repeated for client in self.traffic)
        if repeated:
            verdict.wrong.append(f"{repeated} calls were answered more than once")
        return verdict

    def compare(self, verdict: Verdict, layout: Layout, model: Path, undisturbed: RolloutClient | None) -> None:
        compare(
            verdict,
            layout,
            model,
            [one for client in self.traffic for one in client.asked],
            self.mortals.partial,
            [one for client in self.traffic for one in client.scored],
            last_version=self.disturber.version,
            undisturbed=undisturbed,
        )

    def tell(self, report: ChaosReport, verdict: Verdict) -> None:
        """Write the outcome into the report."""
        report.failures += self.disturber.wrong + self.mortals.wrong + verdict.wrong
        if self.rank_faults is not None:
            report.failures += self.rank_faults.wrong
            report.idle_rank_faults = self.rank_faults.num_idle
            if self.rank_faults.recovery_seconds:
                seconds = self.rank_faults.recovery_seconds
                report.figures |= {"recovery_p50_s": float(np.median(seconds)), "recovery_max_s": max(seconds)}
        report.faults = dict(sorted(self.faults.items()))
        report.requests, report.answered_once = verdict.requests, verdict.answered_once
        report.bit_equal, report.evidence = verdict.bit_equal, verdict.evidence[:20]
        names = ("aborted", "tokens", "partial_streams", "scores", "updated_in_flight")
        report.figures |= {name: getattr(verdict, name) for name in names}
        report.figures["versions"] = self.disturber.version
