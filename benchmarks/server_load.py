"""What a server costs over an engine in the process, with a model that costs nothing.

    python benchmarks/server_load.py --json

A stub worker draws tokens at once, so that all time is the engine's bookkeeping and the server's. Three parts:

cpu_us_per_token       50 clients (in processes of their own, whose time does not count) with 40 requests each in
                       flight stream all tokens. CPU time of engine and server, less that of the same requests to an
                       engine in the process, over tokens.
added_p99_ms           requests at 200 a second, for a few seconds each way: p99 of the latency over a socket, less p99
                       in the process. Steps take 2 ms, as with a small model. Both processes have the settings of
                       `prefer_latency`: what waits for the interpreter waits less. `late_p99_ms` (over a socket, and
                       in the process) is the load generator's own share, and not in the latency: how long after its
                       time a request was made.
max_queued_bytes       10,000 requests at once, while no step runs: the most that the server promised, and held.
logprobs_cost_fraction interleaved pairs of packing and reading a stream's messages with and without the columns of
                       logprobs, over the stub engine's time for a token. The engine computes logprobs in any case:
                       this is what their way to the client costs, beside a model that costs nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from machine_facts import machine_facts

from zerokl.kernels.ops import SampleResult
from zerokl.rollout.client import RolloutClient
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_config
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.server.limits import ServerLimits
from zerokl.rollout.server.main import prefer_latency
from zerokl.rollout.server.sockets import RolloutServer
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.worker import LocalWorker

CHUNK = 8
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


class StubWorker(LocalWorker):
    """Tokens at once, or `step_seconds` after the last step began."""

    step_seconds = 0.0

    def execute(self, order: StepOrder) -> StepResult:
        rows = len(order.inputs.logit_rows)
        if self.step_seconds:
            threading.Event().wait(self.step_seconds)
        zeros = np.zeros(rows, np.float32)
        sampled = SampleResult(
            tokens=np.ones(rows, np.int32),
            logprobs=zeros,
            policy_logprobs=zeros,
            entropy=zeros,
            raw_logprobs=None,
        )
        return StepResult(sampled=sampled)


class SteppingWorker(StubWorker):
    step_seconds = 0.002


def make_engine(folder: str, num_seqs: int, worker: type[StubWorker] = StubWorker) -> RolloutEngine:
    config = EngineConfig(
        model=folder, num_blocks=16_384, max_num_seqs=num_seqs, max_num_batched_tokens=16_384, num_threads=1
    )
    engine = RolloutEngine(config, make_worker=worker)
    prefer_latency()  # as rollout-server does
    return engine


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1)


# -- CPU per token ----------------------------------------------------------------------------------------------------
def load_in_process(engine: RolloutEngine, clients: int, requests: int, max_tokens: int) -> float:
    """CPU seconds of the load without a server."""
    start = time.process_time()
    calls = [engine.submit([PROMPT] * requests, params(max_tokens)) for _ in range(clients)]
    for call in calls:
        call.future.result()
        call.read()
    return time.process_time() - start


def load_over_sockets(endpoint: str, clients: int, requests: int, max_tokens: int) -> float:
    """CPU seconds of this process under the load; clients run in two processes that start together."""
    command = [sys.executable, __file__, "--client", endpoint, str(requests), str(max_tokens)]
    halves = [clients // 2, clients - clients // 2]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen([*command, str(half)], **pipes) for half in halves if half]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()  # all are connected
    start = time.process_time()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in processes:
        if process.wait() != 0:
            raise RuntimeError("a client failed")
    return time.process_time() - start


def client_main(endpoint: str, requests: int, max_tokens: int, clients: int) -> None:
    """Entry of a process with clients: connects, waits for a line, makes its requests, a call each."""
    connected = [RolloutClient(endpoint) for _ in range(clients)]
    print("ready", flush=True)
    sys.stdin.readline()

    def run(client: RolloutClient) -> None:
        stream = client.stream([PROMPT] * requests, params(max_tokens), chunk=CHUNK)
        count = sum(len(chunk.token_ids) for chunk in stream)
        assert count == requests * max_tokens, count

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(run, connected))
    for client in connected:
        client.close()


def measure_cpu(folder: str, args: argparse.Namespace) -> dict[str, float]:
    tokens = args.clients * args.requests * args.max_tokens
    over, within = [], []
    with make_engine(folder, args.clients * args.requests) as engine, RolloutServer("tcp://127.0.0.1:0") as server:
        server.start(engine)
        for _ in range(args.pairs):
            within.append(load_in_process(engine, args.clients, args.requests, args.max_tokens))
            over.append(load_over_sockets(server.endpoint, args.clients, args.requests, args.max_tokens))
    cpu = [one - base for one, base in zip(over, within, strict=True)]
    return {
        "cpu_us_per_token": 1e6 * statistics.median(cpu) / tokens,
        "in_process_us_per_token": 1e6 * statistics.median(within) / tokens,
    }


# -- latency ----------------------------------------------------------------------------------------------------------
def measure_latency(folder: str, args: argparse.Namespace) -> dict[str, float]:
    with make_engine(folder, 256, SteppingWorker) as engine, RolloutServer("tcp://127.0.0.1:0") as server:
        server.start(engine)
        local, remote = [], []
        for _ in range(4):  # interleaved: neighbours disturb both alike
            local += latencies(engine, args.rate, args.seconds / 4)
            command = [sys.executable, __file__, "--latency", server.endpoint, str(args.rate), str(args.seconds / 4)]
            done = subprocess.run(command, capture_output=True, check=True)
            remote += json.loads(done.stdout)
    p50, p99 = ([1000 * np.quantile(values, share, axis=0) for values in (local, remote)] for share in (0.5, 0.99))
    return {
        "added_p99_ms": float(p99[1][0] - p99[0][0]),
        "added_p50_ms": float(p50[1][0] - p50[0][0]),
        "in_process_p50_ms": float(p50[0][0]),
        "in_process_p99_ms": float(p99[0][0]),
        "late_p99_ms": float(p99[1][1]),
        "in_process_late_p99_ms": float(p99[0][1]),
    }


def latency_main(endpoint: str, rate: float, seconds: float) -> None:
    """Entry of a process with one client: prints its latencies."""
    with RolloutClient(endpoint) as client:
        prefer_latency()  # as the process with the engine, whose own latencies are taken off
        print(json.dumps(latencies(client, rate, seconds)))


def latencies(engine: Any, rate: float, seconds: float) -> list[tuple[float, float]]:
    """(seconds it took, seconds it was made late) of requests that arrive at random times, `rate` a second."""
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(1.0 / rate, int(rate * seconds)))
    pause = threading.Event()

    def one(due: float) -> tuple[float, float]:
        made = time.perf_counter()
        engine.generate([PROMPT], params(4))
        return time.perf_counter() - made, made - due

    with ThreadPoolExecutor(64) as threads:
        start = time.perf_counter()
        futures = []
        for arrival in arrivals:
            pause.wait(max(0.0, start + arrival - time.perf_counter()))
            futures.append(threads.submit(one, start + arrival))
        return [future.result() for future in futures]


# -- memory -----------------------------------------------------------------------------------------------------------
def measure_memory(folder: str, args: argparse.Namespace) -> dict[str, float]:
    limits = ServerLimits(max_queued_bytes=256 << 20)
    with make_engine(folder, 256) as engine, RolloutServer("tcp://127.0.0.1:0", limits=limits) as server:
        server.start(engine)
        with RolloutClient(server.endpoint) as client:
            engine.pause_generation()
            before = resident_bytes()
            with ThreadPoolExecutor(100) as threads:
                calls = [threads.submit(client.generate, [PROMPT] * 100, params(64)) for _ in range(args.queued // 100)]
                while engine.health()["num_held"] < len(calls):
                    client.health()
                held = resident_bytes() - before
                engine.resume_generation()
                for call in calls:
                    call.result()
            return {"max_queued_bytes": client.metrics()["server_max_queued_bytes"], "queued_resident_bytes": held}


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


# -- logprobs ---------------------------------------------------------------------------------------------------------
def measure_logprobs(folder: str, args: argparse.Namespace) -> dict[str, float]:
    """Pairs of encoding and decoding a token stream with and without its logprob columns, as a share of the step."""
    from zerokl.rollout.protocol.codec import Message, decode, encode
    from zerokl.rollout.protocol.schema import SERVER_MESSAGES, MessageKind

    size = args.requests * CHUNK
    rows = {name: np.zeros(args.requests, np.int32) for name in ("indexes", "starts", "counts", "restarts")}
    tokens = {"calls": np.ones(args.requests, np.int64), **rows, "token_ids": np.zeros(size, np.int32)}
    floats = {name: np.zeros(size, np.float32) for name in ("logprobs", "policy_logprobs")}
    whole = tokens | floats | {"policy_versions": np.zeros(size, np.int64)}
    without = {name: array for name, array in whole.items() if name not in floats}
    kinds = SERVER_MESSAGES["tokens"]
    bare = {"tokens": MessageKind(kinds.summary, "no", {}, {name: kinds.arrays[name] for name in without})}

    def cost(arrays: dict[str, Any], schema: Any) -> float:
        start = time.perf_counter()
        for _ in range(200):
            decode(encode(Message(kind="tokens", arrays=arrays)), schema)
        return (time.perf_counter() - start) / 200 / size

    pairs = [(cost(whole, SERVER_MESSAGES), cost(without, bare)) for _ in range(max(15, args.pairs))]
    with make_engine(folder, args.requests) as engine:
        start = time.perf_counter()
        engine.generate([PROMPT] * args.requests, params(args.max_tokens))
        per_token = (time.perf_counter() - start) / (args.requests * args.max_tokens)
    return {"logprobs_cost_fraction": statistics.median(on - off for on, off in pairs) / per_token}


def main() -> None:
    if sys.argv[1:2] == ["--client"]:
        endpoint, *numbers = sys.argv[2:]
        client_main(endpoint, *map(int, numbers))
        return
    if sys.argv[1:2] == ["--latency"]:
        latency_main(sys.argv[2], *map(float, sys.argv[3:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=40, help="of each client, in flight together")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the latency measurement, each way")
    parser.add_argument("--queued", type=int, default=10_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zerokl-load-") as folder:
        content = tiny_config(vocab_size=64, max_position_embeddings=512, eos_token_id=None)
        save_pretrained(Path(folder), content, random_tensors(ModelConfig.from_json(content), 0))
        figures = {
            **measure_cpu(folder, args),
            **measure_latency(folder, args),
            **measure_memory(folder, args),
            **measure_logprobs(folder, args),
        }
    for name, value in figures.items():
        print(f"{name:26} {value:14.4f}")
    if args.json:
        print(json.dumps({**figures, **machine_facts()}))


if __name__ == "__main__":
    main()
