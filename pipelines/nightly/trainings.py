"""A training as the nightly evaluation sees it: its checkpoints, and what they were measured to be."""

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

from ddpm_core.checkpoint import Checkpoint, checkpoint_name, open_checkpoint
from ddpm_core.errors import InputError
from pipelines.checkpoints.store import saved_steps
from pipelines.evaluate.driver import Evaluator
from pipelines.evaluate.evaluation import Evaluation, read_evaluations
from pipelines.evaluate.records import Records
from pipelines.evaluate.subject import open_subject
from pipelines.nightly.config import NightlyConfig
from pipelines.runtime.fan_out import Pool
from pipelines.storage.layout import Storage, open_storage
from pipelines.storage.locations import Location
from pipelines.tracking.queries import Training
from pipelines.tracking.tracker import Tracker

AT_ONCE = 8  # checkpoints that are looked at together


def read_if_there(path: Location) -> Checkpoint | None:
    """The checkpoint at a path, None if it cannot be read."""
    with contextlib.suppress(InputError):
        return open_checkpoint(path)
    return None


@dataclass(eq=False)
class NightlyTraining:
    """A training of the experiment. record: what MLflow knows of it. evaluator: of its checkpoints, None until there is a
    checkpoint by which it could be opened. refused: why its checkpoints cannot be evaluated as asked, if so."""

    record: Training
    config: NightlyConfig
    storage: Storage
    tracker: Tracker
    pool: Pool
    evaluator: Evaluator | None = None
    refused: str | None = None
    # What has been looked at: a result does not change or go away while a night lasts.
    _measured: set[int] = field(default_factory=set)
    _read: list[Evaluation] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.record.name

    @cached_property
    def folder(self) -> Location:
        """The folder of its checkpoints: in the night's storage, else where MLflow says that the training keeps them."""
        here = self.storage.run(self.name).folder
        if here.is_dir():
            return here
        recorded = open_storage(self.record.storage).run(self.name).folder
        if not recorded.is_dir():
            self.pool.say(
                f"nightly: {self.name} keeps its checkpoints in {str(recorded)!r} by MLflow's records, where nothing is, and "
                f"none are in {str(here)!r}: give the --storage that holds them"
            )
        return recorded

    def open_evaluator(self, checkpoint: Checkpoint) -> Evaluator:
        """The evaluator of its checkpoints, of which this is any. Raises InputError if they cannot be evaluated as asked."""
        if self.evaluator is None:
            run = self.storage.run(self.name, self.folder)
            subject = open_subject(self.config.evaluation(self.name), run, (checkpoint,), self.storage, self.pool.say)
            self.evaluator = Evaluator(subject, Records(subject, lambda: self.tracker), self.pool)
        return self.evaluator

    def unmeasured(self) -> list[tuple[int, Location]]:
        """(step, path) of each checkpoint that has no result, by ascending step."""
        paths = {step: self.folder / checkpoint_name(step) for step in saved_steps(self.folder)}
        self._measured |= self._measured_among([path for step, path in paths.items() if step not in self._measured])
        return [(step, path) for step, path in paths.items() if step not in self._measured]

    def is_measured(self, path: Location) -> bool:
        """Whether a checkpoint has its result, in the storage and in MLflow. False if it cannot be read."""
        return bool(self._measured_among([path]))

    def _measured_among(self, paths: Sequence[Location]) -> set[int]:
        """The steps of those that have their result. MLflow is asked once, and the storage for several at a time: each answer of
        an object store takes long."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            checkpoints = [checkpoint for checkpoint in pool.map(read_if_there, paths) if checkpoint is not None]
            if not checkpoints:
                return set()
            evaluator = self.open_evaluator(checkpoints[0])
            logged = evaluator.records.logged_steps()
            known = [checkpoint for checkpoint in checkpoints if checkpoint.step in logged]
            finished = pool.map(lambda checkpoint: evaluator.subject.is_measured(checkpoint, "selection"), known)
            return {checkpoint.step for checkpoint, measured in zip(known, finished, strict=True) if measured}

    def evaluations(self) -> list[Evaluation]:
        """All its results under the nightly protocol, by ascending step; those of deleted checkpoints too."""
        if self.evaluator is None:
            return []
        subject = self.evaluator.subject
        found = read_evaluations(subject.results(subject.protocol("train", "selection")), self._read)
        # Others may be of weights before, and are replaced when the checkpoint is measured.
        self._read = [each for each in found if each.step in self._measured]
        return found

    def current_evaluations(self) -> list[Evaluation]:
        """Those whose checkpoint is still there, with the weights that were measured."""
        there, evaluations = set(saved_steps(self.folder)), self.evaluations()
        new = [each.folder.name for each in evaluations if each.step in there - self._measured]
        self._measured |= self._measured_among([self.folder / name for name in new])
        return [each for each in evaluations if each.step in there & self._measured]
