"""Training inside, serving after: the context manager that engines and clients share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from zerokl.rollout.in_flight import InFlightOptions


class HotSwap:
    """What `RolloutEngine.hot_swap` yields: `version` is the one that its end has made live, None before."""

    def __init__(self) -> None:
        self.version: int | None = None


class HotSwapping:
    """Adds `hot_swap` to what has `update_weights`."""

    update_weights: Callable[..., int]

    @contextmanager
    def hot_swap(self, source: Any, **options: Any) -> Iterator[HotSwap]:
        """Train inside, serve after: a body that ends well is followed by `update_weights`, with its options.

            with engine.hot_swap(policy.named_arrays, mode="keep") as swap:
                optimizer.step()
            print(swap.version)

        `source` may be a function that gives the weights at the end of the body. A body that raises updates nothing.
        """
        others = ("version", "allow_rewind", "bucket_bytes")
        InFlightOptions(**{key: value for key, value in options.items() if key not in others})
        swap = HotSwap()
        yield swap
        swap.version = self.update_weights(source() if callable(source) else source, **options)
