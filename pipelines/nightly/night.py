"""The night's work: checkpoints without a result, evaluated one after the other, the newest first."""

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field

from filelock import Timeout

from ddpm_core.checkpoint import checkpoint_name, open_checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.errors import DivergedError, InputError, one_line
from pipelines.checkpoints.store import made_at
from pipelines.evaluate.evaluation import describe_values
from pipelines.evaluate.illustrate import illustrate
from pipelines.nightly.champion import mark_lowest
from pipelines.nightly.ledger import Ledger
from pipelines.nightly.trainings import NightlyTraining
from pipelines.runtime.fan_out import OutOfTime, Pool
from pipelines.storage.lease import LEASE
from pipelines.storage.locations import Location, is_there
from pipelines.tracking.retry import UnansweredError


@dataclass(frozen=True)
class Work:
    """A checkpoint that has no result yet. made: seconds, when it was finished."""

    training: NightlyTraining
    step: int
    path: Location
    made: float

    @property
    def title(self) -> str:
        return f"{self.training.name} step {self.step:,}"

    @property
    def key(self) -> tuple[str, str]:
        """(training, checkpoint), as the ledger names them."""
        return self.training.name, checkpoint_name(self.step)


@dataclass(eq=False)
class Night:
    """One run of the job over some trainings, and what became of their checkpoints. attempts: how often a checkpoint may fail.
    elsewhere: in work by another job. left: for lack of time."""

    trainings: Sequence[NightlyTraining]
    ledger: Ledger
    attempts: int
    pool: Pool
    evaluated: list[str] = field(default_factory=list)
    failed: list[Work] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def todo(self) -> list[Work]:
        """All checkpoints without a result but those that failed too often, the newest first. Raises InputError if no training
        can be evaluated."""
        todo: list[Work] = []
        for training in self.trainings:
            if training.refused is None:
                todo += self._todo_of(training)
        reasons = [training.refused for training in self.trainings if training.refused is not None]
        if reasons and len(reasons) == len(self.trainings):
            raise InputError(reasons[0])
        return sorted(todo, key=lambda work: (-work.made, work.training.name, -work.step))

    def _todo_of(self, training: NightlyTraining) -> list[Work]:
        """The same for one training, which is refused if anything is wrong with its store, checkpoints or data set."""
        try:
            works = [Work(training, step, path, made_at(path)) for step, path in training.unmeasured()]
            return [work for work in works if len(self.ledger.failures(*work.key)) < self.attempts]
        except UnansweredError:
            raise
        except Exception as error:
            training.refused = one_line(error)
            self.pool.say(f"nightly: {training.name} cannot be evaluated: {training.refused}")
            return []

    def work(self) -> None:
        """Evaluate what is to do, looking for new checkpoints after each; those that another job holds come last."""
        done: set[tuple[str, str]] = set()
        busy: list[Work] = []
        try:
            while waiting := [work for work in self.todo() if work.key not in done]:
                if not self.attempt(waiting[0], wait=0.0):
                    busy.append(waiting[0])
                done.add(waiting[0].key)
            for work in busy:  # the lease of a dead job has to be watched for a while before it can be taken
                if not self.attempt(work, wait=1.5 * LEASE):
                    self.elsewhere.append(work.title)
        except OutOfTime:
            self.left = [work.title for work in self.todo() if work.key not in done or work in busy]
            self.pool.say(f"nightly: the time is over, {len(self.left)} left for the next night")
        if len(self.failed) > 1 and not self.evaluated:
            self.pool.say("nightly: all failed, so it is hardly the checkpoints' fault: no attempt is counted")
            for work in self.failed:
                self.ledger.end_attempt(*work.key, self.ledger.failures(*work.key)[:-1])

    def attempt(self, work: Work, wait: float) -> bool:
        """Evaluate a checkpoint, unless it has failed too often. Whether its lease could be had, within `wait` seconds. Raises
        OutOfTime."""
        if self.pool.deadline is not None and time.monotonic() >= self.pool.deadline:
            raise OutOfTime
        try:
            with self.ledger.lease("-".join(work.key), wait):
                if work.training.is_measured(work.path):  # by another job, meanwhile
                    return True
                failures = self.ledger.begin_attempt(*work.key)
                if len(failures) < self.attempts:
                    self.pool.say(f"nightly: {work.title}")
                    try:
                        failures = self.evaluate(work, failures)
                    except BaseException:  # the time is over, or MLflow away, or somebody pressed ctrl-C
                        self.ledger.end_attempt(*work.key, failures)
                        raise
                self.ledger.end_attempt(*work.key, failures)
        except Timeout:
            return False
        return True

    def evaluate(self, work: Work, failures: list[str]) -> list[str]:
        """Evaluate a checkpoint. How its failed attempts ended by now, none if this one succeeded. Raises OutOfTime and
        UnansweredError, which are nobody's failure."""
        try:
            checkpoint = open_checkpoint(work.path)
            evaluator = work.training.open_evaluator(checkpoint)
            [evaluation] = evaluator.evaluate([checkpoint], "selection")["train"]
            self.evaluated.append(f"{work.title}: {describe_values(evaluation.values, evaluation.protocol)}")
            mark_lowest(evaluator, work.training.current_evaluations())
            illustrate(evaluator.subject, evaluator.records, checkpoint, self.pool)
        except (OutOfTime, UnansweredError):
            raise
        except Exception as error:
            return self._fail(work, failures, error)
        return []

    def _fail(self, work: Work, failures: list[str], error: Exception) -> list[str]:
        """Say what an attempt failed by. The failures, with this one if it is the checkpoint's."""
        if not is_there(work.path / MANIFEST):
            self.pool.say(f"nightly: {work.title} is skipped: the training removed it")
            return failures
        from ray.exceptions import RayTaskError

        if not isinstance(error, InputError | DivergedError):
            self.pool.say(traceback.format_exc())
        # Samples that are not finite will not be so the next time either.
        times = self.attempts - len(failures) if isinstance(error, DivergedError) else 1
        reason = one_line(error.cause if isinstance(error, RayTaskError) else error)  # not a worker's whole traceback
        failures = [*failures, *[reason] * times]
        self.failed.append(work)
        self.pool.say(f"nightly: {work.title} failed, time {len(failures)} of {self.attempts}: {reason}")
        return failures
