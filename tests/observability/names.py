"""Which metrics exist, and which an expression names."""

import re
from pathlib import Path

import promql_parser

TABLE = Path(__file__).parents[2] / "docs" / "metrics.md"
"""Generated from the code, and compared with it by a test of its own."""
VLLM_METRICS = {
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_prefill_time_seconds_count",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_decode_time_seconds_count",
    "vllm:prompt_tokens_by_source_total",
}
"""Of vLLM 0.32, as it serves them."""
_HISTOGRAM = ("_bucket", "_sum", "_count")


def code_metrics() -> set[str]:
    """Return the name of every series that the code can serve."""
    found = set()
    for name, kind in re.findall(r"^\| `([\w]+)` \| (\w+) \|", TABLE.read_text(), re.MULTILINE):
        found |= {name + ending for ending in _HISTOGRAM} if kind == "histogram" else {name}
    return found


def names_of(expr: str) -> set[str]:
    """Return the metrics that a PromQL expression names."""
    names: set[str] = set()

    def visit(node: object) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name, "a selector without a name"
            names.add(node.name)

    promql_parser.walk(promql_parser.parse(expr), visit)
    return names
