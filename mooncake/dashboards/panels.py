"""Panels and boards in our house style, over Grafana's SDK: every one has a unit, a text and its queries.

The text of a panel says what it shows, what is good, and what to do when it is not.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import Dataquery as PromQuery

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "mooncake"
GREEN, ORANGE, RED, BLUE, GREY = "green", "orange", "red", "blue", "#808080"
WIDTH = 24
"""Columns of Grafana's grid."""
_VARIABLES = {
    "namespace": (
        "Namespace",
        "label_values(mooncake_requests_in_flight, namespace)",
        "Kubernetes namespace of a cluster; All where there is none.",
    ),
    "model": ("Model", "label_values(mooncake_model_info, model_name)", "Served model."),
    "instance": (
        "Instance",
        "label_values(mooncake_engine_pulse_age_seconds, instance_id)",
        "Prefill and decode instances.",
    ),
    "tenant": (
        "Tenant",
        "label_values(mooncake_tenant_tokens_total, tenant)",
        "Tenants of --tenants; else other.",
    ),
    "process": (
        "Process",
        "label_values(mooncake_process_resident_bytes, process)",
        "Processes of the cluster.",
    ),
}


class Query(NamedTuple):
    """One PromQL expression; `legend` names its series ("{{label}}" is filled in)."""

    expr: str
    legend: str = ""


class Text(NamedTuple):
    """What a panel's description says."""

    shows: str
    good: str
    do: str

    def markdown(self) -> str:
        """Return the description."""
        return f"{self.shows}\n\n**Good:** {self.good}\n\n**Else:** {self.do}"


Steps = Sequence[tuple[float, str]]


Part = Builder[models.Panel] | dashboard.Row


def stat_of(
    title: str,
    text: Text,
    unit: str,
    query: str,
    *,
    steps: Steps = (),
    base: str = GREEN,
    no_value: str = "No traffic",
    width: int = 4,
    height: int = 4,
    decimals: int | None = None,
) -> stat.Panel:
    """Return one large number with its history behind it; its colour changes at `steps`."""
    panel = (
        stat.Panel()
        .title(title)
        .description(text.markdown())
        .datasource(SOURCE)
        .unit(unit)
        .no_value(no_value)
        .mappings([_nothing(no_value)])
        .thresholds(_thresholds(base, steps))
        .color_mode(looks.BigValueColorMode.BACKGROUND if steps else looks.BigValueColorMode.VALUE)
        .graph_mode(looks.BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
        .span(width)
        .height(height)
        .with_target(_target(Query(query), "A"))
    )
    return panel if decimals is None else panel.decimals(decimals)


def lines(
    title: str,
    text: Text,
    unit: str,
    *queries: Query,
    steps: Steps = (),
    stacked: bool = False,
    no_value: str = "No data",
    width: int = 12,
    height: int = 8,
    low: float | None = 0,
    high: float | None = None,
) -> timeseries.Panel:
    """Return a chart over time; `steps` are drawn as dashed lines."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(text.markdown())
        .datasource(SOURCE)
        .unit(unit)
        .no_value(no_value)
        .thresholds(_thresholds(GREEN, steps))
        .legend(
            common.VizLegendOptions()
            .display_mode(looks.LegendDisplayMode.TABLE)
            .placement(looks.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(
            common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI).sort(looks.SortOrder.DESCENDING)
        )
        .fill_opacity(30 if stacked else 8)
        .line_width(1)
        .show_points(looks.VisibilityMode.NEVER)
        .span(width)
        .height(height)
    )
    if steps:
        dashed = common.GraphThresholdsStyleConfig().mode(looks.GraphTresholdsStyleMode.DASHED)
        panel = panel.thresholds_style(dashed)
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(looks.StackingMode.NORMAL).group("A"))
    if low is not None:
        panel = panel.min(low)
    if high is not None:
        panel = panel.max(high)
    for index, query in enumerate(queries):
        panel = panel.with_target(_target(query, chr(ord("A") + index)))
    return panel


def bars(
    title: str,
    text: Text,
    unit: str,
    query: Query,
    *,
    steps: Steps = (),
    no_value: str = "No data",
    width: int = 8,
    height: int = 8,
    high: float | None = None,
) -> bargauge.Panel:
    """Return one bar per series: how it is now."""
    panel = (
        bargauge.Panel()
        .title(title)
        .description(text.markdown())
        .datasource(SOURCE)
        .unit(unit)
        .no_value(no_value)
        .thresholds(_thresholds(GREEN if steps else BLUE, steps))
        .display_mode(looks.BarGaugeDisplayMode.BASIC)
        .orientation(looks.VizOrientation.HORIZONTAL)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
        .min(0)
        .span(width)
        .height(height)
        .with_target(_target(query, "A"))
    )
    return panel if high is None else panel.max(high)


def row(title: str) -> dashboard.Row:
    """Return a heading between panels."""
    return dashboard.Row(title)


def board(uid: str, title: str, description: str, parts: Sequence[Part]) -> models.Dashboard:
    """Return a whole board; panels get their ids by position, variables are those that the queries use."""
    built = (
        dashboard.Dashboard(f"Mooncake / {title}")
        .uid(uid)
        .description(description)
        .tags([TAG])
        .timezone("browser")
        .time("now-30m", "now")
        .refresh("10s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("Mooncake boards")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(
            dashboard.DatasourceVariable("datasource")
            .label("Prometheus")
            .type("prometheus")
            .description("The Prometheus that scrapes the cluster.")
        )
    )
    for name in _used([part.build() for part in parts]):
        built = built.with_variable(_variable(name))
    for number, part in enumerate(parts, start=1):
        part.build().id_val = number  # of the panel itself: builders give the same one again
        built = built.with_row(part) if isinstance(part, dashboard.Row) else built.with_panel(part)
    return built.build()


def _used(panels: Sequence[models.Panel | models.RowPanel]) -> list[str]:
    """Return the variables that some query of `panels` names, in the order of the menu."""
    targets = [
        target for panel in panels if isinstance(panel, models.Panel) for target in panel.targets or []
    ]
    queries = " ".join(target.expr for target in targets if isinstance(target, PromQuery))
    named = set(re.findall(r"\$(\w+)", queries))
    return [name for name in _VARIABLES if name in named]


def _variable(name: str) -> dashboard.QueryVariable:
    label, query, text = _VARIABLES[name]
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .description(text)
        .datasource(SOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _target(query: Query, ref_id: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(query.expr).legend_format(query.legend).range().ref_id(ref_id)


def _thresholds(base: str, steps: Steps) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(None, base), *(models.Threshold(value, color) for value, color in steps)])
    )


def _nothing(text: str) -> models.SpecialValueMap:
    """Return what shows `text` for nothing, in grey: else it has the colour of the lowest value."""
    return models.SpecialValueMap(
        models.DashboardSpecialValueMapOptions(
            match=models.SpecialValueMatch.NULL_AND_NAN,
            result=models.ValueMappingResult(text=text, color=GREY),
        )
    )
