"""`rollout-top`: a live view of a `rollout-server` in the terminal.

    rollout-top tcp://127.0.0.1:5757
    rollout-top tcp://127.0.0.1:5757 --once

It asks the server itself, as a client does, and not the Prometheus endpoint: that works wherever a trainer can connect,
with the same keys, whether or not metrics are exported. A server that goes away is said to be gone, and the view goes
on by itself when there is one again. Ctrl-C ends it. Exit status 0; with --once 1 where no server answers.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack

from zerokl.rollout.client import RolloutClient
from zerokl.rollout.validation import check_float

try:
    from rich.console import Console
    from rich.live import Live
except ModuleNotFoundError as error:  # pragma: no cover - the test environment has it
    raise SystemExit(f"rollout-top needs `pip install zerokl[server]`: {error}") from None

from zerokl.rollout.observe.top_view import Frame, Reading

_ANSWER_SECONDS = 2.0
"""How long a server may be silent before it is said to be gone."""


class Watcher:
    """Reads a server's telemetry again and again, over as many connections as it takes."""

    def __init__(self, endpoint: str, server_key: str | None, client_key: str | None) -> None:
        self._endpoint = endpoint
        self._server_key, self._client_key = server_key, client_key
        self._client: RolloutClient | None = None
        self._lost_at: str | None = None
        self.frame = Frame(endpoint=endpoint)

    def read(self) -> Frame:
        """A frame with a new reading, or with the last one and what is wrong."""
        try:
            client = self._connected()
            now = Reading(telemetry=client.telemetry(), seconds=time.monotonic())
        except (ConnectionError, TimeoutError, RuntimeError) as error:  # RuntimeError: the server ends
            self._lost_at = self._lost_at or time.strftime("%H:%M:%S")
            problem = f"no server since {self._lost_at} ({error}); trying again"
            self.frame = Frame(endpoint=self._endpoint, now=self.frame.now, before=self.frame.before, problem=problem)
        else:
            self._lost_at = None
            self.frame = Frame(endpoint=self._endpoint, now=now, before=self.frame.now)
        return self.frame

    def close(self) -> None:
        """Leave the server."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _connected(self) -> RolloutClient:
        if self._client is None:
            self._client = RolloutClient(
                self._endpoint,
                server_key=self._server_key,
                client_key=self._client_key,
                reconnect_seconds=_ANSWER_SECONDS,
                name="rollout-top",
            )
        return self._client


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        interval = check_float("--interval", args.interval, "in (0, 3600]", 0.0, 3600.0, open_low=True)
        watcher = Watcher(args.endpoint, args.server_key, args.client_key)
        with ExitStack() as stack:
            stack.callback(watcher.close)
            stop = _stop_event(stack)
            console = Console()
            if args.once or not console.is_terminal:
                return _once(watcher, console, stop, interval)
            return _live(watcher, console, stop, interval)
    except ValueError as error:
        print(f"rollout-top: {error}", file=sys.stderr)
        return 2


def _once(watcher: Watcher, console: Console, stop: threading.Event, interval: float) -> int:
    """One frame, from two readings: rates need both."""
    if watcher.read().problem is None:
        stop.wait(interval)
        watcher.read()
    console.print(watcher.frame.render())
    return 0 if watcher.frame.problem is None else 1


def _live(watcher: Watcher, console: Console, stop: threading.Event, interval: float) -> int:
    with Live(watcher.frame.render(), console=console, screen=True, auto_refresh=False) as live:
        while not stop.is_set():
            live.update(watcher.read().render(), refresh=True)
            stop.wait(interval)
    return 0


def _stop_event(stack: ExitStack) -> threading.Event:
    """Set by Ctrl-C and SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        stack.callback(signal.signal, number, signal.signal(number, lambda *_: stop.set()))
    return stop


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rollout-top", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("endpoint", nargs="?", default="tcp://127.0.0.1:5757", help="where the server is")
    parser.add_argument("--once", action="store_true", help="print one frame; the rule where stdout is no terminal")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two readings")
    parser.add_argument("--server-key", metavar="FILE", help="the server's public certificate (server.key)")
    parser.add_argument("--client-key", metavar="FILE", help="this client's secret one (NAME.key_secret)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
