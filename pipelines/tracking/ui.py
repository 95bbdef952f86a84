"""What a person sees in MLflow's UI: the table that ranks checkpoints, notes on runs, the report.

The table is one of runs, one a checkpoint and protocol, sorted by the distance: such a table sorts by any metric, MLflow's table
of models by creation alone (3.17).
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from ddpm_core.records import (
    CHECKPOINT,
    CI_HIGH,
    CI_LOW,
    KIND_TAG,
    PROTOCOL_TAG,
    REPORT,
    SHARED_VIEW,
    STANDING_TAG,
    STEP,
    TRAIN,
    ranking_link,
)
from ddpm_core.verdicts import Interval, Verdict, known_interval, verdict_beside
from pipelines.storage.locations import Location
from pipelines.tracking.client import retried
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import Tracker

DATASET_COLUMN = "attributes.`Dataset`"
# Columns that are there without being chosen, and columns with long contents: their widths in pixels.
FIRST_COLUMNS, LAST_COLUMNS = {"0": 73, "attributes.`Run Name`": 270}, {"runDateAndNestInfo": 140, "duration": 80}
WIDER_COLUMNS = {f"tags.`{STANDING_TAG}`": 130, DATASET_COLUMN: 200}
PAGE = "report.html"  # the report's path among its run's artifacts
VIEW: dict[str, Any] = {  # what such a view has besides
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "datasetsFilter": [],
    "modelVersionFilter": "All Runs",
    "runsExpanded": {},
    "runsPinned": [],
    "runsHidden": [],
    "runsVisibilityMap": {},
    "runsHiddenMode": "FIRST_10_RUNS",
    "viewMaximized": False,
    "runListHidden": False,
    "isAccordionReordered": False,
    "useGroupedValuesInCharts": True,
    "hideEmptyCharts": True,
    "groupBy": None,
    "groupsExpanded": {},
    "autoRefreshEnabled": True,
    "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
}


def share_ranking(tracker: Tracker, protocol: str, metric: str, others: Sequence[str]) -> str:
    """The link to the table of all checkpoints that were measured under a protocol, given by its fingerprint, the lowest
    `metric` first; beside it stand the ends of its interval, the standing, and `others`.

    The view is one that MLflow's UI shares by a tag of the experiment: a link alone cannot choose columns.
    """
    ranked = [f"metrics.`{name}`" for name in (metric, metric + CI_LOW, metric + CI_HIGH)]
    chosen = [*ranked, f"tags.`{STANDING_TAG}`", *(f"metrics.`{name}`" for name in (STEP, *others)), DATASET_COLUMN]
    widths = {column: max(90, 7 * len(column) - 30) for column in chosen}  # pixels, wide enough for the head
    view = {
        **VIEW,
        "searchFilter": _filter(protocol),
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": True,
        "selectedColumns": chosen,
        "columnOrder": [*FIRST_COLUMNS, *chosen, *LAST_COLUMNS],
        "columnWidths": {**FIRST_COLUMNS, **widths, **WIDER_COLUMNS, **LAST_COLUMNS},
    }
    _share(tracker, protocol, json.dumps(view))
    return ranking_link(tracker.uri, tracker.experiment_id, protocol)


@retried
def _share(tracker: Tracker, key: str, view: str) -> None:
    tags = tracker.client.get_experiment(tracker.experiment_id).tags
    if tags.get(f"{SHARED_VIEW}{key}") != view:
        tracker.client.set_experiment_tag(tracker.experiment_id, f"{SHARED_VIEW}{key}", view)


def update_standings(tracker: Tracker, protocol: str, metric: str) -> None:
    """Say of every checkpoint that was measured under a protocol how it stands to the best of them, as a tag of its run."""
    runs = {run.info.run_id: run for run in tracker.search(_filter(protocol))}
    known = {
        run_id: standing
        for run_id, standing in standings_of({key: run.data.metrics for key, run in runs.items()}, metric).items()
        if runs[run_id].data.tags.get(STANDING_TAG) != standing
    }
    for run_id, standing in known.items():
        TrackedRun(tracker.client, tracker.experiment_id, run_id).set_tags({STANDING_TAG: str(standing)})


def standings_of(metrics: Mapping[str, Mapping[str, float]], metric: str) -> dict[str, Verdict]:
    """The verdict on each of several runs, given by their metrics; none on those without a finite `metric`."""
    values = {key: each[metric] for key, each in metrics.items() if math.isfinite(each.get(metric, math.inf))}
    if not values:
        return {}
    intervals: dict[str, Interval | None] = {
        key: known_interval(metrics[key].get(metric + CI_LOW), metrics[key].get(metric + CI_HIGH)) for key in values
    }
    best = min(values, key=lambda key: (values[key], metrics[key].get(STEP, 0.0)))
    return {key: Verdict.BEST if key == best else verdict_beside(intervals[best], intervals[key]) for key in values}


def image(run_id: str, path: str, alt: str) -> str:
    """An image among a run's artifacts, for a note on any run."""
    return f"![{alt}](get-artifact?{urlencode({'path': path, 'run_uuid': run_id})})"


def report_link(tracker: Tracker) -> str:
    """The link to the experiment's report, for a note on any run; empty if there is none."""
    run = tracker.find(REPORT, REPORT)
    if run is None:
        return ""
    return (
        f"[Report](#/experiments/{run.experiment_id}/runs/{run.run_id}/artifacts/{PAGE}?workflowType=machine_learning)"
    )


def log_report(tracker: Tracker, report: Location) -> None:
    """Put an experiment's report into MLflow in place of the one before, on a run of its own, which the notes on trainings
    link to."""
    run = tracker.run(REPORT, REPORT, REPORT, params={"file": PAGE}, tags={})
    run.log_bytes(PAGE, report.read_bytes())
    run.finish()
    link = report_link(tracker)
    for training in tracker.search(f"tags.`{KIND_TAG}` = '{TRAIN}'"):
        note = training.data.tags.get(MLFLOW_RUN_NOTE, "")
        if note and link not in note:
            TrackedRun(tracker.client, tracker.experiment_id, training.info.run_id).set_note(f"{note}\n\n{link}")


def _filter(protocol: str) -> str:
    return f"tags.`{KIND_TAG}` = '{CHECKPOINT}' AND tags.`{PROTOCOL_TAG}` = '{protocol}'"
