"""What a sweep came to: how every trial ended, and what they say together."""

from dataclasses import dataclass
from typing import NotRequired

from typing_extensions import TypedDict

from ddpm_core import typed
from ddpm_core.commit import MANIFEST
from ddpm_core.errors import InputError
from ddpm_core.verdicts import Standing, standings
from pipelines.storage.locations import Location
from pipelines.sweep.points import trial_name
from pipelines.sweep.ranking import Outcome, measurements

WHAT = "result of a sweep"


class SweepManifest(TypedDict):
    """What a sweep's manifest.json holds."""

    name: str
    run_id: str
    metric: str
    outcomes: list[typed.JsonObject]
    conclusion: str
    link: NotRequired[str]  # not in those of earlier versions


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep. run_id: of its MLflow run. metric: what the points are compared by. outcomes: by point and seed.
    link: to the ranking of the trials' checkpoints in MLflow's UI, empty if none finished or an earlier version ended it."""

    name: str
    run_id: str
    metric: str
    outcomes: tuple[Outcome, ...]
    conclusion: str
    link: str = ""

    @property
    def ranking(self) -> list[Standing]:
        """The points that finished, the lowest mean distance first."""
        return standings(measurements([outcome for outcome in self.outcomes if outcome.status == "finished"]))

    def describe(self) -> list[str]:
        """The result in sentences, the conclusion last."""
        lines = [
            f"{rank}. {standing.point}: {self.metric} {standing.mean:.4g}{standing.spread} over {standing.seeds} of its seeds"
            for rank, standing in enumerate(self.ranking, 1)
        ]
        lines += [
            f"{trial_name(outcome.point, outcome.seed)}, {outcome.status} at step {outcome.steps:,}: {outcome.reason}"
            for outcome in self.outcomes
            if outcome.status != "finished"
        ]
        lines += [f"the trials by {self.metric}, in MLflow: {self.link}"] if self.link else []
        return [*lines, self.conclusion]


def read_result(folder: Location) -> SweepResult | None:
    """The result of a sweep by its folder; None if it is not finished. Raises InputError if it is damaged."""
    path, advice = folder / MANIFEST, "delete it and give the same command again, which reads the trials' outcomes"
    try:
        facts = typed.read_json(path, SweepManifest, what=WHAT, advice=advice)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        outcomes = tuple(typed.build(Outcome, outcome) for outcome in facts["outcomes"])
    except ValueError as error:
        raise InputError(f"{WHAT} {str(path)!r} is damaged (in outcomes, {error}): {advice}") from error
    return SweepResult(
        facts["name"], facts["run_id"], facts["metric"], outcomes, facts["conclusion"], facts.get("link", "")
    )
