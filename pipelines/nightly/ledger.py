"""What nights leave for each other on disk: leases on what is in work, failed attempts, and the alarms that were told."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import SoftFileLease

from ddpm_core.commit import write_json
from pipelines.nightly.alarms import Alarm

LEASE = 60.0  # seconds after the last sign of life of whoever holds one


@dataclass(frozen=True)
class Notes:
    """Those of an experiment's nights of one configuration, in a folder that all of them share."""

    folder: Path

    @contextlib.contextmanager
    def lease(self, what: str, wait: float | None) -> Iterator[None]:
        """Held by one job at a time, and lost by one that died. wait: seconds, None for as long as it takes.
        filelock.Timeout where another held it all the while; a dead one's on another machine is free after LEASE."""
        path = self.folder / "leases" / f"{what}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with SoftFileLease(path, lease_duration=LEASE).acquire(timeout=-1 if wait is None else wait):
            yield

    def failures(self, run: str, checkpoint: str) -> list[str]:
        """How a checkpoint's failed attempts ended."""
        return list(self._attempts(run, checkpoint)["failures"])

    def begin(self, run: str, checkpoint: str) -> list[str]:
        """Note that an attempt is under way, under its lease; how the failed ones ended, that of a killed job among them."""
        found = self._attempts(run, checkpoint)
        failures = [*found["failures"], *(["the job was killed in the middle of it"] if found["under_way"] else [])]
        write_json(self._path(run, checkpoint), {"failures": failures, "under_way": True})
        return failures

    def end(self, run: str, checkpoint: str, failures: list[str]) -> None:
        """Note how an attempt has ended: all failures so far, none where it did well."""
        if failures:
            write_json(self._path(run, checkpoint), {"failures": failures, "under_way": False})
        else:
            self._path(run, checkpoint).unlink(missing_ok=True)

    def told(self) -> set[str]:
        """The keys of the standing alarms that a person was told of."""
        try:
            return set(json.loads(self._told.read_text(encoding="utf-8"))["told"])
        except FileNotFoundError:
            return set()

    def untold(self, alarms: Sequence[Alarm], runs: set[str]) -> list[Alarm]:
        """Which of the alarms that stand for these trainings a person was not told of. One that is over is forgotten, so
        that it is told again should it come back."""
        told, standing = self.told(), {alarm.key for alarm in alarms}
        over = {key for key in told - standing if key.split()[1] in runs}
        if over:
            self.tell(told - over)
        return [alarm for alarm in alarms if alarm.key not in told]

    def tell(self, keys: set[str]) -> None:
        """Note that these, and no others, were told."""
        write_json(self._told, {"told": sorted(keys)})

    @property
    def _told(self) -> Path:
        return self.folder / "told.json"

    def _path(self, run: str, checkpoint: str) -> Path:
        return self.folder / "attempts" / run / f"{checkpoint}.json"

    def _attempts(self, run: str, checkpoint: str) -> dict[str, list[str]]:
        try:
            found: dict[str, list[str]] = json.loads(self._path(run, checkpoint).read_text(encoding="utf-8"))
            return found
        except FileNotFoundError:
            return {"failures": [], "under_way": []}
