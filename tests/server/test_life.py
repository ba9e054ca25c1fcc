"""The server as a process: its endpoint, its keys, how it ends."""

from __future__ import annotations

import signal
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from leftovers import segments_of
from server_process import address_of, server_process
from tiny_engine import in_thread, tiny_options, tiny_tensors, wait_until
from tiny_server import LIMITS

from zerokl.rollout.client import RolloutClient
from zerokl.rollout.client_link import ServerLostError
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.observe.prometheus import MetricsServer
from zerokl.rollout.protocol.codec import PROTOCOL_VERSION
from zerokl.rollout.protocol.failures import ServerClosingError
from zerokl.rollout.protocol.fields import ProtocolError
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.server.keys import ServerKeys, check_endpoint, write_keys
from zerokl.rollout.server.limits import ServerLimits
from zerokl.rollout.server.main import main
from zerokl.rollout.server.sockets import EndpointTakenError, RolloutServer
from zerokl.weight_sync.publisher import WeightPublisher

LONG = SamplingParams(max_tokens=60, ignore_eos=True, seed=1)


def test_a_server_process_serves_and_ends_on_sigterm(tiny_model: Path, tmp_path: Path) -> None:
    with server_process(tiny_model, f"ipc://{tmp_path}/socket") as server:
        endpoint = address_of(server)
        with RolloutClient(endpoint) as client, WeightPublisher() as publisher:
            assert len(client.generate(["a", "b"], LONG)) == 2
            assert client.update_weights(publisher.publish(tiny_tensors(1).items(), 1)) == 1
            assert main(["--model", str(tiny_model), "--bind", endpoint]) == 3, "a second server gives up"
            assert client.health()["weight_versions"] == {"policy": 1}
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0
        assert segments_of(server.pid) == []


_STUCK = """
import sys, threading
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.server import main
RolloutEngine.__exit__ = lambda *_: threading.Event().wait()
main.END_SECONDS = 0.3
sys.exit(main.main())
"""


def test_a_server_that_is_stuck_tells_where_and_ends(tiny_model: Path, tmp_path: Path) -> None:
    options = ["--drain-timeout", "0"]
    endpoint = f"ipc://{tmp_path}/socket"
    with server_process(tiny_model, endpoint, *options, program=["-c", _STUCK]) as server:
        address_of(server)
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=30)
        assert server.returncode == 1 and "Timeout (0:00:00.3" in errors and "in _serve" in errors


def test_a_call_in_flight_may_finish_at_sigterm_or_comes_back_aborted(gated: Any) -> None:
    engine, worker, server, client = gated
    call = in_thread(lambda: client.generate("a", LONG))
    worker.began.acquire()
    server.stop(drain_seconds=0.2)
    wait_until(lambda: refuses(client))
    wait_until(lambda: engine._loop._inbox.num_urgent > 0)
    worker.open()
    (rollout,) = call()
    assert rollout.finish_reason == "abort" and len(rollout.token_ids) < 60


def refuses(client: RolloutClient) -> bool:
    try:
        client.health()
    except ServerClosingError:
        return True
    return False


def test_the_drain_lets_calls_finish(gated: Any) -> None:
    _, worker, server, client = gated
    call = in_thread(lambda: client.generate("a", LONG))
    worker.began.acquire()
    server.stop(drain_seconds=30.0)
    wait_until(lambda: refuses(client))
    worker.open()
    assert len(call()[0].token_ids) == 60
    server._thread.join(10)
    assert not server._thread.is_alive()


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_a_second_server_leaves_the_first_alone(tiny_model: Path, tmp_path: Path, scheme: str) -> None:
    endpoint = "tcp://127.0.0.1:0" if scheme == "tcp" else f"ipc://{tmp_path}/socket"
    with RolloutEngine(tiny_options(tiny_model)) as engine, RolloutServer(endpoint, limits=LIMITS) as server:
        server.start(engine)
        with pytest.raises(EndpointTakenError):
            RolloutServer(server.endpoint)
        with RolloutClient(server.endpoint) as client:
            assert client.health()["state"] == "running"
    with RolloutServer(server.endpoint):
        pass


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("tcp://0.0.0.0:1234", "reachable from other machines"),
        ("tcp://*:1234", "reachable from other machines"),
        ("tcp://192.168.1.2:1234", "reachable from other machines"),
        ("tcp://[::]:1234", "reachable from other machines"),
        ("tcp://example.org:1234", "reachable from other machines"),
        ("tcp://127.0.0.1", "must be tcp://ADDRESS:PORT"),
        ("tcp://127.0.0.1:99999", "must be tcp://ADDRESS:PORT"),
        ("udp://127.0.0.1:1", "must be tcp://ADDRESS:PORT"),
        ("ipc://", "must be tcp://ADDRESS:PORT"),
        ("", "must be tcp://ADDRESS:PORT"),
    ],
)
def test_endpoints_are_checked(endpoint: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutServer(endpoint)


def test_loopback_needs_no_keys_and_other_addresses_do() -> None:
    for endpoint in ("tcp://127.0.0.1:1", "tcp://127.1.2.3:0", "tcp://localhost:1", "tcp://[::1]:1", "ipc:///tmp/x"):
        check_endpoint(endpoint, has_keys=False)
    check_endpoint("tcp://0.0.0.0:1", has_keys=True)


def test_only_clients_with_a_known_key_are_served(tiny_model: Path, tmp_path: Path) -> None:
    assert main(["keygen", str(tmp_path / "keys"), "--client", "trainer"]) == 0
    assert main(["keygen", str(tmp_path / "others"), "--client", "stranger"]) == 0
    keys = tmp_path / "keys"
    assert stat.S_IMODE((keys / "trainer.key_secret").stat().st_mode) == 0o600
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        server = RolloutServer("tcp://127.0.0.1:0", keys=ServerKeys.load(keys), limits=LIMITS)
        with server:
            server.start(engine)
            own = {"server_key": keys / "server.key", "client_key": keys / "trainer.key_secret"}
            with RolloutClient(server.endpoint, **own) as client:
                assert len(client.generate("a", LONG)[0].token_ids) == 60
                client._link.drop_connection()
                assert client.health()["state"] == "running"
                wrong = [
                    {},
                    own | {"client_key": tmp_path / "others" / "stranger.key_secret"},
                    own | {"server_key": tmp_path / "others" / "server.key"},
                ]
                for options in wrong:
                    with pytest.raises(ServerLostError):
                        RolloutClient(server.endpoint, reconnect_seconds=0.5, **options)
                assert client.metrics()["server_clients"] == 1


OLDER = PROTOCOL_VERSION - 1


def test_an_older_client_is_told_so(tiny_model: Path, serve: Any) -> None:
    server, client = serve(RolloutEngine(tiny_options(tiny_model)))
    with zmq.Context() as context, context.socket(zmq.DEALER) as older:
        older.connect(server.endpoint)
        older.send(msgpack.packb([OLDER, "hello", 0, 0, {"versions": [OLDER], "name": "older"}, []]))
        assert older.poll(10_000), "no answer"
        (header,) = older.recv_multipart()
    version, kind, _, _, body, arrays = msgpack.unpackb(header)
    assert (version, kind, body["code"], arrays) == (PROTOCOL_VERSION, "refused", "version", [])
    assert body["text"] == f"protocol version {OLDER} is not {PROTOCOL_VERSION}"
    assert client.metrics()["server_clients"] == 1


def test_a_client_says_that_a_server_is_older() -> None:
    refused = [OLDER, "refused", 0, 0, {"code": "version", "text": f"protocol version 2 is not {OLDER}"}, []]
    with zmq.Context() as context, context.socket(zmq.ROUTER) as older, ThreadPoolExecutor(1) as threads:
        port = older.bind_to_random_port("tcp://127.0.0.1")
        client = threads.submit(RolloutClient, f"tcp://127.0.0.1:{port}", reconnect_seconds=10.0)
        while not client.done():
            if older.poll(50):  # a hello for each connection that the client makes
                route, _ = older.recv_multipart()
                older.send_multipart([route, msgpack.packb(refused)])
        with pytest.raises(ProtocolError, match=f"protocol version {OLDER} is not {PROTOCOL_VERSION}"):
            client.result()


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    write_keys(tmp_path, ["a"])
    before = (tmp_path / "server.key_secret").read_text()
    write_keys(tmp_path, ["b"])
    assert (tmp_path / "server.key_secret").read_text() == before
    assert len(ServerKeys.load(tmp_path).clients) == 2
    for name in ("a", "server", "", "x/y"):
        with pytest.raises(ValueError, match="client"):
            write_keys(tmp_path, [name])
    with pytest.raises(ValueError, match="cannot read"):
        ServerKeys.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must be given both"):
        RolloutClient("tcp://127.0.0.1:1", server_key=tmp_path / "server.key")


def test_wrong_options_end_with_status_2(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--set", "x=1"], ["--set", "x"], ["--bind", "tcp://*:1"], ["--limit", "max_calls=0"]):
        assert main(["--model", str(tiny_model), *options]) == 2
        assert capsys.readouterr().err.startswith("rollout-server: ")
    beyond = ["--bind", "tcp://127.0.0.1:0", "--metrics-bind", "0.0.0.0:0"]
    assert main(["--model", str(tiny_model), *beyond]) == 2
    assert "metrics bind '0.0.0.0:0' is reachable from other machines" in capsys.readouterr().err
    with MetricsServer("127.0.0.1:0") as metrics:
        taken = ["--bind", "tcp://127.0.0.1:0", "--metrics-bind", metrics.address]
        assert main(["--model", str(tiny_model), *taken]) == 3
    with pytest.raises(ValueError, match="twice heartbeat_seconds"):
        ServerLimits(heartbeat_seconds=5.0, session_seconds=6.0)
