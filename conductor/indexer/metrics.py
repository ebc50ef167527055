"""What the indexer holds, and how its publishers are, on /metrics; read when it is asked for."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from conductor.indexer.follow import Follower, State
from conductor.indexer.service import Indexer
from mooncake.core.metric_labels import INSTANCES_MAX, OTHER, Bounded

_LABELS = ["instance_id", "rank"]


class IndexerCollector(Collector):
    """Turns an Indexer's numbers into Prometheus metrics."""

    def __init__(self, indexer: Indexer) -> None:
        """Of one indexer."""
        self._indexer = indexer
        self._known = Bounded(INSTANCES_MAX)

    def collect(self) -> Iterator[Metric]:
        """Yield one family per number."""
        with self._indexer.lock:
            contexts = list(self._indexer.contexts.all.values())
            blocks = sum(context.blocks() for context in contexts)
            dropped = sum(context.dropped() for context in contexts)
        yield GaugeMetricFamily("mooncake_indexer_contexts", "Contexts that are known.", len(contexts))
        yield GaugeMetricFamily("mooncake_indexer_blocks", "Blocks in all contexts.", blocks)
        yield CounterMetricFamily(
            "mooncake_indexer_dropped", "Blocks dropped, the oldest, because a context was full.", dropped
        )
        queries = CounterMetricFamily("mooncake_indexer_queries", "Queries.", labels=["context"])
        for label in ("known", "unknown"):
            queries.add_metric([label], self._indexer.queries[label])
        yield queries
        states = self._indexer.states()
        publishers = GaugeMetricFamily("mooncake_indexer_publishers", "Registered.", labels=["state"])
        for state in State:
            publishers.add_metric([state], states[state])
        yield publishers
        yield from self._of_publishers()

    def _of_publishers(self) -> Iterator[Metric]:
        words = {
            "gaps": "Times that messages of a publisher were missing.",
            "lost": "Gaps that could not be filled: what it had told was forgotten.",
            "restarts": "Times that a publisher came back as another.",
            "undecodable": "Messages that could not be read.",
        }
        followers = self._indexer.followers()
        for name, text in words.items():
            yield self._summed(
                CounterMetricFamily(f"mooncake_indexer_{name}", text, labels=_LABELS),
                ((self._of(one), getattr(one.stream, name)) for one in followers),
            )
        yield self._summed(
            CounterMetricFamily(
                "mooncake_indexer_left_out", "Blocks without a name.", labels=[*_LABELS, "reason"]
            ),
            (
                ((*self._of(one), str(reason)), count)
                for one in followers
                for reason, count in dict(one.stream.source.left_out).items()
                if count
            ),
        )

    def _of(self, follower: Follower) -> tuple[str, ...]:
        """Return the labels of a publisher: whoever may register one names it."""
        service = follower.stream.source.service
        name = f"{service.instance}/{service.rank}"
        return (OTHER, OTHER) if self._known(name) == OTHER else (service.instance, str(service.rank))

    @staticmethod
    def _summed(
        family: CounterMetricFamily, values: Iterable[tuple[tuple[str, ...], float]]
    ) -> CounterMetricFamily:
        sums: defaultdict[tuple[str, ...], float] = defaultdict(float)
        for labels, value in values:
            sums[labels] += value
        for labels, value in sums.items():
            family.add_metric(labels, value)
        return family
