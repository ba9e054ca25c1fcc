"""One exchange of token rows between ranks: this transport, Paddle's gloo groups, and a memcpy of the bytes.

    python benchmarks/communicators.py --json [--ranks 2 4] [--rows 8 64 512] [--rounds 300]

Every rank is a process and sends `rows` rows of 2,048 floats, shared out evenly among all ranks. Times are those of
rank 0. Gloo has no all_to_all in some Paddle builds; what stood in for it, or what it raised, is in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import numpy as np
from machine_facts import machine_facts

WIDTH = 2048
WARM_UP = 20


def timed(exchange: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Median and p99 of one call in microseconds."""
    times = []
    for turn in range(rounds + WARM_UP):
        start = perf_counter()
        exchange()
        if turn >= WARM_UP:
            times.append((perf_counter() - start) * 1e6)
    return {"median_us": round(statistics.median(times), 1), "p99_us": round(float(np.percentile(times, 99)), 1)}


def parts_of(rows: int, ranks: int) -> list[np.ndarray]:
    return [np.full((rows // ranks, WIDTH), rank, np.float32) for rank in range(ranks)]


def ours(rank: int, ranks: int, meeting: str, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """The shared memory transport; every received row is checked once before the clock runs."""
    from zerokl.rollout.expert_parallel.shared_memory import SharedMemoryCommunicator

    bound = SharedMemoryCommunicator.bind(rank, ranks, meeting)
    announce_and_wait()
    end = SharedMemoryCommunicator.connect(bound)
    result = {}
    for rows in sizes:
        parts = parts_of(rows, ranks)
        assert all((part == rank).all() for part in end.all_to_all(parts))
        result[str(rows)] = timed(lambda parts=parts: end.all_to_all(parts), rounds)  # type: ignore[misc]
    end.close()
    return result


def gloo(rank: int, ranks: int, meeting: str, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Paddle's gloo group: all_to_all, or where that raises, all_gather of one part.

    It brings each rank as many bytes as all_to_all would, though the same to all: a bound that favours gloo.
    """
    announce_and_wait()
    os.environ |= {
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(ranks),
        "PADDLE_TRAINER_ENDPOINTS": meeting,
        "PADDLE_CURRENT_ENDPOINT": meeting.split(",")[rank],
        "PADDLE_MASTER": meeting.split(",")[0],
        "PADDLE_DISTRI_BACKEND": "gloo",
    }
    import paddle
    import paddle.distributed as dist

    paddle.set_device("cpu")
    dist.init_parallel_env()
    result: dict[str, Any] = {}
    for rows in sizes:
        sent = [paddle.to_tensor(part) for part in parts_of(rows, ranks)]
        try:
            dist.alltoall([paddle.empty_like(part) for part in sent], sent)
        except Exception as error:  # noqa: BLE001 - the finding
            result["all_to_all"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
            one = sent[0]
            result[str(rows)] = timed(lambda one=one: dist.all_gather([], one), rounds)  # type: ignore[misc]
        else:
            result[str(rows)] = timed(  # type: ignore[misc]
                lambda sent=sent: dist.alltoall([paddle.empty_like(part) for part in sent], sent), rounds
            )
    return result


TRANSPORTS = {"shared_memory": ours, "gloo": gloo}


def announce_and_wait() -> None:
    """Tell the parent that this rank can be reached, and wait until all can."""
    print("bound", flush=True)
    sys.stdin.readline()


def run_ranks(transport: str, ranks: int, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Rank 0's figures, or what a rank raised."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = folder if transport == "shared_memory" else ",".join(free_endpoints(ranks))
        job = json.dumps([transport, ranks, meeting, list(sizes), rounds])
        command = [sys.executable, __file__, "--rank"]
        processes = [
            subprocess.Popen(
                [*command, str(rank), job],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            for process in processes:
                assert process.stdout is not None
                process.stdout.readline()
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            outcomes = [process.communicate(timeout=120) for process in processes]
        except subprocess.TimeoutExpired:
            return {"error": "no answer within 120 s"}
        finally:
            for process in processes:
                process.kill()
                process.wait()
    if any(process.returncode for process in processes):
        return {"error": next(err.strip().splitlines()[-1][:300] for _, err in outcomes if err.strip())}
    figures: dict[str, Any] = json.loads(outcomes[0][0].strip().splitlines()[-1])
    return figures


def free_endpoints(count: int) -> list[str]:
    """Addresses of this machine at ports that nobody listens at now."""
    with ExitStack() as probes:
        found = [probes.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [f"127.0.0.1:{probe.getsockname()[1]}" for probe in found]


def memcpy(sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """The floor: the bytes that a rank sends, copied once."""
    result = {}
    for rows in sizes:
        source, target = np.ones((rows, WIDTH), np.float32), np.empty((rows, WIDTH), np.float32)
        result[str(rows)] = timed(lambda s=source, t=target: np.copyto(t, s), rounds)  # type: ignore[misc]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="only the result line")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank, job = int(options.rank[0]), json.loads(options.rank[1])
        transport, ranks, meeting, sizes, rounds = job
        print(json.dumps(TRANSPORTS[transport](rank, ranks, meeting, sizes, rounds)))
        return
    floor = memcpy(options.rows, options.rounds)
    result: dict[str, Any] = {"machine": machine_facts(), "row_floats": WIDTH, "memcpy": floor}
    for transport in TRANSPORTS:
        for ranks in options.ranks:
            result[f"{transport}_{ranks}_ranks"] = run_ranks(transport, ranks, options.rows, options.rounds)
            if not options.json:
                print(transport, ranks, result[f"{transport}_{ranks}_ranks"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
