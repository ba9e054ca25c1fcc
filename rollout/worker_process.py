"""The worker's own process: a LocalWorker that takes its orders from a socket. Started by `zerokl.rollout.worker_link`.

It ends when told to, and when its parent is gone, however that ended. An error in an order travels back as a message
and leaves the worker as it was; only a broken link ends the process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from pathlib import Path

import numpy as np
import zmq

from zerokl.rollout import messages
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.expert_parallel.links import BoundRank
from zerokl.rollout.expert_parallel.rank_place import RankPlace
from zerokl.rollout.expert_parallel.shared_memory import SharedMemoryCommunicator
from zerokl.rollout.messages import Message, failure_of
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.step_outcome import PendingStep
from zerokl.rollout.wire import WireError, decode, encode
from zerokl.rollout.worker import LocalWorker
from zerokl.rollout.worker_channels import STAGING, STEPS, address

_SWITCH_SECONDS = 0.0005
"""How long one thread may keep the interpreter while another waits: a step must not wait long for one that stages."""

_STAGING_NICE = 10
"""Where processors are short, staging gets about a tenth of one that a step wants."""


def main() -> None:
    """Entry point, once `worker_life` has begun; the first arguments are the folder of the sockets and the rank."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    # Ctrl-C in a terminal, or the end of a service, reaches every process of the group; what it means for the worker is
    # the parent's decision.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH_SECONDS)
    with zmq.Context() as context, context.socket(zmq.PAIR) as steps, context.socket(zmq.PAIR) as staging:
        for socket, name in ((steps, STEPS), (staging, STAGING)):
            socket.connect(address(folder, name, rank))
            socket.send_multipart(encode(0, messages.Hello(pid=os.getpid())))
        serve(steps, staging)


def serve(steps: zmq.Socket[bytes], staging: zmq.Socket[bytes]) -> None:
    """Answer messages, one at a time, until Close; weights are staged in a thread of its own meanwhile.

    Raises WireError when a message cannot be read.
    """
    rank = Rank()
    while True:
        sequence, message = decode(steps.recv_multipart())
        if isinstance(message, messages.Close):
            break
        if isinstance(message, messages.Begin):
            rank.begin(message.order)
            continue
        is_new = rank.worker is None
        steps.send_multipart(encode(sequence, reply_to(rank, message)))
        if is_new and rank.worker is not None:
            threading.Thread(target=serve_staging, args=(staging, rank), name="zerokl-staging", daemon=True).start()
    # The staging thread may be waiting on its socket, which only it may close: the process ends without it.
    os._exit(0)


class Rank:
    """The worker in the making: Configure makes it reachable for the other ranks, Connect completes it.

    Where others had to be replaced, the two give a complete one new links to them.
    """

    def __init__(self) -> None:
        self.worker: LocalWorker | None = None
        self._config: EngineConfig | None = None
        self._placement: list[list[list[int]]] = []
        self._bound: BoundRank | None = None
        self._communicator: SharedMemoryCommunicator | None = None
        self._under_way: deque[PendingStep | Exception] = deque()
        """Steps that were begun, or why they could not be."""

    def begin(self, order: StepOrder) -> None:
        """Launch a step, whose result `collect` gives."""
        assert self.worker is not None, "the worker was not configured"
        try:
            self._under_way.append(self.worker.begin(order))
        except Exception as error:  # noqa: BLE001 - told where the result is asked for
            self._under_way.append(error)

    def collect(self) -> StepResult:
        """Wait for the first step that was begun and not collected; raises what its begin raised."""
        pending = self._under_way.popleft()
        if isinstance(pending, Exception):
            raise pending
        return pending.result()

    def configure(self, message: messages.Configure) -> None:
        """Take the options, and let the other ranks reach this one, if there are any. Nothing is waited for."""
        if self.worker is None:
            self._config, self._placement = EngineConfig.from_dict(message.options), message.placement
        assert self._config is not None, "a worker without options"
        for old in (self._communicator, self._bound):
            if old is not None:
                old.close()
        if self._config.num_ranks > 1:
            self._bound = SharedMemoryCommunicator.bind(message.rank, self._config.num_ranks, message.folder)

    def connect(self) -> None:
        """Reach the other ranks, which are configured, and make the worker if it is not there."""
        config = self._config
        assert config is not None, "connected before it was configured"
        if self._bound is not None:
            self._communicator = SharedMemoryCommunicator.connect(self._bound)
        if self.worker is None:
            self.worker = LocalWorker(config, self._place(config))
        elif self._communicator is not None:
            self.worker.relink(self._communicator)

    def _place(self, config: EngineConfig) -> RankPlace:
        if self._bound is None:
            return RankPlace()
        return RankPlace(
            self._bound.rank,
            config.num_ranks,
            config.expert_parallel_size,
            self._communicator,
            config.num_redundant_experts,
            self._placement or None,
        )


def serve_staging(socket: zmq.Socket[bytes], rank: Rank) -> None:
    """Answer the messages of the staging channel, in a thread of its own, for as long as the process lives."""
    # Linux gives each thread a nice value of its own. A step that waits for the interpreter leaves its processor to us.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _STAGING_NICE)
    while True:
        sequence, message = decode(socket.recv_multipart())
        socket.send_multipart(encode(sequence, reply_to(rank, message)))


def reply_to(rank: Rank, message: Message) -> Message:
    """What carrying out the order gives, or what it raised as a message."""
    try:
        if isinstance(message, messages.Configure):
            rank.configure(message)
        elif isinstance(message, messages.Connect):
            rank.connect()
        elif rank.worker is None:
            raise RuntimeError("the worker was not configured")
        elif isinstance(message, messages.Collect):
            return messages.Sampled(result=rank.collect())
        else:
            return answer(rank.worker, message)
        return messages.Done()
    except WireError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the engine must hear of it, and decides
        return failure_of(error)


def answer(worker: LocalWorker, message: Message) -> Message:
    """Carry out one order."""
    if isinstance(message, messages.Execute):
        return messages.Sampled(result=worker.execute(message.order))
    if isinstance(message, messages.Describe):
        return messages.Facts(facts={**worker.describe(), "kind": "process"})
    if isinstance(message, messages.Stage):
        worker.stage_weights(message.source, message.version)
    elif isinstance(message, messages.Commit):
        is_first = not worker.describe()["versions"]
        worker.commit_weights()
        if is_first:
            worker.warm_up()  # a step that had to wait for kernels to be compiled would count as stuck
    elif isinstance(message, messages.Discard):
        worker.discard_staged()
    elif isinstance(message, messages.Pin):
        worker.pin_weights(message.name)
    elif isinstance(message, messages.Drop):
        worker.drop_weights(message.name)
    elif isinstance(message, messages.PutAway):
        worker.sleep(_tags(message), message.level, message.spill_dir or None)
    elif isinstance(message, messages.BringBack):
        worker.wake_up(_tags(message))
    elif isinstance(message, messages.Rearrange):
        worker.rearrange_experts(np.array(message.placement, np.int32))
    else:
        raise WireError(f"{type(message).__name__} is not a message to a worker")
    return messages.Done()


def _tags(message: messages.PutAway | messages.BringBack) -> list[str]:
    return [tag for tag in ("weights", "kv_cache") if getattr(message, tag)]
