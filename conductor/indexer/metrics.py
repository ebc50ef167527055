"""What the indexer holds, and how its publishers are, on /metrics; read when it is asked for."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from conductor.indexer.follow import State
from conductor.indexer.service import Indexer


class IndexerCollector(Collector):
    """Turns an Indexer's numbers into Prometheus metrics."""

    def __init__(self, indexer: Indexer) -> None:
        """Of one indexer."""
        self._indexer = indexer

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
            family = CounterMetricFamily(f"mooncake_indexer_{name}", text, labels=["instance", "rank"])
            for one in followers:
                service = one.stream.source.service
                family.add_metric([service.instance, str(service.rank)], getattr(one.stream, name))
            yield family
        left_out = CounterMetricFamily(
            "mooncake_indexer_left_out", "Blocks without a name.", labels=["instance", "rank", "reason"]
        )
        for one in followers:
            service = one.stream.source.service
            for reason, count in dict(one.stream.source.left_out).items():
                if count:
                    left_out.add_metric([service.instance, str(service.rank), reason], count)
        yield left_out
