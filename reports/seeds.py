"""A sweep that trained each setting with several seeds: the spread between seeds, which an interval of one trial does not
hold."""

from dataclasses import dataclass
from math import comb
from statistics import fmean, stdev

from reports.conclusions import metric_name
from reports.entities import Trial
from reports.formatting import counted, decimals_for, fixed, listed, number
from reports.sweeps import TrialResult
from reports.tables import Column, Row, Table


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


def conclude_settings(settings: tuple[Setting, ...], distance: str) -> str:
    """Which setting has the lower mean, and whether its seeds tell it from the others: they do if all of them lie below all
    of the others', where chance would do that in at most 5 % of such sweeps."""
    name, first = metric_name(distance), settings[0]
    digits = decimals_for(first.mean, first.distances[0], first.distances[-1])
    mean = f"mean {name}, {fixed(first.mean, digits)} over {counted(len(first.distances), 'seed')}"
    if len(settings) == 1:
        return f"{first.label} is the only setting: {mean}."
    text = f"{first.label} has the {'lower' if len(settings) == 2 else 'lowest'} {mean}"
    close = [other.label for other in settings[1:] if other.distances[0] <= first.distances[-1]]
    single = [setting.label for setting in settings if len(setting.distances) < 2]
    if close:
        text += f"; its range over seeds overlaps with that of {listed(close)}, so this sweep does not tell them apart."
    else:
        chance = chance_of_lying_below(settings)
        enough = "this sweep tells it from them" if chance <= 0.05 else "it takes more seeds to tell it from them"
        text += f"; its range over seeds lies below all others, as one does by chance in {number(100 * chance, 2)} % of such "
        text += f"sweeps: {enough}."
    return text + (f" Of {listed(single)} one seed alone was measured." if single else "")


def chance_of_lying_below(settings: tuple[Setting, ...]) -> float:
    """How likely it is that all results of some setting lie below all others, if settings make no difference: all orders of
    the results are equally likely then."""
    total = sum(len(setting.distances) for setting in settings)
    return sum(1 / comb(total, len(setting.distances)) for setting in settings)


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
