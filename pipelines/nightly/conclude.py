"""What a night's numbers mean: alarms first, then aliases, both in MLflow."""

import contextlib
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from filelock import Timeout

from ddpm_core.checkpoint import checkpoint_name, open_checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.errors import InputError
from ddpm_core.records import ALARM_TAG, TRAIN
from pipelines.checkpoints.store import made_at, saved_steps
from pipelines.evaluate.driver import Evaluator
from pipelines.evaluate.evaluation import Evaluation
from pipelines.evaluate.illustrate import illustrate
from pipelines.nightly.alarms import Alarm, degenerate, regressions, stopped
from pipelines.nightly.champion import crown
from pipelines.runtime.fan_out import OutOfTime
from pipelines.runtime.locations import Location
from pipelines.tracking.queries import Training

if TYPE_CHECKING:
    from pipelines.nightly.night import Night


@dataclass(frozen=True)
class Morning:
    """After the work. Trouble with one training does not hide what is to be told of the others."""

    night: "Night"

    def conclude(self) -> None:
        """Find alarms and tell MLflow, then move aliases."""
        alarms: list[Alarm] = []
        groups: dict[str, list[tuple[Evaluator, Evaluation]]] = {}  # by protocol
        for training in self.night.trainings:
            with self.spared(training.name):
                alarms += self.alarms(training)
                evaluator = self.night.evaluators.get(training.name)
                if evaluator is not None:
                    protocol = evaluator.subject.protocol("train", "selection")
                    kept = [(evaluator, evaluation) for evaluation in self.night.kept(training, evaluator)]
                    groups.setdefault(protocol.fingerprint, []).extend(kept)
        for name, reason in self.night.refused.items():
            alarms.append(Alarm(f"refused {name} {reason}", name, f"cannot be evaluated: {reason}", of_training=True))
        self.night.result.alarms = alarms
        self.night.result.new = self.night.notes.untold(alarms, {training.name for training in self.night.trainings})
        for training in self.night.trainings:
            with self.spared(training.name):
                self.tag(training, [alarm for alarm in alarms if alarm.run == training.name])
        for group in groups.values():
            if group:
                with self.spared(group[0][1].protocol.fingerprint):
                    champion = crown(
                        self.night.tracker, self.night.config.experiment, self.night.storage, group, self.night.say
                    )
                    self.night.result.champions += [champion] if champion else []

    @contextlib.contextmanager
    def spared(self, what: str) -> Iterator[None]:
        """What goes wrong in the block is told, and the night goes on."""
        try:
            yield
        except OutOfTime:
            pass
        except Exception as error:
            self.night.say(traceback.format_exc() if not isinstance(error, InputError) else f"nightly: {what}: {error}")

    def alarms(self, training: Training) -> list[Alarm]:
        """All that stand for a training."""
        folder = self.night.folder(training)
        steps = saved_steps(folder)
        last = (steps[-1], made_at(folder / checkpoint_name(steps[-1]))) if steps else None
        found = [*stopped(training, last, time.time(), self.night.config.quiet_hours), *self.given_up(training, steps)]
        evaluator = self.night.evaluators.get(training.name)
        if evaluator is not None:
            evaluations = self.night.evaluations(evaluator)
            found += regressions(training.name, evaluations, self.night.config.worse_by)
            for evaluation in evaluations[-1:]:
                values = {**evaluation.values, **self.memorized(evaluator, folder, evaluation)}
                found += degenerate(training.name, replace(evaluation, values=values))
        return found

    def memorized(self, evaluator: Evaluator, folder: Location, evaluation: Evaluation) -> dict[str, float]:
        """What the neighbours of an evaluation's samples say, where they are asked for and there was time."""
        path = folder / evaluation.folder.name
        if self.night.config.nearest and (path / MANIFEST).is_file():
            with contextlib.suppress(OutOfTime):
                memorization = illustrate(
                    evaluator.subject, evaluator.records, open_checkpoint(path), evaluator.pool, evaluator.say
                )
                return {} if memorization is None else memorization.values(evaluation.protocol)
        return {}

    def given_up(self, training: Training, steps: list[int]) -> Iterator[Alarm]:
        """Of checkpoints that failed too often."""
        for step in steps:
            if self.night.is_given_up(training, step):
                failures = self.night.notes.failures(training.name, checkpoint_name(step))
                text = (
                    f"step {step:,} is left alone after {len(failures)} failed attempts; mend this and give --attempts "
                    f"{len(failures) + self.night.config.attempts}: {failures[-1]}"
                )
                yield Alarm(f"failed {training.name} {step}", training.name, text)

    def tag(self, training: Training, alarms: list[Alarm]) -> None:
        """Alarms as tags of the MLflow runs that they are about; those that are over are cleared."""
        evaluator = self.night.evaluators.get(training.name)
        measured = evaluator.records.find(evaluator.subject.protocol("train", "selection")) if evaluator else None
        trained = self.night.tracker.find(TRAIN, training.name)
        of_training = [alarm.text for alarm in alarms if alarm.of_training or measured is None]
        of_checkpoints = [alarm.text for alarm in alarms if not alarm.of_training]
        for run, texts in ((trained, of_training), (measured, of_checkpoints)):
            if run is not None:
                run.set_tags({ALARM_TAG: "; ".join(texts)})

    def confirm(self) -> None:
        """Measure what is best on samples that it was not chosen by, in what time is left."""
        for number, champion in enumerate(self.night.result.champions if self.night.config.report else []):
            with (
                self.spared(champion.run),
                contextlib.suppress(Timeout),
                self.night.notes.lease(f"{champion.run}-report", 0.0),
            ):
                [again] = champion.evaluator.evaluate([champion.checkpoint], "report")["train"]
                self.night.result.champions[number] = replace(champion, again=again)
