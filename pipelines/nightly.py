"""Every night: what is new, evaluate it, move the alias of the best, and say what a person must know.

Running it again does what is left. Two at once share the work by leases, one a checkpoint; were both to do the same, they
would commit the same bits.
"""

import contextlib
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import Timeout

from ddpm_core.checkpoint import Checkpoint, checkpoint_name, open_checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.errors import DivergedError, InputError
from ddpm_core.protocol import ALARM_TAG
from pipelines.alarms import Alarm, degenerate, deliver, regressions, stopped
from pipelines.champion import Champion, crown
from pipelines.evaluator import Evaluator
from pipelines.fanout import OutOfTime, Pool
from pipelines.illustration import illustrate
from pipelines.locations import Location, absolute, location
from pipelines.lookup import Training, trainings
from pipelines.nightly_config import NightlyConfig
from pipelines.notes import LEASE, Notes
from pipelines.patience import UnansweredError
from pipelines.progress import Say
from pipelines.results import Evaluation, describe_values, read_evaluation
from pipelines.saving import made_at, saved_steps
from pipelines.tracking import Tracker, default_uri


@dataclass(frozen=True)
class Work:
    """A checkpoint that has no result yet. made: seconds, when it was finished."""

    training: Training
    step: int
    path: Location
    made: float

    @property
    def title(self) -> str:
        return f"{self.training.name} step {self.step:,}"


@dataclass
class NightlyResult:
    """What a night did. alarms: all that stand; new: those not told before."""

    evaluated: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)  # in work by another job
    left: list[str] = field(default_factory=list)  # for lack of time
    champions: list[Champion] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)
    new: list[Alarm] = field(default_factory=list)

    def describe(self) -> list[str]:
        """In sentences, the alarms first."""
        told = [
            f"ALARM {alarm.run}: {alarm.text}{'' if alarm in self.new else ' (told before)'}" for alarm in self.alarms
        ]
        counted = {
            "evaluated": self.evaluated,
            "failed": self.failed,
            "in work elsewhere": self.elsewhere,
            "left for lack of time": self.left,
        }
        parts = [f"{len(names)} {what}" for what, names in counted.items() if names]
        champions = [champion.describe() for champion in self.champions]
        return [*told, *champions, f"{', '.join(parts)}" if parts else "nothing was new"]


def nightly(config: NightlyConfig, say: Say = lambda line: None) -> NightlyResult:
    """Evaluate what has no result, newest first, as long as the budget lasts; then see what is best and what is wrong.

    InputError where the experiment has no training, or none that could be evaluated as asked.
    """
    with Pool(config.workers, config.cpus_per_worker, say) as pool:
        night = Night(config, pool, say)
        if config.dry_run:
            night.result.left = [work.title for work in night.todo()]
            for title in night.result.left or ["nothing"]:
                say(f"nightly: {title} is new")
            return night.result
        night.work()
        with night.notes.lease("conclusion", wait=None):
            night.conclude()
        night.confirm()
        return night.result


def delivered(config: NightlyConfig, result: NightlyResult, report: Path, say: Say) -> bool:
    """Tell the new alarms once; whether there were any. What could not be delivered is told again the next night."""
    notes = notes_of(config)
    new = [alarm for alarm in result.new if alarm.key not in notes.told()]  # by another job, meanwhile
    if not new:
        return False
    wrong = deliver(new, {"experiment": config.experiment, "report": str(report)}, config.alarm_command)
    for sentence in wrong:
        say(f"nightly: {sentence}; the alarm is given again the next night")
    if not wrong:
        notes.tell(notes.told() | {alarm.key for alarm in new})
    return True


def notes_of(config: NightlyConfig) -> Notes:
    """What the nights of an experiment leave for each other."""
    return Notes(absolute(config.storage, option="--storage") / "nightly" / config.experiment)


class Night:
    """One run of the job."""

    def __init__(self, config: NightlyConfig, pool: Pool, say: Say) -> None:
        self.config, self.pool, self.say = config, pool, say
        self.result = NightlyResult()
        self.storage = absolute(config.storage, option="--storage")
        self.notes = notes_of(config)
        self.started = time.monotonic()
        self.tracker = Tracker(config.tracking_uri or default_uri(self.storage), config.experiment, self.storage)
        self.trainings = [each for each in trainings(self.tracker) if config.run in (None, each.name)]
        if not self.trainings:
            which = "" if config.run is None else f" {config.run!r}"
            raise InputError(
                f"experiment {config.experiment!r} has no training{which}: train with --experiment {config.experiment}, or "
                "give another --experiment or --tracking-uri"
            )
        self.evaluators: dict[str, Evaluator] = {}
        self.refused: dict[str, str] = {}  # trainings that cannot be evaluated as asked, and why
        self.measured: set[tuple[str, int]] = set()

    # What there is to do.

    def folder(self, training: Training) -> Location:
        """Where a training's checkpoints lie."""
        here = self.storage / "train" / training.name
        return here if here.is_dir() else location(training.storage, option="--storage") / "train" / training.name

    def todo(self) -> list[Work]:
        """All checkpoints without a result, the newest first. InputError where no training can be evaluated."""
        found = []
        for training in self.trainings:
            folder = self.folder(training)
            for step in saved_steps(folder):
                path = folder / checkpoint_name(step)
                if (training.name, step) in self.measured or self.is_measured(training, path):
                    self.measured.add((training.name, step))
                elif training.name not in self.refused and not self.is_given_up(training, step):
                    found.append(Work(training, step, path, made_at(path)))
        if self.refused and len(self.refused) == len(self.trainings):
            raise InputError(next(iter(self.refused.values())))
        return sorted(found, key=lambda work: (-work.made, work.training.name, -work.step))

    def is_given_up(self, training: Training, step: int) -> bool:
        """Whether a checkpoint has failed too often."""
        return len(self.notes.failures(training.name, checkpoint_name(step))) >= self.config.attempts

    def is_measured(self, training: Training, path: Location) -> bool:
        """Whether a checkpoint has its result, on disk and in MLflow."""
        try:
            checkpoint = open_checkpoint(path)
        except InputError:
            return False
        evaluator = self.evaluator(training, checkpoint)
        return (
            evaluator is not None and evaluator.is_measured(checkpoint, "selection") and evaluator.is_logged(checkpoint)
        )

    def evaluator(self, training: Training, checkpoint: Checkpoint) -> Evaluator | None:
        """The evaluation of a training's checkpoints, None where it is refused."""
        name = training.name
        if name not in self.evaluators and name not in self.refused:
            try:
                config = self.config.evaluation(name)
                self.evaluators[name] = Evaluator(config, name, [checkpoint], self.pool, self.say)
            except InputError as error:
                self.refused[name] = str(error)
                self.say(f"nightly: {name} cannot be evaluated: {error}")
        return self.evaluators.get(name)

    # Doing it.

    def work(self) -> None:
        """Evaluate one checkpoint after the other; those that another job holds come last."""
        looked_at: set[tuple[str, int]] = set()
        busy: list[Work] = []

        def fresh() -> Iterator[Work]:
            while todo := [work for work in self.todo() if (work.training.name, work.step) not in looked_at]:
                yield todo[0]

        try:
            for work in fresh():
                if not self.attempt(work, wait=0.0):
                    busy.append(work)
                looked_at.add((work.training.name, work.step))
            for work in busy:  # a dead job's lease has to be watched for a while before it can be taken
                if not self.attempt(work, wait=1.5 * LEASE):
                    self.result.elsewhere.append(work.title)
        except OutOfTime:
            self.result.left = [
                work.title for work in self.todo() if (work.training.name, work.step) not in looked_at or work in busy
            ]
            self.say(f"nightly: the time is over, {len(self.result.left)} left for the next night")

    def attempt(self, work: Work, wait: float) -> bool:
        """Evaluate a checkpoint, unless it has failed too often; whether its lease was to be had. OutOfTime."""
        if self.pool.deadline is None:
            self.pool.deadline = self.deadline()
        if time.monotonic() >= self.pool.deadline:
            raise OutOfTime
        names = (work.training.name, work.path.name)
        try:
            with self.notes.lease("-".join(names), wait):
                if self.is_measured(work.training, work.path):  # by another job, meanwhile
                    return True
                failures = self.notes.begin(*names)
                if len(failures) >= self.config.attempts:
                    self.notes.end(*names, failures)
                    return True
                self.say(f"nightly: {work.title}")
                try:
                    self.evaluate(work)
                except (OutOfTime, UnansweredError, KeyboardInterrupt):
                    self.notes.end(*names, failures)
                    raise
                except Exception as error:
                    if not isinstance(error, InputError | DivergedError):
                        self.say(traceback.format_exc())
                    failures.append(" ".join(str(error).split()) or type(error).__name__)
                    self.result.failed.append(work.title)
                    times = f"{len(failures)} of {self.config.attempts}"
                    self.say(f"nightly: {work.title} failed, time {times}: {failures[-1]}")
                else:
                    failures.clear()
                self.notes.end(*names, failures)
        except Timeout:
            return False
        return True

    def evaluate(self, work: Work) -> None:
        checkpoint = open_checkpoint(work.path)
        evaluator = self.evaluator(work.training, checkpoint)
        if evaluator is None:
            raise InputError(self.refused[work.training.name])
        [evaluation] = evaluator.evaluate([checkpoint], "selection")["train"]
        illustrate(evaluator, checkpoint)
        self.result.evaluated.append(f"{work.title}: {describe_values(evaluation.values, evaluation.protocol)}")

    def deadline(self) -> float:
        """When the budget is spent, in time.monotonic()."""
        hours = self.config.hours
        if self.config.gpu_hours is not None:
            hours = min(hours, self.config.gpu_hours / self.pool.size)
        return self.started + hours * 3600.0

    # What it means.

    def conclude(self) -> None:
        """Aliases, alarms, and both in MLflow."""
        ranked: dict[str, list[tuple[Evaluator, Evaluation]]] = {}  # by protocol
        alarms: list[Alarm] = []
        now = time.time()
        for training in self.trainings:
            folder = self.folder(training)
            steps = saved_steps(folder)
            last = (steps[-1], made_at(folder / checkpoint_name(steps[-1]))) if steps else None
            alarms += stopped(training, last, now, self.config.quiet_hours)
            alarms += self.given_up(training, steps)
            evaluator = self.evaluators.get(training.name)
            if evaluator is None:
                continue
            protocol = evaluator.protocol("train", "selection")
            found = [read_evaluation(path.parent) for path in evaluator.folder(protocol).glob(f"step-*/{MANIFEST}")]
            evaluations = sorted(found, key=lambda evaluation: evaluation.step)
            alarms += regressions(training.name, evaluations, self.config.worse_by)
            for evaluation in evaluations[-1:]:
                values = {**evaluation.values, **self.memorized(evaluator, folder, evaluation)}
                alarms += degenerate(training.name, replace(evaluation, values=values))
            kept = [(evaluator, evaluation) for evaluation in evaluations if evaluation.step in steps]
            ranked.setdefault(protocol.fingerprint, []).extend(kept)
        self.result.champions = crown(self.tracker, self.config.experiment, list(ranked.values()), self.say)
        for name, reason in self.refused.items():
            alarms.append(Alarm(f"refused {name} {reason}", name, f"cannot be evaluated: {reason}", of_training=True))
        self.result.alarms = alarms
        names = {training.name for training in self.trainings}
        self.result.new = self.notes.untold(alarms, names)
        self.tag(alarms)

    def memorized(self, evaluator: Evaluator, folder: Location, evaluation: Evaluation) -> dict[str, float]:
        """What the neighbours of an evaluation's samples say, where they are asked for."""
        path = folder / evaluation.folder.name
        if not self.config.nearest or not (path / MANIFEST).is_file():
            return {}
        memorization = illustrate(evaluator, open_checkpoint(path))
        return {} if memorization is None else memorization.values(evaluation.protocol)

    def given_up(self, training: Training, steps: list[int]) -> Iterator[Alarm]:
        """Of checkpoints that failed too often."""
        for step in steps:
            if self.is_given_up(training, step):
                failures = self.notes.failures(training.name, checkpoint_name(step))
                text = (
                    f"step {step:,} is left alone after {len(failures)} failed attempts; mend this and give --attempts "
                    f"{len(failures) + self.config.attempts}: {failures[-1]}"
                )
                yield Alarm(f"failed {training.name} {step}", training.name, text)

    def confirm(self) -> None:
        """Measure what is best on samples that it was not chosen by, in what time is left."""
        for number, champion in enumerate(self.result.champions):
            checkpoint = champion.checkpoint
            if self.config.report and (checkpoint.path / MANIFEST).is_file():
                if self.pool.deadline is None:
                    self.pool.deadline = self.deadline()
                with contextlib.suppress(OutOfTime, Timeout), self.notes.lease(f"{champion.run}-report", 0.0):
                    [again] = champion.evaluator.evaluate([checkpoint], "report")["train"]
                    self.result.champions[number] = replace(champion, again=again)

    def tag(self, alarms: list[Alarm]) -> None:
        """Alarms as tags of the MLflow runs that they are about; those that are over are cleared."""
        for training in self.trainings:
            of_training = [alarm.text for alarm in alarms if alarm.run == training.name and alarm.of_training]
            of_checkpoints = [alarm.text for alarm in alarms if alarm.run == training.name and not alarm.of_training]
            evaluator = self.evaluators.get(training.name)
            measured = evaluator.tracked_run("selection") if evaluator else None
            trained = self.tracker.find("train", training.name)
            if measured is None:
                of_training += of_checkpoints
            for run, texts in ((trained, of_training), (measured, of_checkpoints)):
                if run is not None:
                    run.set_tags({ALARM_TAG: "; ".join(texts)})
