"""Has the workers of this process run a step when its result is asked for, as a device that runs behind its host."""

from __future__ import annotations

from late_device import LateDevice, LateStep

from zerokl.rollout.step_order import StepOrder
from zerokl.rollout.worker import LocalWorker


def install() -> None:
    """For the life of the process, which is a rank's."""
    devices: dict[LocalWorker, LateDevice] = {}

    def begin(worker: LocalWorker, order: StepOrder) -> LateStep:
        if worker not in devices:
            devices[worker] = LateDevice(worker.execute, late=True)
        return devices[worker].begin(order)

    LocalWorker.begin = begin  # type: ignore[assignment, method-assign]
