"""A sweep that trained each point with several seeds: the spread between seeds, which an interval of one trial does not
hold."""

from ddpm_core.verdicts import distances_by_point
from reports.sections.tables import Column, Row, Table
from reports.verdicts.conclusions import metric_name
from reports.verdicts.formatting import decimals_for, fixed
from reports.verdicts.sweeps import TrialRanking


def points_table(trials: TrialRanking) -> Table | None:
    """Mean, standard deviation and range over seeds, a row a point, the lowest mean first; None if no point has two
    seeds."""
    standings, distances = trials.standings, distances_by_point(trials.measurements)
    if all(standing.seeds < 2 for standing in standings):
        return None
    protocol = trials.ranking.protocol
    name = metric_name(protocol.distance)
    lowest, highest = ({point: end(values) for point, values in distances.items()} for end in (min, max))
    best = standings[0]
    digits = decimals_for(best.mean, lowest[best.point], highest[best.point])
    rows = [
        Row(
            cells=(
                standing.point,
                f"{standing.seeds}",
                fixed(standing.mean, digits),
                "one seed" if standing.std is None else fixed(standing.std, digits),
                f"{fixed(lowest[standing.point], digits)} to {fixed(highest[standing.point], digits)}",
            ),
            mark="best" if standing is best else "",
        )
        for standing in standings
    ]
    titles = ("Setting", "Seeds", f"Mean {name}", "Std over seeds", "Range")
    return Table(
        caption=f"Settings by mean {name} over seeds (protocol {protocol.fingerprint})",
        columns=tuple(Column(title=title, numeric=place > 0) for place, title in enumerate(titles)),
        rows=tuple(rows),
        sortable=True,
    )
