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
    BringBack,
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
    PutAway,
    Sampled,
    Stage,
    failure_of,
)
from zerokl.rollout.wire import WireError, decode, encode
from zerokl.rollout.worker import LocalWorker
from zerokl.rollout.worker_channels import STAGING, STEPS

_SWITCH_SECONDS = 0.0005
"""How long one thread may keep the interpreter while another waits: a step must not wait long for one that stages."""

_STAGING_NICE = 10
"""Where processors are short, staging gets about a tenth of one that a step wants."""


def main() -> None:
    """Entry point; arguments: the folder of the socket, the parent's pid."""
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    # Ctrl-C in a terminal reaches every process of the group; what it means for the worker is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent, folder), name="zerokl-parent-watch", daemon=True).start()
    sys.setswitchinterval(_SWITCH_SECONDS)
    with zmq.Context() as context, context.socket(zmq.PAIR) as steps, context.socket(zmq.PAIR) as staging:
        for socket, name in ((steps, STEPS), (staging, STAGING)):
            socket.connect(f"ipc://{folder}/{name}")
            socket.send_multipart(encode(0, Hello(pid=os.getpid())))
        serve(steps, staging)


def serve(steps: zmq.Socket[bytes], staging: zmq.Socket[bytes]) -> None:
    """Answer messages, one at a time, until Close; weights are staged in a thread of its own meanwhile.

    Raises WireError when a message cannot be read.
    """
    worker: LocalWorker | None = None
    while True:
        sequence, message = decode(steps.recv_multipart())
        if isinstance(message, Close):
            break
        if isinstance(message, Configure):
            reply, worker = configure(message)
            if worker is not None:
                threading.Thread(
                    target=serve_staging, args=(staging, worker), name="zerokl-staging", daemon=True
                ).start()
        else:
            reply = reply_to(worker, message)
        steps.send_multipart(encode(sequence, reply))
    # The staging thread may be waiting on its socket, which only it may close: the process ends without it.
    os._exit(0)


def configure(message: Configure) -> tuple[Message, LocalWorker | None]:
    """Make the worker; the reply, and the worker if it could be made."""
    try:
        worker = LocalWorker(EngineConfig.from_dict(message.options))
    except Exception as error:  # noqa: BLE001 - whatever it is, the engine must hear of it, and decides
        return failure_of(error), None
    return Done(), worker


def serve_staging(socket: zmq.Socket[bytes], worker: LocalWorker) -> None:
    """Answer the messages of the staging channel, in a thread of its own, for as long as the process lives."""
    # Linux gives each thread a nice value of its own. A step that waits for the interpreter leaves its processor to us.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _STAGING_NICE)
    while True:
        sequence, message = decode(socket.recv_multipart())
        socket.send_multipart(encode(sequence, reply_to(worker, message)))


def reply_to(worker: LocalWorker | None, message: Message) -> Message:
    """What `answer` gives, or what it raised as a message."""
    try:
        if worker is None:
            raise RuntimeError("the worker was not configured")
        return answer(worker, message)
    except WireError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the engine must hear of it, and decides
        return failure_of(error)


def answer(worker: LocalWorker, message: Message) -> Message:
    """Carry out one order."""
    if isinstance(message, Execute):
        return Sampled(result=worker.execute(message.order))
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
    elif isinstance(message, PutAway):
        worker.sleep(_tags(message), message.level, message.spill_dir or None)
    elif isinstance(message, BringBack):
        worker.wake_up(_tags(message))
    else:
        raise WireError(f"{type(message).__name__} is not a message to a worker")
    return Done()


def _tags(message: PutAway | BringBack) -> list[str]:
    return [tag for tag in ("weights", "kv_cache") if getattr(message, tag)]


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
