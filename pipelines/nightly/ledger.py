"""What nights leave for each other on disk: leases on work, failed attempts, and which alarms were delivered."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from ddpm_core import typed
from pipelines.nightly.alarms import Alarm
from pipelines.nightly.config import NightlyConfig
from pipelines.storage.layout import open_storage
from pipelines.storage.lease import lease
from pipelines.storage.locations import Location, commit_json, delete


class Attempts(TypedDict):
    """How a checkpoint's failed attempts ended, and whether another was begun."""

    failures: list[str]
    under_way: bool


class Delivered(TypedDict):
    """Which alarms were delivered: key -> the training's name. Earlier versions kept the keys alone."""

    told: dict[str, str] | list[str]


def open_ledger(config: NightlyConfig) -> "Ledger":
    """What nights share that evaluate the same experiment alike."""
    return Ledger(open_storage(config.storage).nights(config.experiment) / config.identity)


@dataclass(frozen=True)
class Ledger:
    """The files of an experiment's nights of one configuration, in a folder that all of their jobs see."""

    folder: Location

    @contextlib.contextmanager
    def lease(self, name: str, wait: float | None) -> Iterator[None]:
        """Held by one job at a time; that of a dead job on another machine is free after LEASE. wait: seconds, None for as
        long as it takes. Raises filelock.Timeout if another job held it all the while."""
        path = self.folder / "leases" / f"{name}.lock"
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
        held = lease(path)
        held.acquire(timeout=-1 if wait is None else wait)
        try:
            yield
        finally:
            held.release()

    # Attempts at a checkpoint: {"failures": [how each failed one ended], "under_way": whether another was begun}.

    def failures(self, run: str, checkpoint: str) -> list[str]:
        """How a checkpoint's failed attempts ended."""
        return list(self._attempts(run, checkpoint)["failures"])

    def begin_attempt(self, run: str, checkpoint: str) -> list[str]:
        """Record that an attempt is under way; its lease must be held. How the failed ones ended: if one is under way already,
        its job was killed."""
        attempts = self._attempts(run, checkpoint)
        killed = ["the job was killed in the middle of it"] if attempts["under_way"] else []
        failures = [*attempts["failures"], *killed]
        commit_json(self._attempts_file(run, checkpoint), {"failures": failures, "under_way": True})
        return failures

    def end_attempt(self, run: str, checkpoint: str, failures: Sequence[str]) -> None:
        """Record that none is under way. failures: how all failed ones ended, none if the last succeeded."""
        if failures:
            commit_json(self._attempts_file(run, checkpoint), {"failures": [*failures], "under_way": False})
        else:
            delete(self._attempts_file(run, checkpoint))

    def _attempts(self, run: str, checkpoint: str) -> "Attempts":
        advice = "delete it, and the checkpoint is tried as if for the first time"
        try:
            return typed.read_json(
                self._attempts_file(run, checkpoint), Attempts, what="record of attempts", advice=advice
            )
        except FileNotFoundError:
            return {"failures": [], "under_way": False}

    def _attempts_file(self, run: str, checkpoint: str) -> Location:
        return self.folder / "attempts" / run / f"{checkpoint}.json"

    # Alarms.

    def delivered(self) -> dict[str, str]:
        """The standing alarms that were delivered: key -> the training's name."""
        try:
            advice = "delete it, and alarms that stand are delivered again"
            stored = typed.read_json(self._delivered_file, Delivered, what="record of alarms", advice=advice)["told"]
        except FileNotFoundError:
            return {}
        # Earlier versions kept the keys alone, whose second word is the training.
        return (
            dict(stored)
            if isinstance(stored, dict)
            else {key: key.partition(" ")[2].partition(" ")[0] for key in stored}
        )

    def set_delivered(self, alarms: Mapping[str, str]) -> None:
        """Record that these, and no others, were delivered."""
        commit_json(self._delivered_file, {"told": dict(alarms)})

    def new_alarms(self, alarms: Sequence[Alarm], runs: set[str]) -> list[Alarm]:
        """Which of the alarms that stand for these trainings were not delivered. Those that stand no more are forgotten, and
        delivered again if they come back."""
        delivered, standing = self.delivered(), {alarm.key for alarm in alarms}
        kept = {key: run for key, run in delivered.items() if key in standing or run not in runs}
        if kept != delivered:
            self.set_delivered(kept)
        return [alarm for alarm in alarms if alarm.key not in delivered]

    @property
    def _delivered_file(self) -> Location:
        return self.folder / "told.json"
