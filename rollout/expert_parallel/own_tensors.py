"""The live tensors of a rank, for updates that build on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.layout import expected_tensors
from zerokl.weight_sync.errors import ParentMismatchError


class OwnTensors(Mapping[str, NDArray[np.float32]]):
    """All names of a model over the tensors that this rank holds; looking at one of another rank's experts raises
    ParentMismatchError.

    A delta needs the checksum of every tensor that it leaves alone. For other ranks' experts it is known from the
    publication that brought them, and nowhere else.
    """

    def __init__(self, held: Mapping[str, NDArray[np.float32]], config: ModelConfig) -> None:
        self._held, self._names = held, expected_tensors(config)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name in self._held or name not in self._names:
            return self._held[name]
        raise ParentMismatchError(
            f"the delta needs tensor {name!r} as it was, which is on another rank, and no publication of it is known: "
            f"publish all tensors once"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
