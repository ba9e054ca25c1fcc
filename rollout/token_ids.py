"""What a caller may give as token ids, checked and made into one form."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MAX_TOKEN_ID = 2**31 - 1


def as_token_ids(name: str, token_ids: ArrayLike) -> NDArray[np.int32]:
    """`token_ids` as int32[N], N >= 1. Raises ValueError naming `name` for anything but a flat sequence of ids."""
    try:
        array: NDArray[Any] = np.asarray(token_ids)
    except ValueError as error:  # a ragged list
        raise ValueError(f"{name} must be a non-empty flat sequence of integers: {error}") from error
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be a non-empty flat sequence of integers, got shape {array.shape} of dtype {array.dtype}"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > _MAX_TOKEN_ID:
        raise ValueError(f"{name} must hold token ids in [0, 2**31), got {low if low < 0 else high}")
    return np.ascontiguousarray(array, np.int32)
