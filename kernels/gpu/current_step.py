"""The step that is under way: what it was given, where its arrays lie on the device, and memory for its ops."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.gpu.device import Device
from zerokl.kernels.gpu.packed import Dtype
from zerokl.kernels.gpu.scratch import Scratch
from zerokl.kernels.gpu.step_arrays import StepLayout, lay_out
from zerokl.kernels.gpu.transfers import Uploads
from zerokl.kernels.ops import KVPool, StepInputs

if TYPE_CHECKING:
    from zerokl.kernels.gpu.elementwise import Tensor

MOST_RECORDED_TOKENS = 4096
"""Of a step that may be recorded: 280 launches of 25 us, those of 28 layers, take about as long as so many tokens."""


class CurrentStep:
    """One step after the other: `begin`, then `restart` and `send`, before anything else is asked for."""

    def __init__(self, device: Device, dtype: Dtype) -> None:
        """`dtype`: of what `take` gives where no other is named."""
        self._device = device
        self._dtype = dtype
        self._scratch = Scratch(device.empty)
        self._uploads = Uploads(device)
        self._inputs: StepInputs | None = None
        self._layout: StepLayout | None = None
        self._pool: KVPool[Tensor] | None = None
        self._flat: Tensor = None
        self._sections: dict[str, Tensor] = {}
        self._arrays: dict[tuple[tuple[str, int], ...], tuple[Tensor, dict[str, Tensor]]] = {}
        """By layout, of steps that may be recorded."""

    @property
    def inputs(self) -> StepInputs:
        """As given; on the host."""
        assert self._inputs is not None, "no step has begun"
        return self._inputs

    @property
    def pool(self) -> KVPool[Tensor]:
        """As given."""
        assert self._pool is not None, "no step has begun"
        return self._pool

    @property
    def layout(self) -> StepLayout:
        """The bucket that the step is padded to."""
        assert self._layout is not None, "no step has begun"
        return self._layout

    @property
    def sections(self) -> Mapping[str, Tensor]:
        """Those of the layout on the device, each [n] int32."""
        assert self._layout is not None, "no step has begun"
        return self._sections

    @property
    def may_come_again(self) -> bool:
        """Whether its launches may be what is waited for: those of a step of many tokens are not."""
        return self.layout.num_tokens <= MOST_RECORDED_TOKENS

    def begin(self, inputs: StepInputs, pool: KVPool[Tensor], lists: dict[str, NDArray[np.int32]]) -> None:
        """Take a step's inputs and the `lists` that are to be sections beside them."""
        self._inputs, self._pool = inputs, pool
        self._layout = lay_out(inputs, **lists)

    def restart(self) -> None:
        """Nothing that was taken is referred to any more: the step's launches begin, or are made again."""
        self._scratch.begin((self.layout.num_tokens, self.layout.num_rows))

    def send(self) -> None:
        """Copy the step's arrays to the device; waits for no step before."""
        layout = self.layout
        self._flat, self._sections = self._metadata(layout)
        self._uploads.send(layout.flat, self._flat)

    def take(self, *shape: int, dtype: str | None = None) -> Tensor:
        """An uninitialised tensor of the table's type or another, the caller's while it is referred to."""
        return self._scratch.take(shape, dtype or self._dtype)

    def begin_part(self, kind: Hashable) -> None:
        """Nothing that was taken is referred to any more: what follows has sizes of its own, told by `kind`."""
        self._scratch.begin(kind)

    def forget(self) -> None:
        """Let go of the pool and of all memory of steps; recorded ones are not to be launched any more."""
        self._inputs = self._layout = self._pool = self._flat = None
        self._sections = {}
        self._arrays.clear()
        self._scratch.clear()

    def _metadata(self, layout: StepLayout) -> tuple[Tensor, dict[str, Tensor]]:
        """Where the layout goes on the device, for what may be recorded an address of its own, and its sections."""
        key, kept = layout.key(), self.may_come_again
        if kept and key in self._arrays:
            return self._arrays[key]
        size = len(layout.flat)
        flat = self._device.empty([size], "int32") if kept else self.take(size, dtype="int32")
        made = flat, {name: flat[section] for name, section in layout.sections.items()}
        if kept:
            self._arrays[key] = made
        return made
