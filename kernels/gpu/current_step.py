"""The step that is under way: what it was given, where its arrays lie on the device, and memory for its ops."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

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

KEPT_ENTRIES = 1 << 24
"""Of the arrays of steps that may come again, 64 MiB: those of the layouts that came last."""


class _Arrays(NamedTuple):
    """Where the arrays of steps of one layout lie on the device."""

    number: int
    """Never given twice."""
    flat: Tensor
    sections: dict[str, Tensor]


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
        self._arrays: _Arrays | None = None
        self._numbers = count()
        self._kept: OrderedDict[Hashable, _Arrays] = OrderedDict()
        """By layout, of steps that may be recorded; the latest last."""
        self._kept_entries = 0

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
        assert self._arrays is not None, "no step has been sent"
        return self._arrays.sections

    @property
    def place(self) -> int | None:
        """Equal for steps of one layout whose arrays lie at the same addresses; None for a step of so many tokens that
        its launches are not what is waited for, whose arrays lie anywhere.
        """
        assert self._arrays is not None, "no step has been sent"
        return self._arrays.number if self._may_come_again else None

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
        if self._may_come_again:
            self._arrays = self._kept_arrays(layout)
        else:
            self._arrays = self._in(self.take(len(layout.flat), dtype="int32"), layout)
        self._uploads.send(layout.flat, self._arrays.flat)

    def take(self, *shape: int, dtype: str | None = None) -> Tensor:
        """An uninitialised tensor of the table's type or another, the caller's while it is referred to."""
        return self._scratch.take(shape, dtype or self._dtype)

    def begin_part(self, kind: Hashable) -> None:
        """Nothing that was taken is referred to any more: what follows has sizes of its own, told by `kind`."""
        self._scratch.begin(kind)

    def forget(self) -> None:
        """Let go of the pool and of all memory of steps; recorded ones are not to be launched any more."""
        self._inputs = self._layout = self._pool = self._arrays = None
        self._kept.clear()
        self._kept_entries = 0
        self._scratch.clear()

    @property
    def _may_come_again(self) -> bool:
        return self.layout.num_tokens <= MOST_RECORDED_TOKENS

    def _kept_arrays(self, layout: StepLayout) -> _Arrays:
        """Those of the last step of this layout, or others that are kept in place of the ones that came longest ago."""
        key, size = layout.key(), len(layout.flat)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        while self._kept and self._kept_entries + size > KEPT_ENTRIES:
            _, oldest = self._kept.popitem(last=False)
            self._kept_entries -= int(oldest.flat.shape[0])
        self._kept_entries += size
        self._kept[key] = self._in(self._device.empty([size], "int32"), layout)
        return self._kept[key]

    def _in(self, flat: Tensor, layout: StepLayout) -> _Arrays:
        return _Arrays(next(self._numbers), flat, {name: flat[part] for name, part in layout.sections.items()})
