"""The view of MLflow's UI that ranks checkpoints: a table of runs, one a checkpoint and protocol, sorted by the distance.

Such a table sorts by any metric; MLflow's table of models sorts by creation alone (3.17).
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ddpm_core.records import CHECKPOINT, CI_HIGH, CI_LOW, KIND_TAG, PROTOCOL_TAG, STANDING_TAG, STEP
from ddpm_core.verdicts import Interval, Verdict, known_interval, verdict_beside
from pipelines.tracking.client import retried
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import Tracker

SHARED_VIEW = "mlflow.sharedViewState."  # of an experiment: begins the tags that hold views, as MLflow's UI writes them
VIEW: dict[str, Any] = {  # what such a view has besides
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "datasetsFilter": [],
    "modelVersionFilter": "All Runs",
    "columnOrder": [],
    "columnWidths": {},
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
LOCAL_UI = "http://127.0.0.1:5000"  # where `make ui` serves a database on disk


def share_ranking(tracker: Tracker, protocol: str, metric: str, others: Sequence[str]) -> str:
    """The link to the table of all checkpoints that were measured under a protocol, given by its fingerprint, the lowest
    `metric` first; beside it stand the ends of its interval, the standing, and `others`.

    The view is one that MLflow's UI shares by a tag of the experiment: a link alone cannot choose columns.
    """
    view = {
        **VIEW,
        "searchFilter": _filter(protocol),
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": True,
        "selectedColumns": [
            *(f"metrics.`{name}`" for name in (metric, metric + CI_LOW, metric + CI_HIGH, STEP, *others)),
            f"tags.`{STANDING_TAG}`",
        ],
    }
    _share(tracker, protocol, json.dumps(view))
    base = tracker.uri.rstrip("/") if tracker.uri.startswith("http") else LOCAL_UI
    return (
        f"{base}/#/experiments/{tracker.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={protocol}"
    )


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


def _filter(protocol: str) -> str:
    return f"tags.`{KIND_TAG}` = '{CHECKPOINT}' AND tags.`{PROTOCOL_TAG}` = '{protocol}'"
