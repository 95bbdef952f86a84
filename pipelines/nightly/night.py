"""Every night: what is new, evaluate it, move the alias of the best, and say what a person must know.

Running it again does what is left. Two at once share the work by leases, one a checkpoint; were both to do the same, they
would commit the same bits.
"""

import contextlib
import time
import traceback
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path

from filelock import Timeout

from ddpm_core.checkpoint import Checkpoint, checkpoint_name, open_checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.errors import DivergedError, InputError, one_line
from pipelines.checkpoints.store import made_at, saved_steps
from pipelines.evaluate.driver import Evaluator
from pipelines.evaluate.evaluation import Evaluation, describe_values, read_evaluation
from pipelines.evaluate.illustrate import illustrate
from pipelines.evaluate.records import Records
from pipelines.evaluate.subject import open_subject
from pipelines.nightly.alarms import Alarm, deliver
from pipelines.nightly.champion import Champion, hold
from pipelines.nightly.conclude import Morning
from pipelines.nightly.config import NightlyConfig
from pipelines.nightly.ledger import LEASE, Notes
from pipelines.runtime.fan_out import OutOfTime, Pool
from pipelines.runtime.layout import local_storage, open_storage
from pipelines.runtime.locations import Location
from pipelines.runtime.progress import Say
from pipelines.tracking.queries import Training, trainings
from pipelines.tracking.retry import UnansweredError, with_retries
from pipelines.tracking.tracker import open_tracker
from pipelines.tracking.uri import UnreachableError, tracking_uri


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
    failed: list[Work] = field(default_factory=list)
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
        counted: dict[str, Sized] = {
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
        todo = night.todo()
        if config.dry_run:
            night.result.left = [work.title for work in todo]
            for title in night.result.left or ["nothing"]:
                say(f"nightly: {title} is new")
            return night.result
        if todo:
            pool.check_fits()  # a refusal is told once, and not as every checkpoint's fault
        pool.deadline = night.deadline()
        night.work()
        with night.notes.lease("conclusion", wait=None):
            Morning(night).conclude()
        Morning(night).confirm()
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
    """What nights that evaluate alike leave for each other."""
    return Notes(local_storage(config.storage).nights(config.experiment) / config.identity)


class Night:
    """One run of the job."""

    def __init__(self, config: NightlyConfig, pool: Pool, say: Say) -> None:
        self.config, self.pool, self.say = config, pool, say
        self.result = NightlyResult()
        self.storage = local_storage(config.storage)
        self.notes = notes_of(config)
        self.started = time.monotonic()
        self.tracker = with_retries(  # a server that restarts at this hour is waited for
            lambda: open_tracker(config, self.storage),
            lambda error: isinstance(error, UnreachableError),
            f"tracking server {tracking_uri(config, self.storage)!r}",
        )
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
        here = self.storage.run(training.name).folder
        return here if here.is_dir() else open_storage(training.storage).run(training.name).folder

    def todo(self) -> list[Work]:
        """All checkpoints without a result, the newest first. InputError where no training can be evaluated."""
        found: list[Work] = []
        for training in self.trainings:
            try:
                found += self.todo_of(training)
            except UnansweredError:
                raise
            except Exception as error:  # of one training: its store, its checkpoints, its data set
                if training.name not in self.refused:
                    self.say(f"nightly: {training.name} cannot be evaluated: {one_line(error)}")
                self.refused[training.name] = one_line(error)
        if self.refused and len(self.refused) == len(self.trainings):
            raise InputError(next(iter(self.refused.values())))
        return sorted(found, key=lambda work: (-work.made, work.training.name, -work.step))

    def todo_of(self, training: Training) -> list[Work]:
        if training.name in self.refused:
            return []
        folder, found = self.folder(training), []
        for step in saved_steps(folder):
            path = folder / checkpoint_name(step)
            if (training.name, step) in self.measured or self.is_measured(training, path):
                self.measured.add((training.name, step))
            elif not self.is_given_up(training, step):
                found.append(Work(training, step, path, made_at(path)))
        return found

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
        return evaluator.subject.is_measured(checkpoint, "selection") and evaluator.records.is_logged(checkpoint)

    def evaluator(self, training: Training, checkpoint: Checkpoint) -> Evaluator:
        """The evaluation of a training's checkpoints. InputError where it is refused."""
        name = training.name
        if name not in self.evaluators:
            config = self.config.evaluation(name)
            run = self.storage.run(name, self.folder(training))
            subject = open_subject(config, run, (checkpoint,), self.storage, self.say)
            self.evaluators[name] = Evaluator(subject, Records(subject, lambda: self.tracker), self.pool, self.say)
        return self.evaluators[name]

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
        if len(self.result.failed) > 1 and not self.result.evaluated:
            self.say("nightly: all failed, so it is hardly the checkpoints' fault: no attempt is counted")
            for work in self.result.failed:
                names = (work.training.name, work.path.name)
                self.notes.end(*names, self.notes.failures(*names)[:-1])

    def attempt(self, work: Work, wait: float) -> bool:
        """Evaluate a checkpoint, unless it has failed too often; whether its lease was to be had. OutOfTime."""
        if self.pool.deadline is not None and time.monotonic() >= self.pool.deadline:
            raise OutOfTime
        names = (work.training.name, work.path.name)
        try:
            with self.notes.lease("-".join(names), wait):
                if self.is_measured(work.training, work.path):  # by another job, meanwhile
                    return True
                failures = self.notes.begin(*names)
                if len(failures) < self.config.attempts:
                    self.say(f"nightly: {work.title}")
                    try:
                        failures = self.evaluate(work, failures)
                    except BaseException:  # the time is over, or MLflow away, or somebody pressed ctrl-C
                        self.notes.end(*names, failures)
                        raise
                self.notes.end(*names, failures)
        except Timeout:
            return False
        return True

    def evaluate(self, work: Work, failures: list[str]) -> list[str]:
        """Evaluate a checkpoint; how its failed attempts ended by now, none where this one did well. OutOfTime,
        UnansweredError."""
        try:
            checkpoint = open_checkpoint(work.path)
            evaluator = self.evaluator(work.training, checkpoint)
            [evaluation] = evaluator.evaluate([checkpoint], "selection")["train"]
            self.result.evaluated.append(f"{work.title}: {describe_values(evaluation.values, evaluation.protocol)}")
            hold(evaluator, self.kept(work.training, evaluator))
            illustrate(evaluator.subject, evaluator.records, checkpoint, self.pool, self.say)
        except (OutOfTime, UnansweredError):
            raise
        except Exception as error:
            if not (work.path / MANIFEST).is_file():
                self.say(f"nightly: {work.title} is skipped: the training removed it")
                return failures
            if not isinstance(error, InputError | DivergedError):
                self.say(traceback.format_exc())
            # Samples that are not finite will not be so the next time either.
            times = self.config.attempts - len(failures) if isinstance(error, DivergedError) else 1
            failures = [*failures, *[one_line(error)] * times]
            self.result.failed.append(work)
            self.say(f"nightly: {work.title} failed, time {len(failures)} of {self.config.attempts}: {failures[-1]}")
            return failures
        return []

    def deadline(self) -> float:
        """When the budget is spent, in time.monotonic()."""
        hours = self.config.hours
        if self.config.gpu_hours is not None:
            hours = min(hours, self.config.gpu_hours / self.pool.size)
        return self.started + hours * 3600.0

    # What it means.

    def evaluations(self, evaluator: Evaluator) -> list[Evaluation]:
        """All of a training's under the nightly protocol, by ascending step; also of checkpoints that are deleted."""
        folder = evaluator.subject.results(evaluator.subject.protocol("train", "selection"))
        found = [read_evaluation(path.parent) for path in folder.glob(f"step-*/{MANIFEST}")]
        return sorted(found, key=lambda evaluation: evaluation.step)

    def kept(self, training: Training, evaluator: Evaluator) -> list[Evaluation]:
        """Those of checkpoints that are there, and still those that were measured."""
        folder, found = self.folder(training), []
        for evaluation in self.evaluations(evaluator):
            with contextlib.suppress(InputError):
                checkpoint = open_checkpoint(folder / evaluation.folder.name)
                if evaluator.subject.is_measured(checkpoint, "selection"):
                    found.append(evaluation)
        return found
