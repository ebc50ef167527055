"""Values of metric labels: never more of them than a number that is known before the process starts.

Each value is a time series for good, in every scrape and in Prometheus' memory. So what clients name makes no
label, and what operators name (instances, hosts, tenants of the file) makes so many and no more: what comes
later shares one value.
"""

OTHER = "other"
"""The value of all that have none of their own."""
INSTANCES_MAX = 256
"""Instances with a value of their own, in one process: four times the largest cluster that we measure."""
TENANTS_MAX = 100
"""Tenants with a value of their own: with some ten reasons to turn requests away, a thousand series."""


class Bounded:
    """The first `most` different values are themselves, whatever comes later is OTHER."""

    def __init__(self, most: int) -> None:
        """Nothing was seen yet."""
        self._most = most
        self._known: set[str] = {OTHER}

    def __call__(self, value: str) -> str:
        """Return the label of `value`: the same one each time."""
        if value in self._known:
            return value
        if len(self._known) > self._most:  # OTHER is among them
            return OTHER
        self._known.add(value)
        return value
