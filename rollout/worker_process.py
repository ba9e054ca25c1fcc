"""The worker's own process: a LocalWorker that takes its orders from a socket. Started by `zerokl.rollout.worker_link`.

It ends when told to, and when its parent is gone, however that ended. An error in an order travels back as a message
and leaves the worker as it was; only a broken link ends the process.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import threading
from pathlib import Path

import zmq

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.messages import (
    Close,
    Commit,
    Configure,
    Describe,
    Discard,
    Done,
    Drop,
    Execute,
    Facts,
    Hello,
    Message,
    Pin,
    Sampled,
    Stage,
    failure_of,
)
from zerokl.rollout.wire import WireError, decode, encode
from zerokl.rollout.worker import LocalWorker


def main() -> None:
    """Entry point; arguments: the folder of the socket, the parent's pid."""
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    # Ctrl-C in a terminal reaches every process of the group; what it means for the worker is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent, folder), name="zerokl-parent-watch", daemon=True).start()
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.connect(endpoint(folder))
        socket.send_multipart(encode(0, Hello(pid=os.getpid())))
        serve(socket)


def endpoint(folder: Path) -> str:
    """ZMQ address of the socket in the private folder that engine and worker share until they are connected."""
    return f"ipc://{folder}/socket"


def serve(socket: zmq.Socket[bytes]) -> None:
    """Answer messages, one at a time, until Close. Raises WireError when one cannot be read."""
    worker: LocalWorker | None = None
    while True:
        sequence, message = decode(socket.recv_multipart())
        if isinstance(message, Close):
            break
        reply: Message
        try:
            if isinstance(message, Configure):
                worker = LocalWorker(EngineConfig.from_dict(message.options))
                reply = Done()
            elif worker is None:
                raise RuntimeError("the worker was not configured")
            else:
                reply = answer(worker, message)
        except WireError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the engine must hear of it, and decides
            reply = failure_of(error)
        socket.send_multipart(encode(sequence, reply))
    if worker is not None:
        worker.close()


def answer(worker: LocalWorker, message: Message) -> Message:
    """Carry out one order."""
    if isinstance(message, Execute):
        return Sampled(result=worker.execute(message.inputs))
    if isinstance(message, Describe):
        return Facts(facts={**worker.describe(), "kind": "process"})
    if isinstance(message, Stage):
        worker.stage_weights(message.source, message.version)
    elif isinstance(message, Commit):
        worker.commit_weights()
    elif isinstance(message, Discard):
        worker.discard_staged()
    elif isinstance(message, Pin):
        worker.pin_weights(message.name)
    elif isinstance(message, Drop):
        worker.drop_weights(message.name)
    else:
        raise WireError(f"{type(message).__name__} is not a message to a worker")
    return Done()


def _end_with(parent: int, folder: Path) -> None:
    """Wait for the parent's death, clean up what it cannot any more, and end this process.

    (PR_SET_PDEATHSIG would not do: it fires when the *thread* that started this process ends.)
    """
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        descriptor = None
    # The parent may have died, and its pid may belong to another process, before the descriptor was opened.
    if descriptor is not None and os.getppid() == parent:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
