"""Recorded steps of a GPU: which are made, launched again, and let go.

Launching the hundreds of kernels of a step one by one takes the host longer than the GPU runs. So the launches of a
kind of step are recorded when it comes for the second time, and made at once from then on. Graphs hold addresses: they
belong to one place of weights and one KV pool. Those that have not been launched for the longest time go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from typing import Any

MOST_GRAPHS = 128
"""Per place of weights, half a MiB each: enough for the kinds that come again and again."""

MOST_KNOWN = 1024
"""Kinds of which it is remembered that they have come."""

Launches = Callable[[], None]


class RecordedSteps:
    """Graphs by place and kind. One thread calls."""

    def __init__(
        self, record: Callable[[Launches], Any], most: int = MOST_GRAPHS, most_known: int = MOST_KNOWN
    ) -> None:
        """`record` makes a graph, something to `launch`, of launches whose kernels are compiled."""
        self._record = record
        self._most = most
        self._most_known = most_known
        self._known: OrderedDict[Hashable, None] = OrderedDict()
        """Kinds that have run: their kernels are compiled, their memory is there. The latest last, as below."""
        self._graphs: dict[int, OrderedDict[Hashable, Any]] = {}

    @property
    def num_graphs(self) -> int:
        """Of all places."""
        return sum(len(graphs) for graphs in self._graphs.values())

    @property
    def places(self) -> Collection[int]:
        """Those with graphs."""
        return self._graphs.keys()

    def launch(self, place: int, kind: Hashable, launches: Launches) -> None:
        """Launch a step of this kind, whose launches are `launches`, with the weights in a place."""
        graphs = self._graphs.setdefault(place, OrderedDict())
        if kind in graphs:
            graphs.move_to_end(kind)
        elif kind in self._known:
            if len(graphs) == self._most:
                graphs.popitem(last=False)
            graphs[kind] = self._record(launches)
        else:
            launches()
            self._remember(kind)
            return
        graphs[kind].launch()

    def forget(self, places: Collection[int]) -> None:
        """Let go of the graphs of these places."""
        for place in places:
            del self._graphs[place]

    def clear(self) -> None:
        """Forget all, kinds too: memory of steps goes away."""
        self._graphs.clear()
        self._known.clear()

    def _remember(self, kind: Hashable) -> None:
        if len(self._known) == self._most_known:
            self._known.popitem(last=False)
        self._known[kind] = None
