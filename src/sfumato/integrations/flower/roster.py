"""Which node of the network is which client. A ledger belongs to a client, so no node may pick whom it speaks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from .exchange import exchange

Names = Literal["registered", "claimed"]
NAME_QUESTION = "query.sfumato_name"
_PATIENCE = 30.0  # seconds that nodes have to say a name; each starts a process for it


class Roster:
    """The clients behind the nodes that are connected now.

    Args:
        names: ``registered``: the name under which the operator registered the key of a node
            (``flwr supernode register KEY --name CLIENT``), which the node proves to hold. ``claimed``: what a node
            says it is (``client`` in its node configuration). The first claim of a name holds while its node stays
            connected; nothing else stops a node from claiming another's name, so use it only where all are trusted.
    """

    def __init__(self, grid: Grid, names: Names) -> None:
        self._grid = grid
        self._names = names
        self._claims: dict[int, str] = {}

    def connected(self, wanted: Iterable[str] | None = None) -> Mapping[str, int]:
        """{client: node}, without nodes that have no name, and without names that several nodes were registered under.

        ``wanted``: nobody else is of interest, so strangers are asked for names only while one of these is missing.
        """
        if self._names == "registered":
            found = [(node.name, node.node_id) for node in self._grid.get_nodes() if node.name]
        else:
            found = self._claimed(None if wanted is None else set(wanted))
        often = Counter(name for name, _ in found)
        return {name: node for name, node in found if often[name] == 1}

    def _claimed(self, wanted: set[str] | None) -> list[tuple[str, int]]:
        nodes = list(self._grid.get_node_ids())
        self._claims = {node: name for node, name in self._claims.items() if node in nodes}
        if wanted is None or not wanted <= set(self._claims.values()):
            question = RecordDict()
            strangers = {node: question for node in nodes if node not in self._claims}
            for node, answer in exchange(self._grid, strangers, NAME_QUESTION, group="names", seconds=_PATIENCE):
                name = _said(answer)
                if name is not None and name not in self._claims.values():
                    self._claims[node] = name
        return [(name, node) for node, name in self._claims.items()]


def name_records(name: str) -> RecordDict:
    """A node's answer to the question for its name."""
    return RecordDict({"name": ConfigRecord({"client": name})})


def _said(answer: RecordDict | str) -> str | None:
    if isinstance(answer, str) or set(answer) != {"name"}:
        return None
    record = answer["name"]
    name = record.get("client") if isinstance(record, ConfigRecord) else None
    return name if isinstance(name, str) and name else None
