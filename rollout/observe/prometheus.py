"""The Prometheus endpoint: telemetry is read when it is scraped, and nothing is kept between two scrapes.

    with serve_metrics(engine, "127.0.0.1:9400"):
        ...

Needs `pip install zerokl[server]`.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterator
from socketserver import ThreadingMixIn
from typing import Protocol
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from zerokl.rollout.observe.readings import Sample, Series, Telemetry
from zerokl.rollout.observe.series import SERIES, UNLISTED
from zerokl.rollout.server.keys import is_loopback
from zerokl.rollout.server.sockets import EndpointTakenError

_REQUEST_SECONDS = 10.0
"""A peer that has not sent its request by then is cut off."""


class Observed(Protocol):
    """An engine or a client."""

    def telemetry(self) -> Telemetry:
        """As `RolloutEngine.telemetry`."""
        ...


class TelemetryCollector(Collector):
    """Makes metric families of telemetry, read for each scrape."""

    def __init__(self, read: Callable[[], Telemetry]) -> None:
        self._read = read

    def describe(self) -> list[Metric]:
        """None: names are fixed, and nothing is to be read when it is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families of which there is a sample."""
        telemetry = self._read()
        for series in (*SERIES, UNLISTED):
            samples = list(series.read(telemetry))
            if samples:
                yield _histograms(series, samples) if series.kind == "histogram" else _numbers(series, samples)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    timeout = _REQUEST_SECONDS

    def log_message(self, format: str, *_: object) -> None:  # noqa: A002 - the base class's name
        """Scrapes are not worth a line each."""


class MetricsServer:
    """Answers GET /metrics at an address from `start` to `close`.

    It is bound first and costs nothing, so that a taken address is known before a model is loaded.
    """

    def __init__(self, bind: str = "127.0.0.1:9400", *, allow_remote: bool = False) -> None:
        """`bind`: ADDRESS:PORT, port 0 for any. Raises ValueError for what is none, and for addresses that other
        machines can reach unless `allow_remote`; EndpointTakenError.
        """
        host, port = _address(bind)
        if not allow_remote and not is_loopback(host):
            raise ValueError(
                f"metrics bind {bind!r} is reachable from other machines, and metrics are served to anyone there: "
                "bind 127.0.0.1, or allow it with --metrics-allow-remote (allow_remote=True)"
            )
        self._registry = CollectorRegistry(auto_describe=False)
        self._thread: threading.Thread | None = None
        kind = _Server6 if ":" in host else _Server
        try:
            self._server = make_server(host, port, make_wsgi_app(self._registry), kind, _QuietHandler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise EndpointTakenError(f"metrics address {bind} is taken") from None
            raise ValueError(f"metrics bind {bind!r} cannot be bound: {error}") from None
        self.address = f"{f'[{host}]' if ':' in host else host}:{self._server.server_port}"
        """Where it is bound; a port 0 is filled in."""

    def start(self, read: Callable[[], Telemetry]) -> None:
        """Serve, in threads of its own, what `read` gives."""
        self._registry.register(TelemetryCollector(read))
        self._thread = threading.Thread(target=self._server.serve_forever, name="zerokl-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and free the address; idempotent."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve_metrics(observed: Observed, bind: str = "127.0.0.1:9400", *, allow_remote: bool = False) -> MetricsServer:
    """Serve the metrics of an engine, or of a client's server, until the returned server is closed; close it first.

    Raises what `MetricsServer` raises.
    """
    server = MetricsServer(bind, allow_remote=allow_remote)
    server.start(observed.telemetry)
    return server


def _numbers(series: Series, samples: list[Sample]) -> Metric:
    kind = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
    family = kind(series.name, series.meaning, labels=series.labels)
    for labels, value in samples:
        family.add_metric(labels, float(value))
    return family


def _histograms(series: Series, samples: list[Sample]) -> Metric:
    family = HistogramMetricFamily(series.name, series.meaning, labels=series.labels)
    for labels, data in samples:
        bounds = [*map(str, data.bounds), "+Inf"]
        family.add_metric(labels, list(zip(bounds, map(float, data.cumulative()), strict=True)), data.sum)
    return family


def _address(bind: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{bind}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None:
        raise ValueError(f"metrics bind must be ADDRESS:PORT, got {bind!r}")
    return host, port
