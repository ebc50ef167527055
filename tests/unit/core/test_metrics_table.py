"""docs/metrics.md is what the code says; names, units, texts and labels keep promtool's rules, and ours."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from mooncake import metrics_table
from mooncake.metrics_table import Component, Row, bound_of, components, page, unit_of

ROOT = Path(metrics_table.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "deploy").rglob("*.md"))]
ROWS = [row for rows in components().values() for row in rows]
FACTORIES = re.compile(r"(Quick)?(Counter|Gauge|Histogram)(MetricFamily)?|gauge|counter|family|metric")
OTHERS = ("mooncake/dropin", "mooncake/live", "mooncake/dashboards", "benchmarks", "tests", "deploy")
"""Names of upstream's, queries, or fakes: no metrics of ours are made there."""
WORDS = re.compile(r"\bmooncake_\w+(?:(?<=_)\{[\w,]+\}\w*)?")
"""A name, or a short way to say several: mooncake_x_{a,b}_c. Braces after a whole name have its labels."""
NO_METRICS = frozenset((
    "mooncake_client", "mooncake_config", "mooncake_connector_v1", "mooncake_elastic_buffer",
    "mooncake_ep_buffer", "mooncake_master", "mooncake_master_server_addr", "mooncake_ssd_register",
    "mooncake_ssd_unregister", "mooncake_store_service",
))  # fmt: skip
"""Modules, commands and settings of upstream's that pages name."""
UPSTREAM = (
    "mooncake_client_rpc_", "mooncake_tenant_quota_",
    "mooncake_transfer_read_bytes", "mooncake_transfer_write_bytes",
    "mooncake_transfer_get_latency", "mooncake_transfer_put_latency",
    "mooncake_transfer_batch_get_latency", "mooncake_transfer_batch_put_latency",
)  # fmt: skip
"""The table has ours. So begin those that our client and master have under upstream's names."""


def by_name(row: Row) -> str:
    return row.name


def test_the_document_is_what_the_code_says():
    told = (ROOT / "docs" / "metrics.md").read_text()
    assert told == page(), "run: python -m mooncake.metrics_table > docs/metrics.md"


def test_a_name_stands_in_one_row_of_one_component():
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names)) > 150


@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_every_metric_keeps_the_rules(row: Row):
    assert re.fullmatch(r"(mooncake|gen_ai)_[a-z0-9]+(_[a-z0-9]+)*", row.name)  # no colon: those are rules
    assert row.name.endswith("_total") == (row.kind == "counter")
    assert not re.search(
        r"_(gauge|counter|histogram|ms|milliseconds|minutes|kb|mb|gb|percent|pct)(_|$)", row.name
    )
    assert row.unit, (
        f"{row.name}: end it in a unit ({', '.join(metrics_table.UNITS)}), or say in PLAIN what it counts"
    )
    assert row.text.strip()
    assert not {"instance", "job", "le", "quantile", "process"} & set(row.labels)  # the scrape's own
    for label in row.labels:
        assert bound_of(row.name, label), (
            f"{row.name}: how many values may label {label} have? say it in LABELS"
        )


def test_what_is_said_of_metrics_and_labels_is_said_of_one_there_is():
    names = {row.name.removesuffix("_total") for row in ROWS}
    assert set(metrics_table.PLAIN) <= names
    for start, label in metrics_table.LABELS_OF:
        using = [
            row
            for row in ROWS
            if row.name.removesuffix("_total") == start
            or row.name.startswith(start + "_" * (start[-1] != "_"))
        ]
        assert any(label in row.labels for row in using), (start, label)
    assert set(metrics_table.LABELS) <= {label for row in ROWS for label in row.labels}


def test_a_name_without_a_unit_has_none_until_it_is_said():
    assert unit_of("mooncake_prefill_time", "gauge") == ""
    assert unit_of("mooncake_prefill_seconds", "gauge") == "s"
    assert bound_of("mooncake_requests_total", "user") == ""


def test_every_metric_that_is_made_in_the_code_is_in_the_table():
    made = {}
    for package in ("conductor", "kvstore", "transfer", "mooncake", "prefill", "decode"):
        for path in (ROOT / package).rglob("*.py"):
            where = str(path.relative_to(ROOT))
            if not where.startswith(OTHERS):
                made |= dict.fromkeys(names_made(path.read_text()), where)
    known = {row.name.removesuffix("_total") for row in ROWS}
    assert len(made) > 80
    assert {name: where for name, where in made.items() if name not in known} == {}


def names_made(source: str) -> set[str]:
    """Return the constant first arguments of what makes metrics."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name, value = ast.unparse(node.func).rpartition(".")[2], node.args[0].value
            if (
                FACTORIES.fullmatch(name)
                and isinstance(value, str)
                and value.startswith(("mooncake_", "gen_ai_"))
            ):
                found.add(value)
    return found


def test_the_search_finds_what_is_made():
    assert names_made('x.Counter("mooncake_a", "Text.")\nGauge("other")\nprint("mooncake_b")') == {
        "mooncake_a"
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_metric_that_a_page_names_is_in_the_table(page: Path):
    """Changelog and measurements are history: they may name what is gone."""
    known = {row.name for row in ROWS}
    for row in ROWS:
        if row.kind == "histogram":
            known |= {row.name + ending for ending in ("_bucket", "_sum", "_count")}
    assert [name for name in sorted(names_told(page.read_text())) if not is_there(name, known)] == []


def names_told(text: str) -> set[str]:
    """Return the metrics that a page names; what ends in "_" stands for all that begin so."""
    found = set()
    for word in WORDS.findall(text):
        start, brace, rest = word.partition("{")
        ends, _, end = rest.partition("}")
        found |= {start + one + end for one in ends.split(",")} if brace else {start}
    return found - NO_METRICS


def is_there(name: str, known: set[str]) -> bool:
    return (
        name in known
        or name.startswith(UPSTREAM)
        or (name.endswith("_") and any(one.startswith(name) for one in known))
    )


def test_names_in_prose_are_found_in_all_their_forms():
    told = "`mooncake_a_ratio{role}` | mooncake_b_{c,d}_total, `mooncake_e_*`; tests/mooncake_master"
    assert names_told(told) == {"mooncake_a_ratio", "mooncake_b_c_total", "mooncake_b_d_total", "mooncake_e_"}
    assert not is_there("mooncake_a", {"mooncake_a_ratio"})
    assert is_there("mooncake_a_", {"mooncake_a_ratio"})


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: apt install prometheus"
)
def test_promtool_has_nothing_to_say_of_our_pages():
    registry = CollectorRegistry()
    for component, fill in metrics_table.FILL.items():
        if component not in {Component.CORE, Component.METADATA}:  # a gateway's has both
            fill(registry)
    said = promtool(
        b"".join(line for line in generate_latest(registry).splitlines(True) if b"_created" not in line)
    )
    assert said == ""
    assert "no help" in promtool(b"mooncake_x_ms 1\n")


def promtool(text: bytes) -> str:
    run = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60, check=False
    )
    return (run.stdout + run.stderr).decode()
