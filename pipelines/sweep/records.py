"""A sweep's records in MLflow, which the report reads: its parameters, schedules, trials and conclusion."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from ddpm_core.commit import MANIFEST
from ddpm_core.records import (
    DATA_TAG,
    FINGERPRINT_TAG,
    PRIOR_BPD,
    SCHEDULES,
    SUMMARY,
    SWEEP,
    TRIALS,
    flatten,
    ranking_link,
)
from ddpm_core.schedules import PriorCheck
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.locations import Location, commit_json
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.points import Point, trial_name
from pipelines.sweep.ranking import Outcome, summary
from pipelines.sweep.result import SweepResult
from pipelines.tracking.origin import data_input
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import Tracker

CURVE_POINTS = 200  # timesteps at which a schedule is logged


def open_run(
    tracker: Tracker,
    name: str,
    digest: str,
    config: SweepConfig,
    points: Mapping[str, Point],
    dataset: ShardedDataset,
) -> TrackedRun:
    """The sweep's MLflow run, of which trials are children. digest: the fingerprint of its identity."""
    return tracker.run(
        SWEEP,
        name,
        digest,
        params={
            "points": ", ".join(points),
            "seeds": str(config.seeds),
            "rungs": ", ".join(map(str, config.rungs)),
            **flatten(config.train, "train."),
            **flatten(config.evaluation(config.train.steps), "evaluate."),
        },
        tags={DATA_TAG: dataset.name},
        data=data_input(dataset.name, dataset.sha256, dataset.card, dataset.path, "training"),
    )


def log_schedules(run: TrackedRun, points: Mapping[str, Point]) -> None:
    """Log beta, alpha-bar and log-SNR of every point's schedule, over the paper's t, at up to CURVE_POINTS timesteps."""
    curves = {}
    for label, point in points.items():
        betas = point.config.diffusion.betas()
        alphas_cumprod = torch.cumprod(1.0 - betas, 0)
        indices = torch.linspace(0, len(betas) - 1, min(CURVE_POINTS, len(betas))).round().long()
        logged = alphas_cumprod[indices]
        # x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps (Eq. 4), so log SNR = log abar - log(1 - abar)
        log_snr = logged.log() - torch.log1p(-logged)
        curves[label] = {
            "t": (indices + 1).tolist(),
            "betas": betas[indices].tolist(),
            "alphas_cumprod": logged.tolist(),
            "log_snr": log_snr.tolist(),
        }
    run.log_json(SCHEDULES, curves)


def link_to_ranking(run: TrackedRun, outcomes: Sequence[Outcome]) -> str:
    """The link to the table that ranks the trials' last checkpoints in MLflow's UI, empty if no trial finished."""
    evaluated = [outcome.evaluation_run_id for outcome in outcomes if outcome.status == "finished"]
    if not evaluated or evaluated[-1] is None:
        return ""
    protocol = TrackedRun(run.client, run.experiment_id, evaluated[-1]).tags()[FINGERPRINT_TAG]
    return ranking_link(run.client.tracking_uri, run.experiment_id, protocol)


def record_result(
    run: TrackedRun,
    name: str,
    folder: Location,
    config: SweepConfig,
    points: Mapping[str, Point],
    outcomes: tuple[Outcome, ...],
    priors: Mapping[str, PriorCheck],
) -> SweepResult:
    """Conclude a sweep: its result, put into MLflow and committed to its folder."""
    metric = next((outcome.metric for outcome in outcomes if outcome.metric), "distance")
    paper = {label: point.paper for label, point in points.items() if point.paper}
    choice = next((label for label, point in points.items() if point.chosen), None)
    facts = summary([outcome for outcome in outcomes if outcome.status == "finished"], metric, choice)
    rows = [
        {
            **asdict(outcome),
            "label": outcome.point if config.seeds == 1 else trial_name(outcome.point, outcome.seed),
            "values": {**points[outcome.point].values, **({"seed": str(outcome.seed)} if config.seeds > 1 else {})},
            PRIOR_BPD: priors[outcome.point].bits_per_dim,
            "prior_met": priors[outcome.point].met,
        }
        for outcome in outcomes
    ]
    run.log_json(TRIALS, rows)
    run.log_json(SUMMARY, {**facts, "paper": paper})
    run.finish()
    result = SweepResult(name, run.run_id, metric, outcomes, facts["conclusion"], link_to_ranking(run, outcomes))
    commit_json(folder / MANIFEST, asdict(result))
    return result
