"""The change that the loop's queue has reached and that is not applied yet."""

from __future__ import annotations

from zerokl.rollout.control import Exclusive, settle
from zerokl.rollout.errors import WorkerError
from zerokl.rollout.loop_meter import LoopMeter
from zerokl.rollout.pause import GenerationPause
from zerokl.rollout.scheduler import Scheduler


class PendingChange:
    """None -> begin(change) -> requests finish, if it waits for them -> settle() -> none. Runs on the loop thread.

    Any thread may ask whether there is one.
    """

    def __init__(self, scheduler: Scheduler, pause: GenerationPause, meter: LoopMeter) -> None:
        self._scheduler = scheduler
        self._pause = pause
        self._meter = meter
        self._change: Exclusive | None = None

    @property
    def exists(self) -> bool:
        """Whether there is one: nobody else is let in meanwhile."""
        return self._change is not None

    @property
    def is_due(self) -> bool:
        """Whether there is one that waits for no request any more, or that its caller has given up."""
        change = self._change
        if change is None:
            return False
        return not (change.waits and self._scheduler.num_unfinished) or change.future.cancelled()

    def begin(self, change: Exclusive) -> None:
        """Take one up, while there is none, and prepare it; one that cannot be is the caller's to hear of, and is gone.

        Raises WorkerError where the workers cannot go on.
        """
        assert self._change is None, "a change is pending"
        self._change = change
        try:
            if change.waits:
                self._pause.check_can_drain(self._scheduler.num_unfinished)
            change.prepare()
        except WorkerError:
            raise
        except Exception as error:  # noqa: BLE001 - bad weights, a missing file, too little memory: the caller's to see
            change.discard()
            self._change = None
            if change.future.set_running_or_notify_cancel():
                change.future.set_exception(error)
        self._meter.begin_drain()

    def settle(self) -> bool:
        """Apply it, or drop it if it was given up, where it is due; whether there is none then."""
        change = self._change
        if change is None:
            return True
        if not self.is_due:
            return False
        self._meter.end_drain()
        if change.future.set_running_or_notify_cancel():
            settle(change.future, change.apply)
        else:
            change.discard()
        self._change = None
        return True

    def take(self) -> Exclusive | None:
        """Forget it: the loop has ended, and it is the caller's to resolve."""
        change, self._change = self._change, None
        return change
