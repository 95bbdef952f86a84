"""The paper's tables with this experiment's numbers beside them, cell by cell. A number stands in one of them only if it
was measured as the paper's; else the cell says so, and which command would fill it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from reports.records.entities import BitsPerDim, Likelihood, TrainingRun
from reports.sections.tables import Column, Row, Table, score_text
from reports.verdicts import commands, paper
from reports.verdicts.comparison import Key, best_as_the_paper, coded, data_of, key_of, row_key
from reports.verdicts.conclusions import departures, distance_text
from reports.verdicts.formatting import fixed, listed, number
from reports.verdicts.ranking import Ranking

NOTHING = "–"  # the paper has no number there


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table of the paper beside ours. `missing` are the commands that the cells [1], [2], ... name."""

    title: str
    table: Table
    missing: tuple[str, ...]
    note: str = ""


@dataclass
class _Missing:
    """Collects the commands of a table's missing cells; equal ones share a number."""

    commands: list[str] = field(default_factory=list)

    def cell(self, *lines: str) -> str:
        """The text of a cell that `lines` would fill, one after the other."""
        command = "\n".join(lines)
        if command not in self.commands:
            self.commands.append(command)
        return f"not measured [{self.commands.index(command) + 1}]"


def comparisons(
    runs: Iterable[TrainingRun], rankings: tuple[Ranking, ...], lead: TrainingRun
) -> tuple[PaperTable, ...]:
    """The tables of the paper that are of the data that the leading run was trained on; none for other data."""
    data = data_of(lead)
    if data is None:
        return ()
    same = [run for run in runs if data_of(run) is data]
    if data is not paper.CIFAR10:
        return (_table_3(lead, rankings, data),)
    ablation = _ablation(same)
    return (
        _table_1(lead, same, rankings),
        *([_table_2(ablation, rankings)] if len(ablation) > 1 else []),
        _in_the_text(lead, rankings),
    )


def _ablation(runs: Iterable[TrainingRun]) -> dict[Key, list[TrainingRun]]:
    found: dict[Key, list[TrainingRun]] = {}
    for run in runs:
        key = key_of(run)
        if key is not None:
            found.setdefault(key, []).append(run)
    return found


def _table_1(lead: TrainingRun, runs: list[TrainingRun], rankings: tuple[Ranking, ...]) -> PaperTable:
    missing = _Missing()
    rows = [
        Row(
            cells=(
                row.model + (" (conditional)" if row.group == "conditional" else ""),
                _plus_minus(row.inception_score, row.inception_score_std),
                _given(row.fid),
                _bound(row.nll, row.nll_is_bound),
                _bound(row.nll_train, row.nll_is_bound),
            ),
            mark="close" if row.ours else "",
        )
        for row in paper.TABLE_1
    ]
    shown = {key_of(run): run for run in runs} | {key_of(lead): lead}  # one run an objective, the lead for its own
    for key, run in shown.items():
        alike = [other for other in runs if key_of(other) == key] if key else [run]
        rows.append(_own_row(run, alike, rankings, missing))
    columns = ("Model", "IS", "FID", "NLL test", "NLL train")
    return PaperTable(
        title="Table 1: CIFAR-10",
        table=Table(
            caption="Table 1 of the paper, and ours below it; NLL in bits/dim",
            columns=tuple(
                Column(title=title, numeric=place > 0, wraps=not place) for place, title in enumerate(columns)
            ),
            rows=tuple(rows),
        ),
        missing=tuple(missing.commands),
        note=_otherwise(lead, rankings, paper.CIFAR10),
    )


def _own_row(run: TrainingRun, alike: list[TrainingRun], rankings: tuple[Ranking, ...], missing: _Missing) -> Row:
    entry = best_as_the_paper(alike, rankings, paper.CIFAR10)
    run = entry.run if entry else run
    name = f"Ours: {run.name}" + (f", step {entry.checkpoint.step:,}" if entry else "")
    if entry is None:
        fid = score = missing.cell(commands.evaluate(run))
    else:
        fid = distance_text(entry)
        score = score_text(entry) if entry.checkpoint.score is not None else missing.cell(commands.evaluate(run))
    test, train = (coded(run, of_training=of_training) for of_training in (False, True))
    return Row(
        cells=(
            name,
            score,
            fid,
            _bits(test) if test else missing.cell(commands.likelihood(run, "--data", "CIFAR10_TEST_SHARDS")),
            _bits(train) if train else missing.cell(commands.likelihood(run)),
        ),
        mark="best",
    )


def _table_2(ablation: dict[Key, list[TrainingRun]], rankings: tuple[Ranking, ...]) -> PaperTable:
    missing = _Missing()
    rows = []
    for row in paper.TABLE_2:
        runs = ablation.get(row_key(row), [])
        entry = best_as_the_paper(runs, rankings, paper.CIFAR10)
        if entry is not None:
            score, fid = score_text(entry), distance_text(entry)
        elif runs:
            score = fid = missing.cell(commands.evaluate(runs[-1]))
        else:
            score = fid = missing.cell(_ablation_command(row), "python jobs/evaluate.py --run RUN")
        rows.append(
            Row(
                cells=(
                    f"{'ε' if row.mean_type == 'eps' else 'μ̃'} prediction, {row.objective}",
                    _plus_minus(row.inception_score, row.inception_score_std),
                    score,
                    _given(row.fid),
                    fid,
                ),
                mark="best" if entry else "",
            )
        )
    columns = ("Objective", "IS, paper", "IS, ours", "FID, paper", "FID, ours")
    return PaperTable(
        title="Table 2: what is predicted, and by which objective",
        table=Table(
            caption="Table 2 of the paper (unconditional CIFAR-10) beside this experiment",
            columns=tuple(Column(title=title, numeric=place > 0) for place, title in enumerate(columns)),
            rows=tuple(rows),
        ),
        missing=tuple(missing.commands),
        note=f"{NOTHING}: the paper gives no score, for training was unstable.",
    )


def _ablation_command(row: paper.AblationRow) -> str:
    options = [f"--diffusion.mean-type {row.mean_type}", f"--diffusion.loss-type {row.loss_type}"]
    if row.learned_variance:
        options += ["--diffusion.var-type learned", "--unet.out-channels 6"]
    return commands.train("cifar10", *options)


def _table_3(lead: TrainingRun, rankings: tuple[Ranking, ...], data: paper.Reported) -> PaperTable:
    missing = _Missing()
    places = (paper.LSUN_BEDROOM, paper.LSUN_CHURCH, paper.LSUN_CAT)
    presets = ("lsun_bedroom", "lsun_church", "lsun_cat")
    rows = [
        Row(
            cells=(row.model, _given(row.bedroom), _given(row.church), _given(row.cat)),
            mark="close" if row.ours else "",
        )
        for row in paper.TABLE_3
    ]
    entry = best_as_the_paper([lead], rankings, data)
    cells = []
    for place, preset in zip(places, presets, strict=True):
        if place is not data:
            cells.append(missing.cell(commands.train(preset), "python jobs/evaluate.py --run RUN"))
        elif entry is not None:
            cells.append(distance_text(entry))
        else:
            cells.append(missing.cell(commands.evaluate(lead, "--reference", "SHARDS_OF_50000_IMAGES")))
    name = f"Ours: {lead.name}" + (f", step {entry.checkpoint.step:,}" if entry else "")
    rows.append(Row(cells=(name, *cells), mark="best"))
    return PaperTable(
        title="Table 3: LSUN at 256 × 256",
        table=Table(
            caption="Table 3 of the paper (FID), and ours below it",
            columns=(Column(title="Model"), *(Column(title=t, numeric=True) for t in ("Bedroom", "Church", "Cat"))),
            rows=tuple(rows),
        ),
        missing=tuple(missing.commands),
        note=_otherwise(lead, rankings, data),
    )


def _in_the_text(lead: TrainingRun, rankings: tuple[Ranking, ...]) -> PaperTable:
    """What the paper says of CIFAR-10 outside its tables."""
    missing = _Missing()
    entry = best_as_the_paper([lead], rankings, paper.CIFAR10_TEST, against="test")
    test, train = (coded(lead, of_training=of_training) for of_training in (False, True))
    both = (commands.likelihood(lead, "--data", "CIFAR10_TEST_SHARDS"), commands.likelihood(lead))

    def of_test(name: str, digits: int = 4) -> str:
        value = getattr(test[1], name) if test else None
        return missing.cell(both[0]) if value is None else number(value, digits)

    gap = test[1].bpd - train[1].bpd if test and train else None
    fid = (
        distance_text(entry)
        if entry
        else missing.cell(commands.evaluate(lead, "--test-reference", "CIFAR10_TEST_SHARDS"))
    )
    lines = (
        ("FID against the test set", _given(paper.CIFAR10_TEST_FID), fid),
        ("Rate L_1 + ... + L_T, test set (bits/dim)", _given(paper.CIFAR10_RATE), of_test("rate")),
        (
            "Distortion L_0, test set (bits/dim)",
            _given(paper.CIFAR10_DISTORTION),
            of_test("distortion"),
        ),
        ("RMSE of that reconstruction, on 0..255", _given(paper.CIFAR10_RMSE), of_test("rmse")),
        ("L_T (bits/dim)", f"about {number(paper.CIFAR10_PRIOR_BPD, 1)}", of_test("prior", 3)),
        (
            "NLL, test less training set (bits/dim)",
            "at most 0.03",
            missing.cell(*both) if gap is None else fixed(gap, 3),
        ),
    )
    return PaperTable(
        title="In the text: sections 4.1 to 4.3",
        table=Table(
            caption="Numbers in the paper's text beside this experiment's",
            columns=(
                Column(title="What", wraps=True),
                Column(title="Paper", numeric=True),
                Column(title="Ours", numeric=True),
            ),
            rows=tuple(Row(cells=line) for line in lines),
        ),
        missing=tuple(missing.commands),
    )


def _otherwise(lead: TrainingRun, rankings: tuple[Ranking, ...], data: paper.Reported) -> str:
    """What was measured of the leading run in another way than the paper's, and so stands in no cell."""
    if best_as_the_paper([lead], rankings, data) is not None:
        return ""
    for ranking in rankings:
        for entry in ranking.entries:
            protocol = ranking.protocol
            if entry.run.run_id == lead.run_id and protocol.distance == "fid":
                told = listed(departures(lead.card, protocol, data))
                return f"Measured otherwise, and so in no cell: FID {distance_text(entry)} with {told}."
    return ""


def _bits(measured: tuple[Likelihood, BitsPerDim]) -> str:
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
