"""What the op table asks of a GPU beside kernels: memory, copies, events and recorded graphs on one stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from zerokl.kernels.gpu.elementwise import Tensor


class Graph(Protocol):
    """Recorded launches."""

    def launch(self) -> None:
        """Have them run again, after what was launched before."""
        ...


class Device(Protocol):
    """What `zerokl.kernels.gpu.ops.GpuOps` asks of the machine beside kernels."""

    def enter(self) -> None:
        """Make the calling thread one that may use the device."""
        ...

    def empty(self, shape: Sequence[int], dtype: str) -> Tensor:
        """An uninitialised tensor."""
        ...

    def put(self, values: NDArray[Any]) -> Tensor:
        """A copy on the device, there when this returns; uint16 patterns become bfloat16."""
        ...

    def get(self, tensor: Tensor) -> NDArray[Any]:
        """A copy on the host, after all that was launched; bfloat16 as uint16 patterns."""
        ...

    def pinned(self, size: int) -> NDArray[np.int32]:
        """Host memory [size] that copies need not wait for; for the life of the process."""
        ...

    def upload(self, values: NDArray[np.int32], tensor: Tensor) -> None:
        """Copy pinned memory to the first entries of a tensor, in the order of launches."""
        ...

    def download(self, tensor: Tensor, values: NDArray[np.int32]) -> None:
        """Copy the first 4-byte entries of a tensor to pinned memory, by their bits, in the order of launches."""
        ...

    def mark(self) -> Any:
        """An event that is reached once all that was launched so far has run."""
        ...

    def wait(self, event: Any) -> None:
        """Return when it is reached."""
        ...

    def record(self, launches: Callable[[], None]) -> Graph:
        """What `launches` launches as a graph, which is not run now; it keeps the tensors' addresses, not them."""
        ...

    def await_owner(self) -> None:
        """Wait for what others than the op table, such as a trainer, have given the device to do so far."""
        ...

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        ...

    def release_unused(self) -> None:
        """Give memory of tensors that are gone to the system."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""
        ...
