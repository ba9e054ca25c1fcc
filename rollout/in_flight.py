"""What becomes of the requests in flight when the policy's weights change under them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from zerokl.rollout.errors import StaleRequestError
from zerokl.rollout.kv_cache import KVCacheManager
from zerokl.rollout.request import Request, RequestStatus
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.stop import StopStrings
from zerokl.rollout.validation import check_int

UpdateMode = Literal["wait", "keep", "abort", "in_place", "retract"]
"""`in_place` is keep with kv="keep", `retract` is keep with kv="recompute"."""
KVMode = Literal["recompute", "keep"]
OnStale = Literal["requeue", "refuse"]

_ALIASES: dict[str, KVMode] = {"in_place": "keep", "retract": "recompute"}


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlightOptions:
    """How an update treats requests in flight. A bad value raises ValueError naming field, value and bound."""

    mode: UpdateMode = "wait"
    """"wait": they finish first. "keep": they go on under the new weights. "abort": they end with what they have."""
    kv: KVMode | None = None
    """With "keep". "recompute" (None): under the new weights. "keep": the old keys and values stay in use."""
    max_staleness: int | None = None
    """With "keep": versions by which a request's oldest token may lie behind the new weights. None: any number."""
    on_stale: OnStale = "requeue"
    """A request beyond it begins anew ("requeue"), or its call raises StaleRequestError ("refuse")."""

    def __post_init__(self) -> None:
        for name, kinds in (("mode", UpdateMode), ("on_stale", OnStale)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {get_args(kinds)}, got {getattr(self, name)!r}")
        if self.kv is not None and self.kv not in get_args(KVMode):
            raise ValueError(f"kv must be one of {get_args(KVMode)}, got {self.kv!r}")
        implied = _ALIASES.get(self.mode)
        if self.kv is not None and self.mode != "keep" and self.kv != implied:
            raise ValueError(f"kv must be left out unless mode is 'keep', got kv={self.kv!r} with mode={self.mode!r}")
        if self.max_staleness is not None:
            object.__setattr__(self, "max_staleness", check_int("max_staleness", self.max_staleness, 0))
            if not self.keeps:
                raise ValueError(
                    f"max_staleness must be None unless requests are kept, got {self.max_staleness} "
                    f"with mode={self.mode!r}"
                )

    @property
    def keeps(self) -> bool:
        """Whether requests go on under the new weights."""
        return self.mode == "keep" or self.mode in _ALIASES

    @property
    def keeps_kv(self) -> bool:
        """Whether they go on with the keys and values of the old ones."""
        return self.keeps and (self.kv or _ALIASES.get(self.mode)) == "keep"


class InFlightRequests:
    """Prepares the requests of one weight set for a change of its weights. Runs on the loop thread, between steps.

    A score request is of one version: with "keep" and "abort" alike it begins anew under the new weights.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        kv_caches: Sequence[KVCacheManager],
        stop_strings: StopStrings,
        *,
        deliver: Callable[[Request], None],
        refuse: Callable[[Request, Exception], None],
    ) -> None:
        """`deliver` takes a request that has ended; `refuse` ends the whole call of one."""
        self._scheduler = scheduler
        self._kv_caches = kv_caches
        self._stop_strings = stop_strings
        self._deliver = deliver
        self._refuse = refuse

    def make_way(self, policy: str, version: int, options: InFlightOptions) -> None:
        """Bring the requests of `policy` into a state in which its weights may become those of `version`.

        Afterwards none runs, but those that keep their blocks on purpose.
        """
        if options.mode == "abort":
            for request in self._members(policy, "generate"):
                self._abort(request)
        stale = [request for request in self._members(policy, "generate") if is_stale(request, version, options)]
        if options.on_stale == "refuse":
            self._refuse_all(stale, version, options)
        again = [request for request in self._members(policy) if request.kind == "score" or request in stale]
        self._preempt(again if options.keeps_kv else self._members(policy))
        for request in again:
            if request.num_output_tokens:
                request.restart()
                self._stop_strings.forget(request)
        for request in self._members(policy):
            if request.status is RequestStatus.RUNNING:
                self._kv_caches[request.rank].keep_older(request)

    def _members(self, policy: str, kind: str | None = None) -> list[Request]:
        return [
            request
            for request in self._scheduler.requests.values()
            if request.policy == policy and kind in (None, request.kind)
        ]

    def _abort(self, request: Request) -> None:
        aborted = self._scheduler.abort(request.request_id)
        if aborted is not None:
            self._deliver(aborted)

    def _refuse_all(self, stale: Iterable[Request], version: int, options: InFlightOptions) -> None:
        for request in stale:
            if request.is_finished:  # with a sibling that was refused before it
                continue
            oldest = int(request.policy_versions.min())
            error = StaleRequestError(
                f"{request.request_id}: holds tokens of version {oldest}, {version - oldest} behind the new version "
                f"{version}; max_staleness is {options.max_staleness}"
            )
            self._refuse(request, error)

    def _preempt(self, requests: Iterable[Request]) -> None:
        """The last admitted first: each goes to the front of the queue, so their order is kept."""
        running = [request for request in requests if request.status is RequestStatus.RUNNING]
        for request in sorted(running, key=_admission, reverse=True):
            self._scheduler.preempt(request.request_id)


def is_stale(request: Request, version: int, options: InFlightOptions) -> bool:
    """Whether the request's oldest token would be too old under `version`."""
    if options.max_staleness is None or not request.num_output_tokens:
        return False
    return version - int(request.policy_versions.min()) > options.max_staleness


def _admission(request: Request) -> Any:
    return request.admission
