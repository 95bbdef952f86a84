"""Fan-out: checkpoints -> samples -> features -> metrics.

The unit of work is a chunk, a fixed range of sample indices in batches of a fixed size. A worker commits one file a
chunk; when a checkpoint has all of its chunks, a worker reads them in order and commits the numbers. The result does not
depend on the number of workers, on the order in which they finish, or on how often the evaluation was killed; running it
again makes what is missing.

A checkpoint is chosen by samples of one noise (`selection`) and its numbers are reported on samples of another
(`report`): the lowest of several noisy numbers is below what it will be the next time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.configs import Purpose
from ddpm_core.errors import InputError
from ddpm_core.verdicts import intervals_overlap
from pipelines.checkpoints.retention import mark_best
from pipelines.checkpoints.store import saved_steps
from pipelines.evaluate.config import MIN_CHUNKS, EmaConfig, EvaluateConfig, GridConfig
from pipelines.evaluate.evaluation import (
    Evaluation,
    describe_distance,
    describe_values,
    read_evaluation,
    read_evaluations,
)
from pipelines.evaluate.illustrate import illustrate
from pipelines.evaluate.records import Records
from pipelines.evaluate.subject import Role, Subject, choose_subject
from pipelines.runtime.fan_out import Pool
from pipelines.runtime.progress import Say
from pipelines.runtime.recipe import keep_recipe
from pipelines.storage.layout import Run, open_storage
from pipelines.storage.locations import is_there
from pipelines.tracking.tracker import open_tracker

WORTH_A_LOOK = 4 * MIN_CHUNKS  # chunks; a person waits long for so many, and a quarter of them has an interval


@dataclass(frozen=True)
class EvaluateResult:
    """All evaluations of a call by ascending step, on selection noise; that of the best on report noise, if there was a
    choice; the MLflow run of the former, and the link to their ranking in MLflow's UI. `test`: those of the same samples
    against the test set, in the same order, the reported one last."""

    run_id: str
    link: str
    evaluations: tuple[Evaluation, ...]
    reported: Evaluation | None
    test: tuple[Evaluation, ...]

    @property
    def best(self) -> Evaluation:
        """The lowest distance; the earlier checkpoint if two are equal."""
        return min(self.evaluations, key=lambda evaluation: (evaluation.distance, evaluation.step))

    @property
    def indistinguishable(self) -> tuple[Evaluation, ...]:
        """The others whose intervals overlap with the best one's."""
        best = self.best
        return tuple(other for other in self.evaluations if other != best and other.indistinguishable_from(best))

    def describe(self) -> list[str]:
        """The outcome in sentences, at the end the best checkpoint and where all of them are ranked."""
        best, again = self.best, self.reported
        lines = [f"protocol {best.protocol.fingerprint}: {best.protocol.describe()}"]
        if best.interval is not None:
            lines.append(
                f"95 % intervals are of the mean {best.protocol.distance} of {best.protocol.num_samples:,} samples over their "
                "seeds, of this training and against these reference images: other trainings have other means"
            )
        if best.protocol.score not in best.values:
            lines.append(f"there is no Inception score, for {best.protocol.extractor} has no classes")
        if self.indistinguishable:
            steps = ", ".join(f"{other.step:,}" for other in self.indistinguishable)
            lines.append(f"not to be told apart from the best by their intervals: step {steps}")
        if again is not None:
            lines.append(
                f"the best, on samples it was not chosen by, has {describe_values(again.values, again.protocol)}"
            )
        ranked = f"all checkpoints by {best.protocol.distance}, in MLflow: {self.link}"
        return [*lines, f"best is {self.describe_best()}", ranked]

    def describe_best(self) -> str:
        return f"step {self.best.step:,} with {describe_values(self.best.values, self.best.protocol)}"


def evaluate(config: EvaluateConfig, say: Say = lambda line: None) -> EvaluateResult:
    """Evaluate checkpoints, or finish that, or find it done.

    Raises InputError for a run nobody knows, a reference of other images, or an extractor that cannot be had or failed its
    calibration; before anything is sampled.
    """
    storage = open_storage(config.storage, to_write=True)
    with Pool(config.workers, config.cpus_per_worker, say) as pool:
        subject = choose_subject(config, storage, say)
        evaluator = Evaluator(subject, Records(subject, partial(open_tracker, config, storage)), pool)
        measured = evaluator.evaluate(subject.checkpoints, config.noise)
        results = subject.results(subject.protocol("train", config.noise))
        keep_recipe(results, replace(config, storage=str(storage.root)))
        tracked = evaluator.records.find(subject.protocol("train", config.noise))
        assert tracked is not None  # it was just written to
        link = evaluator.records.link(subject.protocol("train", config.noise))
        result = EvaluateResult(tracked.run_id, link, measured["train"], None, measured.get("test", ()))
        if config.noise == "selection" and config.weights == "ema" and config.ema_length is None:
            keep_best(result, subject.run, say)
        best = next(checkpoint for checkpoint in subject.checkpoints if checkpoint.step == result.best.step)
        if not is_there(best.path / MANIFEST):  # the training has removed it
            return result
        if config.noise == "selection" and config.report and len(result.evaluations) > 1:
            again = evaluator.evaluate([best], "report")
            result = replace(result, reported=again["train"][0], test=(*result.test, *again.get("test", ())))
        illustrate(subject, evaluator.records, best, pool)
        return result


def evaluate_grid(config: GridConfig, say: Say = lambda line: None) -> dict[tuple[float, int], Evaluation]:
    """One checkpoint by each of a grid of samplers, by (eta, steps); the finished ones are read. Raises InputError as evaluate()
    does, and for several checkpoints."""
    cells = {(eta, steps): config.cell(steps, eta) for eta in config.etas for steps in config.steps}
    # Before anything is sampled: the cells differ in their sampler alone.
    checkpoint = only_checkpoint(next(iter(cells.values())), "a grid is")
    for cell in cells.values():
        cell.steps_of(checkpoint.diffusion_config().num_timesteps)
    return {place: evaluate(cell, say).best for place, cell in cells.items()}


def only_checkpoint(config: EvaluateConfig, what: str) -> Checkpoint:
    """The one that a configuration asks for. Raises InputError if there are several, or it cannot be evaluated."""
    subject = choose_subject(config, open_storage(config.storage, to_write=True), lambda line: None)
    if len(subject.checkpoints) > 1:
        raise InputError(
            f"run {subject.run.name!r} has {len(subject.checkpoints)} checkpoints, and {what} of one: give "
            "--evaluate.checkpoints latest, or a step"
        )
    return subject.checkpoints[0]


def evaluate_lengths(config: EmaConfig, say: Say = lambda line: None) -> dict[float, Evaluation]:
    """One checkpoint with EMA of several lengths, by length; the finished ones are read. Raises InputError as evaluate() does,
    and for several checkpoints."""
    only_checkpoint(config.of_length(config.lengths[0]), "the lengths are")
    return {length: evaluate(config.of_length(length), say).best for length in sorted(set(config.lengths))}


def describe_lengths(measured: Mapping[float, Evaluation]) -> list[str]:
    """The distance of each length, and the best of them with those that cannot be told apart from it."""
    best = min(measured, key=lambda length: (measured[length].distance, length))
    interval = measured[best].interval
    close = [n for n, each in measured.items() if n != best and intervals_overlap(each.interval, interval)]
    name = measured[best].protocol.distance
    lines = [f"EMA length {length:g} has {name} {describe_distance(each)}" for length, each in measured.items()]
    others = f", not to be told apart by their intervals: {', '.join(f'{each:g}' for each in close)}" if close else ""
    return [*lines, f"the best EMA length is {best:g}{others}"]


def describe_grid(grid: Mapping[tuple[float, int], Evaluation]) -> list[str]:
    """The distances as a table in lines: a row for each eta, a column for each number of steps."""
    etas, steps = list(dict.fromkeys(eta for eta, _ in grid)), list(dict.fromkeys(count for _, count in grid))
    name = next(iter(grid.values())).protocol.distance
    rows = [[name, *(f"{count:,} steps" for count in steps)]]
    rows += [[f"eta {eta:g}", *(f"{grid[eta, count].distance:.4g}" for count in steps)] for eta in etas]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def keep_best(result: EvaluateResult, run: Run, say: Say) -> None:
    """Have the training keep its best checkpoint, by all finished evaluations under the protocol of a result."""
    best = min(
        read_evaluations(result.best.folder.parent, result.evaluations),
        key=lambda evaluation: (evaluation.distance, evaluation.step),
    )
    if best.step in set(saved_steps(run.folder)):
        mark_best(run.folder, best.step)
    else:
        say(f"evaluate: the best checkpoint, step {best.step:,}, is no longer kept: give the run a larger --keep-last")


class Evaluator:
    """Measures checkpoints with a pool of workers, and records what was measured."""

    def __init__(self, subject: Subject, records: Records, pool: Pool) -> None:
        self.subject, self.records, self.pool, self.say = subject, records, pool, pool.say

    def evaluate(self, checkpoints: Sequence[Checkpoint], purpose: Purpose) -> dict[Role, tuple[Evaluation, ...]]:
        """Measure checkpoints against each reference on samples of one purpose, or find that done. A checkpoint that the
        training removes meanwhile is left out; raises InputError if none remains."""
        subject, protocols = self.subject, self.subject.protocols(purpose)
        todo = [c for c in checkpoints if not subject.is_measured(c, purpose)]
        if todo:
            self.pool.check_fits()  # before anything is written: a refusal leaves no run behind
        with self.records.open(protocols) as runs:
            if todo:
                self._make(todo, purpose)
            folders = {role: subject.results(protocol) for role, protocol in protocols.items()}
            remaining = [c for c in checkpoints if c not in todo or is_there(folders["train"] / c.path.name / MANIFEST)]
            if not remaining:
                raise InputError(
                    f"run {subject.run.name!r} has lost every checkpoint that was to be evaluated: give its training a larger "
                    "--keep-last"
                )
            evaluations = {
                role: tuple(read_evaluation(folder / c.path.name) for c in remaining)
                for role, folder in folders.items()
            }
            for role, measured in evaluations.items():
                for checkpoint, evaluation in zip(remaining, measured, strict=True):
                    samples = subject.samples(purpose) / checkpoint.path.name
                    self.records.log_evaluation(runs[role], checkpoint, evaluation, samples)
                self.records.rank(runs[role], protocols[role], remaining, measured)
        if not todo:
            counted = "1 checkpoint" if len(remaining) == 1 else f"{len(remaining)} checkpoints"
            self.say(f"evaluate: {subject.run.name} is done, {counted} under protocol {protocols['train'].fingerprint}")
        return evaluations

    def _make(self, checkpoints: Sequence[Checkpoint], purpose: Purpose) -> None:
        """Sample what is missing; each checkpoint is measured, by a worker, when all of its chunks are there."""
        # Here: with torch and torchmetrics, which what is done already does without.
        from pipelines.evaluate.measure import MeasuredAgainst, Measurer, NumbersUnit, PreviewUnit
        from pipelines.evaluate.reference import reference_statistics
        from pipelines.evaluate.worker import sample_checkpoints

        subject, count = self.subject, len(self.subject.chunks)
        quarters = {count * part // 4 for part in (1, 2, 3)} if count >= WORTH_A_LOOK else ()
        for dataset in subject.references.values():
            reference_statistics(dataset, subject.extractor, self.pool, subject.config.neighbours)
        comparisons = [
            MeasuredAgainst(protocol, subject.references[role], subject.results(protocol))
            for role, protocol in subject.protocols(purpose).items()
        ]
        samples = subject.samples(purpose)
        due: list[NumbersUnit | PreviewUnit] = []
        for checkpoint, done, outcome in sample_checkpoints(
            checkpoints,
            subject.chunks,
            samples,
            subject.settings(purpose),
            subject.extractor.spec,
            self.pool,
            Measurer(comparisons, subject.extractor, samples, subject.chunks, subject.timesteps),
            due,
        ):
            if len(done) == count:
                due.append(NumbersUnit(checkpoint))
            elif outcome == "made" and len(done) in quarters:
                due.append(PreviewUnit(checkpoint, tuple(done)))
