"""Boards as they are committed: made from their definitions, complete, and of metrics that exist."""

import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from mooncake.dashboards import FOLDER, board_files, load_boards
from mooncake.dashboards.__main__ import drift, made, main
from mooncake.dashboards.objectives import BURNS
from mooncake.dashboards.rules import (
    PROMETHEUS_RULE,
    RULES,
    RUNBOOKS,
    prometheus_rule,
    runbooks_at,
    site_runbooks,
    with_runbooks,
)
from tests.observability.names import VLLM_METRICS, code_metrics, names_of

ROOT = Path(__file__).parents[2]
BOARDS = load_boards()
PANELS = [
    (uid, panel) for uid, board in BOARDS.items() for panel in board["panels"] if panel["type"] != "row"
]
EXPRESSIONS = sorted({target["expr"] for _, panel in PANELS for target in panel["targets"]})
VARIABLES = [(uid, variable) for uid, board in BOARDS.items() for variable in board["templating"]["list"]]
MACROS = {"__rate_interval": "1m"}
OF_PROMETHEUS = {"up", "scrape_duration_seconds"}


def filled(expr: str) -> str:
    """Put something in the place of variables, so that a parser takes it."""
    return re.sub(r"\$(\w+)", lambda match: MACROS.get(match[1], ".*"), expr)


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_what_is_committed_is_what_the_definitions_make():
    assert drift(made()) == []
    assert main(["--check"]) == 0


def test_drift_is_told_and_a_board_that_nobody_makes_is_too(tmp_path: Path):
    files = made()
    path = next(iter(files))
    assert drift({**files, path: files[path] + " "}) == [f"{path}: not as made"]
    assert drift({one: text for one, text in files.items() if one != path}) == [f"{path}: nobody makes it"]
    with pytest.raises(SystemExit, match="2"):
        main(["--chek"])


def test_uids_are_file_names_and_panels_have_ids_of_their_own():
    assert next(iter(BOARDS)) == "mooncake-overview"
    assert len(BOARDS) == 6
    for uid, board in BOARDS.items():
        assert board["uid"] == uid
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids)
    titles = [(uid, panel["title"]) for uid, panel in PANELS]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize(("uid", "panel"), PANELS, ids=[f"{uid}/{panel['title']}" for uid, panel in PANELS])
def test_a_panel_says_what_it_shows_what_is_good_and_what_to_do(uid: str, panel: dict[str, Any]):
    assert "**Good:**" in panel["description"]
    assert "**Else:**" in panel["description"]
    for page in re.findall(r"docs/[\w/]+\.md", panel["description"]):
        assert (ROOT / page).exists(), page
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"]
    assert defaults["noValue"]
    assert panel["datasource"]["uid"] == "${datasource}"
    assert panel["targets"]


def test_panels_lie_side_by_side_within_the_grid():
    for uid, board in BOARDS.items():
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, (uid, panel["title"])
            assert place["x"] + place["w"] <= 24, (uid, panel["title"])
            taken |= cells


def test_a_board_has_the_variables_that_it_uses_and_a_way_to_the_others():
    for uid, board in BOARDS.items():
        names = {variable["name"] for variable in board["templating"]["list"]}
        text = " ".join(target["expr"] for panel in board["panels"] for target in panel.get("targets", ()))
        assert names - {"datasource"} == set(re.findall(r"\$(\w+)", text)) - set(MACROS), uid
        assert "datasource" in names
        (link,) = board["links"]
        assert link["tags"] == ["mooncake"] == board["tags"]
        assert link["keepTime"]
        assert link["includeVars"]


def test_every_expression_parses():
    for expr in EXPRESSIONS:
        promql_parser.parse(filled(expr))
    for rule in rules():
        promql_parser.parse(rule["expr"])
    with pytest.raises(ValueError, match="unexpected end"):
        promql_parser.parse(filled("sum(rate(mooncake_tokens_total["))


def test_every_metric_of_boards_and_rules_is_one_of_ours_or_of_vllm():
    known = code_metrics() | VLLM_METRICS | OF_PROMETHEUS
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for expr in EXPRESSIONS for name in names_of(filled(expr))}
    used |= {
        variable["query"].split("(")[1].split(",")[0]
        for _, variable in VARIABLES
        if variable["type"] == "query"
    }
    assert used <= known, sorted(used - known)
    in_rules = {name for rule in rules() for name in names_of(rule["expr"])}
    assert in_rules <= known | recorded, sorted(in_rules - known - recorded)
    assert not {name for name in used if ":" in name and not name.startswith("vllm:")}  # boards need no rules


def test_vllm_names_are_those_of_the_installed_vllm():
    """A name here without its ending _total, _bucket, ... stands in vLLM's source."""
    spec = pytest.importorskip("importlib.util").find_spec("vllm")
    if spec is None:
        pytest.skip("no vLLM here")
    source = "".join(path.read_text() for path in (Path(spec.origin).parent / "v1" / "metrics").glob("*.py"))
    for name in VLLM_METRICS:
        assert f'"{re.sub("_(total|bucket|sum|count)$", "", name)}"' in source, name


def test_the_kustomize_root_holds_every_board():
    kustomization = yaml.safe_load((FOLDER.parent / "kustomization.yaml").read_text())
    files = [file for entry in kustomization["configMapGenerator"] for file in entry["files"]]
    assert sorted(files) == sorted(f"json/{path.name}" for path in board_files().values())
    assert kustomization["generatorOptions"]["labels"] == {"grafana_dashboard": "1"}


def test_the_operators_object_holds_the_same_rules():
    wrapped = yaml.safe_load(PROMETHEUS_RULE.read_text())
    assert wrapped["kind"] == "PrometheusRule"
    assert wrapped["spec"] == yaml.safe_load(RULES.read_text())


@pytest.mark.parametrize(
    ("url", "page"),
    [
        ("https://docs.example.com", "https://docs.example.com/runbooks/{name}.html"),
        ("https://docs.example.com/mooncake/", "https://docs.example.com/mooncake/runbooks/{name}.html"),
        ("http://git/x/blob/main/docs/{name}.md#do", "http://git/x/blob/main/docs/{name}.md#do"),
    ],
)
def test_who_is_paged_gets_a_link_to_where_the_pages_are_served(url, page):
    again = with_runbooks(with_runbooks(RULES.read_text(), "elsewhere/{name}"), runbooks_at(url))
    for text in (again, prometheus_rule(again)):
        body = yaml.safe_load(text)
        alerts = [
            rule for group in body.get("spec", body)["groups"] for rule in group["rules"] if "alert" in rule
        ]
        links = [rule["annotations"]["runbook_url"] for rule in alerts]
        assert links == [page.replace("{name}", rule["alert"]) for rule in alerts]
    assert with_runbooks(again, RUNBOOKS) == with_runbooks(RULES.read_text(), RUNBOOKS)  # and nothing else


def test_the_address_of_the_site_is_that_of_the_pages_if_mkdocs_has_one():
    assert site_runbooks("site_name: x\n") is None
    page = site_runbooks("site_name: x\nsite_url: 'https://a/b/'  # ours\n")
    assert page == "https://a/b/runbooks/{name}.html"


@pytest.mark.parametrize(
    "url", ["docs.example.com", "https://a b", "https://a/{{ $labels }}", "file:///x", ""]
)
def test_an_address_that_is_none_is_said_and_nothing_is_written(url, capsys):
    before = RULES.read_text()
    assert main([f"--runbooks={url}"]) == 2
    assert url in capsys.readouterr().err
    assert RULES.read_text() == before


def test_every_alert_has_a_severity_words_and_a_page_that_says_what_to_do():
    for rule in rules():
        if "record" in rule:
            continue
        name = rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket"), name
        assert rule["annotations"]["summary"], name
        assert rule["annotations"]["description"], name
        assert re.fullmatch(rf"\S*{name}\S*", rule["annotations"]["runbook_url"])
        page = (ROOT / RUNBOOKS.format(name=name)).read_text()
        headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
        assert headings == ["What it means", "Confirm", "Do", "Prevent"], name
        assert rule["labels"]["severity"] in page, name


def test_runbooks_are_of_alerts_and_their_queries_parse_and_name_metrics_that_exist():
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    known = (
        code_metrics()
        | VLLM_METRICS
        | OF_PROMETHEUS
        | {rule["record"] for rule in rules() if "record" in rule}
    )
    pages = {path.stem: path.read_text() for path in (ROOT / "docs" / "runbooks").glob("Mooncake*.md")}
    assert set(pages) == alerts
    for name, page in pages.items():
        for code in re.findall(r"`([^`]+)`", page):
            if re.search(r"mooncake_\w+|mooncake:", code) and not code.startswith(("curl", "mooncake ")):
                unknown = names_of(code) - known
                assert not unknown, (name, unknown)


def test_burn_rates_are_those_of_the_objectives():
    for alert, recorded, budget in (
        ("MooncakeAvailabilityBurn", "requests_failed", "0.001"),
        ("MooncakeGoodputBurn", "slo_missed", "0.01"),
    ):
        found = [rule for rule in rules() if rule.get("alert") == alert]
        assert len(found) == len(BURNS)
        for rule, burn in zip(found, BURNS, strict=True):
            limit = f"{burn.times:g} * {budget}"
            for window in (burn.long, burn.short):
                assert f"mooncake:{recorded}:ratio_rate{window} > {limit}" in rule["expr"]
            assert rule["labels"] == {"severity": burn.severity, "burn": f"{burn.times:g}"}


def test_boards_can_be_had_without_kubernetes(tmp_path: Path):
    from typer.testing import CliRunner

    from mooncake.cli import app

    done = CliRunner().invoke(app, ["dashboards", "--out", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == {
        path.name: path.read_text() for path in board_files().values()
    }
    done = CliRunner().invoke(app, ["dashboards", "--out", "/dev/null/x"])
    assert done.exit_code != 0
    assert "--out /dev/null/x" in done.output
