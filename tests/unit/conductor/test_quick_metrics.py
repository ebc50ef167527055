"""Quick metrics are scraped as prometheus_client's own would be."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from conductor.quick_metrics import QuickCounter, QuickHistogram

BUCKETS = (0.0025, 0.01, 1.0, 5.0)


def scraped(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")  # when the process began to count: nobody asks us
    }


@given(st.lists(st.sampled_from([0.0, 0.001, 0.0025, 0.3, 1.0, 7.0]) | st.floats(0, 10), max_size=20))
def test_a_histogram_is_scraped_as_the_librarys(values: list[float]) -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    one = Histogram("gap_seconds", "Gaps.", buckets=BUCKETS, registry=theirs)
    other = QuickHistogram("gap_seconds", "Gaps.", BUCKETS, ours)
    for value in values:
        one.observe(value)
        other.observe(value)
    assert scraped(ours) == scraped(theirs)


@given(st.lists(st.integers(0, 100), max_size=20))
def test_a_counter_is_scraped_as_the_librarys(values: list[int]) -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    one = Counter("mooncake_tokens", "Tokens.", registry=theirs)
    other = QuickCounter("mooncake_tokens", "Tokens.", ours)
    for value in values:
        one.inc(value)
        other.inc(value)
    assert scraped(ours) == scraped(theirs)
    assert ours.get_sample_value("mooncake_tokens_total") == sum(values)
