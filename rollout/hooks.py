"""Functions of the user that are called around weight updates."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from zerokl.rollout.errors import HookError

HookName = Literal["before_update", "after_commit", "on_failure"]
OnHookError = Literal["abort", "report"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateEvent:
    """What a hook is told of an update."""

    live_version: int
    """Version that was live when the update was asked for; in `after_commit`, the new one."""
    version: int | None
    """Version that was asked for; None: the next one."""
    mode: str
    """Mode of `update_weights`."""
    error: BaseException | None = None
    """In `on_failure`: why the old version goes on serving."""


Hook = Callable[[UpdateEvent], Any]


class UpdateHooks:
    """Hooks by name, called in order of registration by the thread that asked for the update, never by the loop's.

    So a hook may call the engine, and generation goes on while it runs. What it raises either calls the update off
    ("abort", the default of `before_update`, and possible there only) or is logged and counted ("report").
    """

    def __init__(self) -> None:
        self.num_errors = 0
        """Exceptions that were logged."""
        self._lock = threading.Lock()
        self._hooks: dict[str, list[tuple[Hook, OnHookError]]] = {name: [] for name in get_args(HookName)}

    def add(self, name: HookName, hook: Hook, on_error: OnHookError | None = None) -> Callable[[], None]:
        """Register a hook; the callable returned removes it. Raises ValueError for an unknown name or `on_error`."""
        if name not in self._hooks:
            raise ValueError(f"name must be one of {get_args(HookName)}, got {name!r}")
        if not callable(hook):
            raise ValueError(f"hook must be callable, got {hook!r}")
        allowed: tuple[OnHookError, ...] = ("abort", "report") if name == "before_update" else ("report",)
        chosen = allowed[0] if on_error is None else on_error
        if chosen not in allowed:
            raise ValueError(f"on_error must be one of {allowed} for {name}, got {on_error!r}")
        entry = (hook, chosen)
        with self._lock:
            self._hooks[name].append(entry)

        def remove() -> None:
            with self._lock:
                if entry in self._hooks[name]:
                    self._hooks[name].remove(entry)

        return remove

    def call(self, name: HookName, event: UpdateEvent) -> None:
        """Call all hooks of a name. Raises HookError where one calls the update off; later ones are not called then."""
        with self._lock:
            hooks = list(self._hooks[name])
        for hook, on_error in hooks:
            try:
                hook(event)
            except Exception as error:
                if on_error == "abort":
                    raise HookError(f"{name} hook {_title(hook)} raised {error!r}: the update is off") from error
                self.num_errors += 1
                _logger.exception("%s hook %s raised", name, _title(hook))


def _title(hook: Hook) -> str:
    return getattr(hook, "__qualname__", None) or repr(hook)
