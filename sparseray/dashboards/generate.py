"""Dashboards as Grafana's JSON, by Grafana's own typed SDK; only those who change a dashboard need it.

The JSON is committed beside this file; a test generates it anew and compares.
"""

import json
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

from sparseray.dashboards.cluster import CLUSTER
from sparseray.dashboards.panels import Dashboard, Panel, series
from sparseray.dashboards.serving import SERVING
from sparseray.dashboards.sparse import SPARSE
from sparseray.dashboards.training import TRAINING

DASHBOARDS = (TRAINING, SPARSE, SERVING, CLUSTER)
_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
# A mark for each change of the run's slots, on every time axis.
EVENTS = f"sum by (run, kind) (increase({series('elastic_events_total')}[1m])) > 0"


def to_json(board: Dashboard) -> str:
    """Return a dashboard as Grafana imports it."""
    built = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.meaning)
        .tags(["sparseray"])
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh("5s")
        .time("now-15m", "now")
        .timezone("browser")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("run")
            .label("Run")
            .datasource(_SOURCE)
            .query('label_values(up{job="sparseray"}, run)')
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(models.VariableOption(text="All", value="$__all", selected=True))
        )
        .annotation(
            dashboard.AnnotationQuery()
            .name("Losses, recoveries and resizes")
            .datasource(_SOURCE)
            .enable(True)
            .icon_color("red")
            .expr(EVENTS)
        )
    )
    number = 0
    for heading, panels in board.rows:
        built = built.with_row(dashboard.Row(heading))
        for panel in panels:
            number += 1
            built = built.with_panel(_panel(panel, number))
    content: dict[str, Any] = json.loads(json.dumps(built.build(), cls=JSONEncoder))
    for mark in content["annotations"]["list"]:
        mark |= {"titleFormat": "{{kind}}", "textFormat": "{{run}}", "step": "60s"}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _panel(panel: Panel, number: int) -> Builder[models.Panel]:
    built: Any = stat.Panel() if panel.kind == "stat" else timeseries.Panel()
    built = (
        built.id(number)
        .title(panel.title)
        .description(panel.meaning)
        .unit(panel.unit)
        .datasource(_SOURCE)
        .span(6 if panel.kind == "stat" else 8)
        .height(4 if panel.kind == "stat" else 8)
    )
    if panel.top is not None:
        built = built.min(0.0).max(panel.top)
    if panel.kind == "timeseries":
        built = _curves(built, panel)
    for index, query in enumerate(panel.queries):
        built = built.with_target(
            prometheus.Dataquery()
            .expr(query.expr)
            .legend_format(query.legend)
            .ref_id("ABCDEFGH"[index])
            .range()
            .datasource(_SOURCE)
        )
    made: Builder[models.Panel] = built
    return made


def _curves(built: Any, panel: Panel) -> Any:
    built = built.line_width(1.5).fill_opacity(30.0 if panel.stack else 6.0)
    built = built.show_points(common_models.VisibilityMode.NEVER)
    if panel.stack:
        built = built.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    if panel.log:
        scale = common.ScaleDistributionConfig().type(common_models.ScaleDistribution.LOG).log(10.0)
        built = built.scale_distribution(scale)
    return built.legend(
        common.VizLegendOptions()
        .display_mode(common_models.LegendDisplayMode.LIST)
        .placement(common_models.LegendPlacement.BOTTOM)
        .show_legend(True)
    )
