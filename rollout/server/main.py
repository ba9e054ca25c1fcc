"""`rollout-server`: serve an engine, or make keys.

    rollout-server --model DIR --bind tcp://127.0.0.1:5757 --metrics-bind 127.0.0.1:9400
    rollout-server keygen DIR --client trainer

SIGTERM and SIGINT end it: calls in flight may finish for --drain-timeout, what is left is aborted and comes back with
the tokens so far, which clients have 2 seconds to fetch; a step that is not done after 5 more is cut off where ranks
are processes. Exit status 0 then, 2 for wrong options, 3 where the endpoint is taken. Should the end take 30 seconds
longer than the drain may, the stacks of all threads go to stderr and the exit status is 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.observe.logs import FORMATS, LEVELS, configure_logging
from zerokl.rollout.server.answers import telemetry
from zerokl.rollout.server.keys import ServerKeys, write_keys
from zerokl.rollout.server.limits import ServerLimits
from zerokl.rollout.server.sockets import EndpointTakenError, RolloutServer
from zerokl.rollout.validation import check_float

if TYPE_CHECKING:
    from zerokl.rollout.observe.prometheus import MetricsServer

_SWITCH_SECONDS = 0.0005
_ENDPOINT_TAKEN = 3
END_SECONDS = 30.0
"""After the drain: longer than all the bounds of what then ends add up to."""
_MAX_RANK_RESTARTS = 16
_TIMEOUTS = {
    "rank_heartbeat_timeout": "seconds without a sign of life of a rank that is a process",
    "step_timeout_base": "seconds that a step may take",
    "step_timeout_per_token": "seconds more for each of its tokens",
}
"""Options of EngineConfig by name; where they are left out, its defaults."""


def prefer_latency() -> None:
    """Set the process up to serve, once everything is loaded: no message is to wait long for the interpreter."""
    sys.setswitchinterval(_SWITCH_SECONDS)  # how long a thread may keep it while another waits
    gc.collect()
    gc.freeze()  # a full collection that looks at all that was loaded takes tens of milliseconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _keygen(given[1:]) if given[:1] == ["keygen"] else _serve(given)
    except ValueError as error:
        print(f"rollout-server: {error}", file=sys.stderr)
        return 2
    except EndpointTakenError as error:
        print(f"rollout-server: {error}", file=sys.stderr)
        return _ENDPOINT_TAKEN


def _keygen(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rollout-server keygen", description="Make CURVE keys; none is overwritten.")
    parser.add_argument("folder", help="where; the server's key is made there first")
    parser.add_argument("--client", action="append", default=[], metavar="NAME", help="a client to be served")
    args = parser.parse_args(arguments)
    for path in write_keys(args.folder, args.client):
        print(path)
    return 0


def _serve(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    configure_logging(args.log_level, args.log_format)
    options = {"model": args.model, "data_parallel_size": args.ranks, "max_rank_restarts": args.max_rank_restarts}
    options |= {name: value for name in _TIMEOUTS if (value := getattr(args, name)) is not None}
    options |= dict(map(_option, args.set))
    check_float("drain-timeout", args.drain_timeout, "seconds >= 0", 0.0)
    config = EngineConfig.from_dict(options)
    limits = ServerLimits(**{name: json.loads(value) for name, value in map(_pair, args.limit)})
    keys = None if args.keys is None else ServerKeys.load(args.keys)
    with RolloutServer(args.bind, keys=keys, limits=limits) as server, _metrics_server(args) as metrics:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: _end(server, args.drain_timeout))
        from zerokl.rollout.engine import RolloutEngine  # once the endpoint is ours: it loads kernels

        with RolloutEngine(config) as engine:
            prefer_latency()
            if metrics is not None:
                metrics.start(lambda: telemetry(engine, server.facts()))
                print(f"metrics at http://{metrics.address}/metrics", flush=True)
            print(f"serving {args.model} at {server.endpoint}", flush=True)
            server.serve(engine, name=f"rollout-server {args.model}")
    faulthandler.cancel_dump_traceback_later()
    return 0


def _end(server: RolloutServer, drain_seconds: float) -> None:
    """Have the server end, or the process in any case. The ranks' processes end with it."""
    # Its thread needs neither the interpreter nor any lock of ours.
    faulthandler.dump_traceback_later(drain_seconds + END_SECONDS, exit=True)
    server.stop(drain_seconds)


@contextmanager
def _metrics_server(args: argparse.Namespace) -> Iterator[MetricsServer | None]:
    """The endpoint that was asked for, bound; None where none was."""
    if args.metrics_bind is None:
        yield None
        return
    try:
        from zerokl.rollout.observe.prometheus import MetricsServer
    except ModuleNotFoundError as error:
        raise ValueError(f"--metrics-bind needs `pip install zerokl[server]`: {error}") from None
    with MetricsServer(args.metrics_bind, allow_remote=args.metrics_allow_remote) as metrics:
        yield metrics


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rollout-server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder in Hugging Face layout")
    parser.add_argument("--bind", default="tcp://127.0.0.1:5757", help="tcp://ADDRESS:PORT or ipc://PATH")
    parser.add_argument("--keys", help="folder made by `rollout-server keygen`; needed beyond loopback")
    parser.add_argument("--ranks", type=int, default=1, help="data parallel ranks, a process each where several")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of EngineConfig")
    parser.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE", help="a bound of ServerLimits")
    parser.add_argument("--drain-timeout", type=float, default=10.0, help="seconds for calls in flight at the end")
    restarts = f"ranks lost that are replaced, where ranks are processes (default {_MAX_RANK_RESTARTS})"
    parser.add_argument("--max-rank-restarts", type=int, default=_MAX_RANK_RESTARTS, help=restarts)
    for name, text in _TIMEOUTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help=text)
    parser.add_argument("--metrics-bind", metavar="ADDRESS:PORT", help="serve Prometheus metrics there: 127.0.0.1:9400")
    parser.add_argument("--metrics-allow-remote", action="store_true", help="also on addresses beyond loopback")
    parser.add_argument("--log-level", default="info", choices=LEVELS, help="debug has every request's life")
    parser.add_argument("--log-format", default="text", choices=FORMATS, help="json: an object a line, on stderr")
    return parser


def _option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, VALUE as JSON where it is, else as text."""
    name, value = _pair(text)
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"expected NAME=VALUE, got {text!r}")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
