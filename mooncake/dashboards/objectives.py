"""What is promised, and how quickly a promise may be used up before somebody is called.

deploy/prometheus/rules.yaml holds the same numbers; a test compares them.
"""

from typing import NamedTuple

AVAILABILITY = 0.999
"""Of the requests that were accepted, so many end as they should: neither failed nor cut short."""
GOODPUT = 0.99
"""Of the requests that were accepted, so many keep the objectives of their class (TTFT and TBT)."""


class Burn(NamedTuple):
    """An alert: both windows use up the budget `times` as quickly as it would last 30 days."""

    times: float
    long: str
    short: str
    severity: str


BURNS = (
    Burn(14.4, "1h", "5m", "page"),  # 2 % of the month's budget in one hour
    Burn(6.0, "6h", "30m", "page"),  # 5 % in six hours
    Burn(3.0, "1d", "2h", "ticket"),  # 10 % in a day
    Burn(1.0, "3d", "6h", "ticket"),  # 10 % in three days
)
