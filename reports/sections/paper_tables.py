"""The paper's tables with this experiment's numbers beside them, cell by cell. A number stands in one of them only if it
was measured as the paper's; else the cell says so, and which command would fill it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ddpm_core.verdicts import listed
from reports.drawing.elements import Column, Row, Table, numeric
from reports.formatting import fixed, number
from reports.records.entities import BitsPerDim, LikelihoodRecord, RunRecord
from reports.sections import commands
from reports.verdicts import paper
from reports.verdicts.comparison import (
    Objective,
    best_as_the_paper,
    cifar10_likelihood,
    data_of,
    departures,
    objective_of,
    row_objective,
)
from reports.verdicts.ranking import Entry, Ranking
from reports.verdicts.wording import distance_text, score_text

NOTHING = "–"  # the paper has no number there
TEST_SHARDS = "CIFAR10_TEST_SHARDS"


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table of the paper beside ours. `missing` are the commands that the cells [1], [2], ... name."""

    title: str
    table: Table
    missing: tuple[str, ...]
    note: str = ""


@dataclass
class MissingCells:
    """Collects the commands of a table's missing cells; equal ones share a number."""

    commands: list[str] = field(default_factory=list)

    def cell(self, *lines: str) -> str:
        """The text of a cell that `lines` would fill, one after the other."""
        command = "\n".join(lines)
        if command not in self.commands:
            self.commands.append(command)
        return f"not measured [{self.commands.index(command) + 1}]"

    def table(
        self, title: str, caption: str, columns: Sequence[Column], rows: Iterable[Row], note: str = ""
    ) -> PaperTable:
        """The table of these cells, beside the paper's."""
        table = Table(caption=caption, columns=tuple(columns), rows=tuple(rows))
        return PaperTable(title=title, table=table, missing=tuple(self.commands), note=note)


def paper_tables(runs: Iterable[RunRecord], rankings: tuple[Ranking, ...], lead: RunRecord) -> tuple[PaperTable, ...]:
    """The tables of the paper that are of the data that the leading run was trained on; none for other data."""
    data = data_of(lead)
    if data is None:
        return ()
    if data is not paper.CIFAR10:
        return (_table_3(lead, rankings, data),)
    same = [run for run in runs if data_of(run) is data]
    by_objective: dict[Objective, list[RunRecord]] = {}  # the runs of each row of Table 2
    for run in same:
        if (objective := objective_of(run)) is not None:
            by_objective.setdefault(objective, []).append(run)
    tables = [_table_1(lead, same, rankings), _in_the_text(lead, rankings)]
    if len(by_objective) > 1:
        tables.insert(1, _table_2(by_objective, rankings))
    return tuple(tables)


def _table_1(lead: RunRecord, runs: list[RunRecord], rankings: tuple[Ranking, ...]) -> PaperTable:
    """CIFAR-10: all models of the paper, and below them one run of ours an objective, the leading run for its own."""
    missing = MissingCells()
    rows = [
        Row(
            cells=(
                row.model + (" (conditional)" if row.conditional else ""),
                _plus_minus(row.inception_score, row.inception_score_std),
                _given(row.fid),
                _bound(row.nll, row.nll_is_bound),
                _bound(row.nll_train, row.nll_is_bound),
            ),
            mark="close" if row.is_ddpm else "",
        )
        for row in paper.TABLE_1
    ]
    shown = {objective_of(run): run for run in runs} | {objective_of(lead): lead}
    for objective, run in shown.items():
        alike = [other for other in runs if objective_of(other) == objective] if objective else [run]
        rows.append(_our_row(run, best_as_the_paper(alike, rankings, paper.CIFAR10), missing))
    return missing.table(
        "Table 1: CIFAR-10",
        "Table 1 of the paper, and ours below it; NLL in bits/dim",
        (Column(title="Model", wraps=True), *numeric("IS", "FID", "NLL test", "NLL train")),
        rows,
        _measured_otherwise(lead, rankings, paper.CIFAR10),
    )


def _our_row(run: RunRecord, best: Entry | None, missing: MissingCells) -> Row:
    """A run's row in Table 1, by the best entry that was measured as the paper's, which may be of another run like it."""
    run = best.run if best else run
    evaluate = commands.evaluate(run)
    test, train = (cifar10_likelihood(run, of_training=of_training) for of_training in (False, True))
    return Row(
        cells=(
            _our_name(run, best),
            score_text(best) if best and best.checkpoint.score is not None else missing.cell(evaluate),
            distance_text(best) if best else missing.cell(evaluate),
            _bits(test) if test else missing.cell(commands.likelihood(run, "--data", TEST_SHARDS)),
            _bits(train) if train else missing.cell(commands.likelihood(run)),
        ),
        mark="best",
    )


def _our_name(run: RunRecord, best: Entry | None) -> str:
    return f"Ours: {run.name}" + (f", step {best.checkpoint.step:,}" if best else "")


def _table_2(by_objective: dict[Objective, list[RunRecord]], rankings: tuple[Ranking, ...]) -> PaperTable:
    """What is predicted, and by which objective, each row beside the best run like it."""
    missing = MissingCells()
    rows = []
    for row in paper.TABLE_2:
        runs = by_objective.get(row_objective(row), [])
        best = best_as_the_paper(runs, rankings, paper.CIFAR10)
        if best is not None:
            score, fid = score_text(best), distance_text(best)
        elif runs:
            score = fid = missing.cell(commands.evaluate(runs[-1]))
        else:
            options = [f"--diffusion.mean-type {row.mean_type}", f"--diffusion.loss-type {row.loss_type}"]
            if row.learned_variance:
                options += ["--diffusion.var-type learned", "--unet.out-channels 6"]
            score = fid = missing.cell(commands.train("cifar10", *options), "python jobs/evaluate.py --run RUN")
        rows.append(
            Row(
                cells=(
                    f"{'ε' if row.mean_type == 'eps' else 'μ̃'} prediction, {row.objective}",
                    _plus_minus(row.inception_score, row.inception_score_std),
                    score,
                    _given(row.fid),
                    fid,
                ),
                mark="best" if best else "",
            )
        )
    return missing.table(
        "Table 2: what is predicted, and by which objective",
        "Table 2 of the paper (unconditional CIFAR-10) beside this experiment",
        (Column(title="Objective"), *numeric("IS, paper", "IS, ours", "FID, paper", "FID, ours")),
        rows,
        f"{NOTHING}: the paper gives no score, for training was unstable.",
    )


def _table_3(lead: RunRecord, rankings: tuple[Ranking, ...], data: paper.Reported) -> PaperTable:
    """LSUN: all models of the paper, and below them the leading run in the column of its data set."""
    missing = MissingCells()
    rows = [
        Row(
            cells=(row.model, _given(row.bedroom), _given(row.church), _given(row.cat)),
            mark="close" if row.is_ddpm else "",
        )
        for row in paper.TABLE_3
    ]
    best = best_as_the_paper([lead], rankings, data)
    cells = []
    for column, preset in (
        (paper.LSUN_BEDROOM, "lsun_bedroom"),
        (paper.LSUN_CHURCH, "lsun_church"),
        (paper.LSUN_CAT, "lsun_cat"),
    ):
        shards, make_shards = commands.lsun_reference(preset)
        if column is not data:
            measure = f"python jobs/evaluate.py --run RUN --reference {shards}"
            cells.append(missing.cell(commands.train(preset), make_shards, measure))
        elif best is not None:
            cells.append(distance_text(best))
        else:
            cells.append(missing.cell(make_shards, commands.evaluate(lead, "--reference", shards)))
    rows.append(Row(cells=(_our_name(lead, best), *cells), mark="best"))
    return missing.table(
        "Table 3: LSUN at 256 × 256",
        "Table 3 of the paper (FID), and ours below it",
        (Column(title="Model"), *numeric("Bedroom", "Church", "Cat")),
        rows,
        _measured_otherwise(lead, rankings, data),
    )


def _in_the_text(lead: RunRecord, rankings: tuple[Ranking, ...]) -> PaperTable:
    """What the paper says of CIFAR-10 outside its tables."""
    missing = MissingCells()
    best = best_as_the_paper([lead], rankings, paper.CIFAR10_TEST, against="test")
    command = commands.evaluate(lead, "--test-reference", TEST_SHARDS)
    ours = distance_text(best) if best else missing.cell(command)
    test_fid = ("FID against the test set", _given(paper.CIFAR10_TEST_FID), ours)
    rows = [Row(cells=cells) for cells in (test_fid, *_likelihood_rows(lead, missing))]
    return missing.table(
        "In the text: sections 4.1 to 4.3",
        "Numbers in the paper's text beside this experiment's",
        (Column(title="What", wraps=True), *numeric("Paper", "Ours")),
        rows,
    )


def _likelihood_rows(lead: RunRecord, missing: MissingCells) -> Sequence[tuple[str, str, str]]:
    """Section 4.3: (what it is, the paper's, ours)."""
    test, train = (cifar10_likelihood(lead, of_training=of_training) for of_training in (False, True))
    measure_test, measure_train = commands.likelihood(lead, "--data", TEST_SHARDS), commands.likelihood(lead)

    def of_test(value: float | None, digits: int = 4) -> str:
        return missing.cell(measure_test) if value is None else number(value, digits)

    result = test[1] if test else None
    rate, distortion, rmse, prior = (
        (result.rate, result.distortion, result.rmse, result.prior) if result else (None, None, None, None)
    )
    return (
        ("Rate L_1 + ... + L_T, test set (bits/dim)", _given(paper.CIFAR10_RATE), of_test(rate)),
        ("Distortion L_0, test set (bits/dim)", _given(paper.CIFAR10_DISTORTION), of_test(distortion)),
        ("RMSE of that reconstruction, on 0..255", _given(paper.CIFAR10_RMSE), of_test(rmse)),
        ("L_T (bits/dim)", f"about {number(paper.CIFAR10_PRIOR_BPD, 1)}", of_test(prior, 3)),
        (
            "NLL, test less training set (bits/dim)",
            "at most 0.03",
            fixed(result.bpd - train[1].bpd, 3) if result and train else missing.cell(measure_test, measure_train),
        ),
    )


def _measured_otherwise(lead: RunRecord, rankings: tuple[Ranking, ...], data: paper.Reported) -> str:
    """What was measured of the leading run in another way than the paper's, and so stands in no cell."""
    if best_as_the_paper([lead], rankings, data) is not None:
        return ""
    for ranking in rankings:
        for entry in ranking.entries:
            if entry.run.run_id == lead.run_id and ranking.protocol.distance == "fid":
                differences = listed(departures(lead.card, ranking.protocol, data))
                return f"Measured otherwise, and so in no cell: FID {distance_text(entry)} with {differences}."
    return ""


def _bits(measured: tuple[LikelihoodRecord, BitsPerDim]) -> str:
    likelihood, result = measured
    text = f"≤ {fixed(result.bpd, 3)}"
    if result.low is not None and result.high is not None:
        text += f" ± {fixed((result.high - result.low) / 2, 3)}"
    return text + (" (estimate)" if likelihood.strata is not None else "")


def _given(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _plus_minus(value: float | None, std: float | None) -> str:
    return _given(value) + ("" if std is None else f" ± {std:.2f}")


def _bound(value: float | None, is_bound: bool) -> str:
    return NOTHING if value is None else ("≤ " if is_bound else "") + _given(value)
