"""A sweep that trained each setting with several seeds: the spread between seeds, which an interval of one trial does not
hold."""

from dataclasses import dataclass
from statistics import fmean, stdev

from reports.records.entities import Trial
from reports.sections.tables import Column, Row, Table
from reports.verdicts.conclusions import metric_name
from reports.verdicts.formatting import decimals_for, fixed
from reports.verdicts.sweeps import TrialResult


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The finite results of one setting, one a seed, the lowest first."""

    label: str
    distances: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.distances)


def settings_of(results: tuple[TrialResult, ...]) -> tuple[Setting, ...]:
    """The settings by their mean, the lowest first; empty where no setting has two seeds."""
    groups: dict[str, list[float]] = {}
    for result in results:
        groups.setdefault(_label(result.trial), []).append(result.entry.checkpoint.distance)
    settings = [Setting(label=label, distances=tuple(sorted(values))) for label, values in groups.items()]
    if all(len(setting.distances) < 2 for setting in settings):
        return ()
    return tuple(sorted(settings, key=lambda setting: (setting.mean, setting.label)))


def settings_table(settings: tuple[Setting, ...], distance: str, mark: str) -> Table:
    """Mean, standard deviation and range over seeds, a row a setting."""
    name = metric_name(distance)
    digits = decimals_for(settings[0].mean, settings[0].distances[0], settings[0].distances[-1])
    rows = [
        Row(
            cells=(
                setting.label,
                f"{len(setting.distances)}",
                fixed(setting.mean, digits),
                fixed(stdev(setting.distances), digits) if len(setting.distances) > 1 else "one seed",
                f"{fixed(setting.distances[0], digits)} to {fixed(setting.distances[-1], digits)}",
            ),
            mark="best" if place == 0 else "",
        )
        for place, setting in enumerate(settings)
    ]
    titles = ("Setting", "Seeds", f"Mean {name}", "Std over seeds", "Range")
    return Table(
        caption=f"Settings by mean {name} over seeds (protocol {mark})",
        columns=tuple(Column(title=title, numeric=place > 0) for place, title in enumerate(titles)),
        rows=tuple(rows),
        sortable=True,
    )


def _label(trial: Trial) -> str:
    values = [str(value) for name, value in trial.values.items() if name.split(".")[-1] != "seed"]
    return ", ".join(values) or trial.label
