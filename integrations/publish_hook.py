"""An optimizer whose steps reach the engine by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol

from zerokl.rollout.engine import RolloutEngine
from zerokl.weight_sync.publisher import WeightPublisher


class Optimizer(Protocol):
    """Anything with a `step`, such as `paddle.optimizer.Optimizer`."""

    def step(self) -> Any:
        """Apply the gradients."""
        ...


class PublishEvery:
    """Publishes the policy after every `every`-th step of an optimizer, and has the engine take it up.

        with PublishEvery(optimizer, policy.named_arrays, engine, publisher, every=4, mode="keep"):
            train()

    It stands in for `optimizer.step` until it is closed. A step that raises counts for nothing. What `update_weights`
    raises comes out of `step`; the parameters have been updated then, the engine's version has not. For a policy that
    rounds alike `publish_options={"dtype": "bfloat16", "inexact": False}`, and best a publisher that was made with
    `fill=zerokl.kernels.dispatch.fill_weights`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        named_arrays: Callable[[], Mapping[str, Any] | Iterable[tuple[str, Any]]],
        engine: RolloutEngine,
        publisher: WeightPublisher,
        *,
        every: int = 1,
        publish_options: Mapping[str, Any] | None = None,
        **update_options: Any,
    ) -> None:
        """`publish_options` are `WeightPublisher.publish`'s (dtype, inexact), `update_options` those of
        `RolloutEngine.update_weights`. Raises ValueError unless every >= 1.
        """
        if type(every) is not int or every < 1:
            raise ValueError(f"every must be an integer >= 1, got {every!r}")
        self.num_steps = 0
        """Steps since it was made."""
        self._optimizer = optimizer
        self._named_arrays = named_arrays
        self._engine = engine
        self._publisher = publisher
        self._every = every
        self._publish_options = dict(publish_options or {})
        self._options = update_options
        self._step = optimizer.step
        optimizer.step = self._step_and_publish  # type: ignore[method-assign]

    def publish(self) -> int:
        """Publish now and update the engine; returns the version."""
        version = self._engine.get_weight_version() + 1
        published = self._publisher.publish(self._named_arrays(), version, **self._publish_options)
        return self._engine.update_weights(published, **self._options)

    def close(self) -> None:
        """Give the optimizer back the `step` that it had; idempotent."""
        self._optimizer.step = self._step  # type: ignore[method-assign]

    def __enter__(self) -> PublishEvery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _step_and_publish(self, *args: Any, **kwargs: Any) -> Any:
        result = self._step(*args, **kwargs)
        self.num_steps += 1
        if self.num_steps % self._every == 0:
            self.publish()
        return result
