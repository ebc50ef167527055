"""Messages between the nodes of one engine: a follower tells its leader how it is, and is answered.

Our own link, proved by the cluster's secret as every other; vLLM's ranks talk beside it (nodes.py).
"""

import msgspec

from mooncake.worker.spec import EngineSpec

GATHERS, SERVES, STOPS, FAILED = "gathers", "serves", "stops", "failed"
"""Of a leader: it waits for followers; its engine loads or serves; it ends as told; its engine has died."""


class NodeBeat(msgspec.Struct, frozen=True, array_like=True, tag="nbeat"):
    """A follower, twice a second. Answer: NodeAnswer.

    `life` is new at every start. `epoch`: of the engine whose ranks it runs, "" = none yet. `leaves`: told to
    go, it asks the leader to drain. `gone`: why this is its last word, "" = it is not.
    """

    rank: int
    life: str
    version: str
    epoch: str = ""
    leaves: bool = False
    gone: str = ""


class NodeAnswer(msgspec.Struct, frozen=True, array_like=True, tag="nans"):
    """`order`: what to start, as soon as all are there; `may_go`: nothing is in flight any more."""

    phase: str
    instance_id: str
    order: EngineSpec | None = None
    may_go: bool = False
