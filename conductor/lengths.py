"""How many tokens answers have, per tenant and class of service: histograms that forget. Pure.

One global mean is wrong for everybody when a tenant that classifies (1 token) shares engines with one that
writes (4,000). Each group has a histogram with steps of 19 %; what lies in it is halved now and then, so the
last MEMORY_ANSWERS or so count. A tenant too new to know borrows its class's histogram.
"""

from math import log2

STEPS_PER_OCTAVE = 4
"""2 ** (1 / 4): a quantile is right within 19 %, better than answers repeat."""
BUCKETS = 20 * STEPS_PER_OCTAVE + 1
"""Up to 2 ** 20 tokens, beyond every context; what is longer counts as the last."""
MEMORY_ANSWERS = 1024.0
"""When a histogram holds so many, all of it is halved."""
ENOUGH = 32.0
"""Answers after which a mean is within some 20 % for lengths that spread as their mean (1 / sqrt(32))."""
GROUPS_MAX = 1024
"""Histograms that are kept, some 2 kB each; the one not added to for longest goes."""

_Key = tuple[str, ...]


class _Histogram:
    __slots__ = ("answers", "counts", "quantiles", "tokens", "total")

    def __init__(self) -> None:
        self.answers = 0.0
        self.total = 0.0
        self.quantiles: dict[float, float] = {}  # of all answers, since the last one: asked per instance
        self.counts = [0.0] * BUCKETS
        self.tokens = [0.0] * BUCKETS  # so that means are exact whatever the steps

    def add(self, tokens: int) -> None:
        at = _bucket(tokens)
        self.counts[at] += 1
        self.tokens[at] += tokens
        self.answers += 1
        self.total += tokens
        self.quantiles.clear()
        if self.answers >= MEMORY_ANSWERS:
            self.counts = [one / 2 for one in self.counts]
            self.tokens = [one / 2 for one in self.tokens]
            self.answers /= 2
            self.total /= 2

    def mean(self, beyond: int) -> float | None:
        """Return the mean of answers longer than `beyond`; None if too few were."""
        first = _bucket(beyond + 1)
        answers = sum(self.counts[first:]) if first else self.answers
        if answers < ENOUGH:
            return None
        return (sum(self.tokens[first:]) if first else self.total) / answers

    def quantile(self, share: float, beyond: int) -> float | None:
        """Return the length that `share` of the answers longer than `beyond` do not exceed; None as above."""
        first = _bucket(beyond + 1)
        answers = sum(self.counts[first:]) if first else self.answers
        if answers < ENOUGH:
            return None
        if not first and share in self.quantiles:
            return self.quantiles[share]
        left = share * answers
        last = first
        for at in range(first, BUCKETS):
            if self.counts[at]:
                last = at
                left -= self.counts[at]
                if left <= 0:
                    break
        length = self.tokens[last] / self.counts[last]
        if not first:
            self.quantiles[share] = length
        return length


class OutputLengths:
    """Bounded: GROUPS_MAX histograms. Work per call is constant."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._groups: dict[_Key, _Histogram] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def observe(self, tenant: str, slo_class: str, tokens: int) -> None:
        """Learn from one finished answer of `tokens` > 0."""
        for key in ((tenant, slo_class), (slo_class,)):
            group = self._groups.pop(key, None) or _Histogram()
            self._groups[key] = group  # last: the first is the one not added to for longest
            group.add(tokens)
        while len(self._groups) > GROUPS_MAX:
            del self._groups[next(iter(self._groups))]

    def mean(self, tenant: str, slo_class: str, beyond: int = 0) -> float | None:
        """Return the expected length of answers longer than `beyond`; None = not enough was seen."""
        for key in ((tenant, slo_class), (slo_class,)):
            group = self._groups.get(key)
            if group is not None and (mean := group.mean(beyond)) is not None:
                return max(mean, beyond + 1.0)
        return None

    def quantile(self, tenant: str, slo_class: str, share: float, beyond: int = 0) -> float | None:
        """Return the length that `share` of such answers do not exceed; None = not enough was seen."""
        for key in ((tenant, slo_class), (slo_class,)):
            group = self._groups.get(key)
            if group is not None and (length := group.quantile(share, beyond)) is not None:
                return max(length, beyond + 1.0)
        return None


def _bucket(tokens: int) -> int:
    return min(int(STEPS_PER_OCTAVE * log2(max(1, tokens))), BUCKETS - 1)
