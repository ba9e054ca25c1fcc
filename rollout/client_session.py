"""Sessions whose turns run over a connection: the same, and their tokens as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from zerokl.rollout.client_calls import TokenChunk
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.session import Session, id_list

if TYPE_CHECKING:
    from zerokl.rollout.client import RolloutClient


class ClientSession(Session):
    """A `Session` of a `RolloutClient`."""

    __slots__ = ()

    _host: RolloutClient

    def stream(
        self, sampling_params: SamplingParams | None = None, *, chunk: int = 8, request_id: str | None = None
    ) -> Iterator[TokenChunk]:
        """`generate` with its tokens as they come, `chunk` or more at a time; the turn is kept when the loop ends.

        A loop that is left early gives the turn up, and the session stays as it was.
        """
        with self._turn():
            params = self._params_of_turn(sampling_params)
            stream = self._host.stream(self.tokens, params, chunk=chunk, request_ids=id_list(request_id))
            yield from stream
            self._keep(self._transcript, stream.rollouts()[0])

    async def astream(
        self, sampling_params: SamplingParams | None = None, *, chunk: int = 8, request_id: str | None = None
    ) -> AsyncIterator[TokenChunk]:
        """`stream` for coroutines."""
        with self._turn():
            params = self._params_of_turn(sampling_params)
            stream = self._host.stream(self.tokens, params, chunk=chunk, request_ids=id_list(request_id))
            async for part in stream:
                yield part
            self._keep(self._transcript, stream.rollouts()[0])
