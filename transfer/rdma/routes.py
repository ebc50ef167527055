"""Which pairs of NICs carry a copy, best first. Pure.

Rails: NIC i of one host usually reaches only NIC i of the other (or reaches it without crossing a spine),
so the first choice pairs NICs of the same name, and every other pair is kept for when those have failed.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

from transfer.messages import NicInfo


class Route(NamedTuple):
    """A NIC of ours and one of the peer's, by rail name."""

    local: str
    remote: str

    def path(self, peer: str) -> str:
        """Return its name for health, metrics and logs."""
        return f"rdma/{self.local}-{self.remote}@{peer}"


class Places(Protocol):
    """Where NICs are, relative to memory (transfer.topology)."""

    def preferred(self, location: str) -> list[str]:
        """Return the nearest devices."""

    def secondary(self, location: str) -> list[str]:
        """Return those to use when no preferred one works."""


def rail_name(info: NicInfo) -> str:
    """Return the name of one port: the device's, with ":port" unless it is the first."""
    return info.name if info.port == 1 else f"{info.name}:{info.port}"


def near_and_far(places: Places, location: str, rails: Collection[str]) -> tuple[list[str], list[str]]:
    """Sort `rails` into those to use for memory at `location` and the others.

    Rails of preferred devices are near; without any, those of secondary devices; without any, all.
    """
    for devices in (
        places.preferred(location),
        places.secondary(location),
        [r.partition(":")[0] for r in rails],
    ):
        near = [
            rail for device in dict.fromkeys(devices) for rail in rails if rail.partition(":")[0] == device
        ]
        if near:
            return near, [rail for rail in rails if rail not in near]
    return [], []


def tiers(
    mine: tuple[Sequence[str], Sequence[str]],
    theirs: tuple[Sequence[str], Sequence[str]],
    joined: Callable[[Route], bool],
) -> list[list[Route]]:
    """Return routes in groups, best group first, each route once.

    Args:
        mine: our (near, far) rails.
        theirs: the peer's.
        joined: whether the two can talk at all (the same link layer).
    """
    (near, far), (their_near, their_far) = mine, theirs
    everybody = [*their_near, *their_far]
    groups = [
        _rails(near, their_near),
        [Route(a, b) for a in near for b in their_near],
        _rails(far, everybody),
        [Route(a, b) for a in [*near, *far] for b in everybody],
    ]
    seen: set[Route] = set()
    result = []
    for group in groups:
        fresh = [route for route in dict.fromkeys(group) if route not in seen and joined(route)]
        seen.update(fresh)
        if fresh:
            result.append(fresh)
    return result


def _rails(mine: Sequence[str], theirs: Sequence[str]) -> list[Route]:
    """Pair equal names; the others in turn."""
    if not theirs:
        return []
    return [Route(rail, rail if rail in theirs else theirs[i % len(theirs)]) for i, rail in enumerate(mine)]


def choose(groups: Sequence[Sequence[Route]], usable: Callable[[Route], bool]) -> list[Route]:
    """Return the usable routes of the best group that has any, [] if none has."""
    for group in groups:
        if chosen := [route for route in group if usable(route)]:
            return chosen
    return []
