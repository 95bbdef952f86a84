"""A training seen from its driver: what worker 0 tells goes to MLflow and to the person who watches."""

import base64
import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_core.checkpoint import Checkpoint, checkpoint_name, open_checkpoint
from ddpm_core.errors import InputError
from ddpm_core.records import (
    DIVERGED,
    GRAD_NORM,
    IMAGES_PER_SECOND,
    LEARNING_RATE,
    LOSS,
    PEAK_TAG,
    STEP,
    UTILISATION,
    training_metric,
    training_samples_path,
)
from pipelines.runtime.messages import Listener, MessageQueue
from pipelines.runtime.progress import Progress, Say, WarningLine, duration
from pipelines.storage.locations import Location
from pipelines.storage.node_cache import cache_folder
from pipelines.tracking.outbox import Entry, Unsent
from pipelines.tracking.run import TrackedRun, now
from pipelines.train.config import TrainConfig
from pipelines.train.stop import StopRequest

SILENCE = 300.0  # seconds without a message of the workers after which a person is told so


def unsent_folder(folder: Location) -> Path:
    """Where the entries of a run wait for MLflow: in its folder, or in this user's cache if that lies in an object store."""
    if isinstance(folder, Path):
        return folder / "unsent"
    return cache_folder() / f"unsent-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"


def unsent_entries(run: TrackedRun, folder: Location, say: Say) -> Unsent:
    """What `run` shall have, its checkpoints lying in `folder`; first of all what a killed driver left, sent here and now.
    Raises InputError if MLflow does not answer for minutes."""
    logged: set[int] = set()  # known to MLflow, perhaps from a checkpoint and at another time

    def send(entry: Entry) -> None:
        match entry["call"]:
            case "records":
                log_missing(run, entry["records"], logged, entry["timestamp"])
            case "bytes":
                run.log_bytes(entry["name"], base64.b64decode(entry["data"]))
            case "tags":
                run.set_tags(entry["tags"])
            case "json":
                run.log_json(entry["name"], entry["value"])
            case "model":
                try:
                    checkpoint = open_checkpoint(folder / checkpoint_name(entry["step"]))
                except InputError:  # deleted meanwhile, to make room
                    return
                run.model_of(folder.name, checkpoint)

    unsent = Unsent(unsent_folder(folder), send, say)
    if unsent:
        logged |= logged_steps(run)
        unsent.flush()
        logged.clear()
    return unsent


def logged_steps(run: TrackedRun) -> set[int]:
    """The steps whose records MLflow has."""
    return run.logged_steps(training_metric(LOSS))


def log_missing(
    run: TrackedRun, records: Iterable[Mapping[str, float]], logged: set[int], timestamp: int | None = None
) -> None:
    """Log the records of steps that are not `logged`, by MLflow's names."""
    run.log_records(
        (
            {key if key == STEP else training_metric(key): value for key, value in record.items()}
            for record in records
            if record[STEP] not in logged
        ),
        timestamp,
    )


def synchronise(run: TrackedRun, name: str, checkpoints: Sequence[Checkpoint]) -> None:
    """Give MLflow what the checkpoints know and it does not: a killed driver's records, a model for each checkpoint."""
    if checkpoints:
        log_missing(run, [record for record in checkpoints[-1].history if STEP in record], logged_steps(run))
    for checkpoint in checkpoints:
        run.model_of(name, checkpoint)


class Follower(Listener):
    """Takes worker 0's messages off the queue while the training runs, and passes a request to stop on to the workers. It
    never waits for MLflow. logged: the steps whose records MLflow has."""

    def __init__(
        self,
        name: str,
        config: TrainConfig,
        outbox: MessageQueue,
        stop: MessageQueue,
        request: StopRequest,
        unsent: Unsent,
        logged: set[int],
        say: Say,
    ) -> None:
        super().__init__(outbox)
        self.name, self.config, self.say = name, config, say
        self.stop, self.request, self.unsent = stop, request, unsent
        self.diverged: Mapping[str, Any] | None = None
        self.stopped_at: int | None = None
        self._logged = logged
        self._progress: Progress | None = None
        self._passed_on = False
        # When there was last a message, and the longest time between two.
        self._heard, self._longest = time.monotonic(), 0.0

    def between(self) -> None:
        """Pass a request to stop on, and tell a person of a long silence."""
        if self.request.asked.is_set() and not self._passed_on:
            self._passed_on = True
            self.say("train: stopping, when the newest step is saved; once more to stop at once")
            self.stop.put("stop")
        silent = time.monotonic() - self._heard
        if silent > max(SILENCE, 3.0 * self._longest):
            self._longest = silent  # the next time it is said after three times as long
            self.say(
                WarningLine(
                    f"train: nothing was heard of the workers for {duration(silent)}: they still start, or one of them "
                    "is stopped or starved; `ray list actors` shows where they are"
                )
            )

    def take(self, message: Mapping[str, Any]) -> None:
        """Pass on what a message of worker 0 tells."""
        kind = message["kind"]
        waited, self._heard = time.monotonic() - self._heard, time.monotonic()
        # How long a start takes says nothing of steps.
        self._longest = 0.0 if kind == "start" else max(self._longest, waited)
        if kind == "start":
            step, workers = message["step"], message["workers"]
            self.say(f"train: {self.name} from step {step:,} on {workers} worker{'' if workers == 1 else 's'}")
            self._progress = Progress("train", self.config.steps, "steps", self.say, done=step, workers=workers)
            if message["micro_batch"] != self.config.execution.micro_batch:
                self.say(f"train: {message['micro_batch']} images at a time, since no more fit the GPU")
            if message["peak"] is not None:
                self.say(f"train: the peak of a GPU is taken to be {message['peak']}")
                self.unsent.put({"call": "tags", "tags": {PEAK_TAG: message["peak"]}})
        elif kind == "record":
            record = message["record"]
            if record["step"] not in self._logged:
                self._logged.add(record["step"])
                self.unsent.put({"call": "records", "records": [record], "timestamp": now()})
            if self._progress is not None:
                self._progress.at(int(record["step"]), describe_record(record), record[LOSS])
        elif kind == "samples":
            data = base64.b64encode(message["png"]).decode("ascii")
            self.unsent.put({"call": "bytes", "name": training_samples_path(message["step"]), "data": data})
        elif kind == "saved":
            self.unsent.put({"call": "model", "step": message["step"]})
        elif kind == "diverged":
            self.diverged = message
            self.unsent.put({"call": "json", "name": DIVERGED, "value": message["facts"]})
        elif kind == "stopped":
            self.stopped_at = int(message["step"])


def describe_record(record: Mapping[str, float]) -> str:
    """What a person watches, on one line."""
    parts = [
        f"{record[IMAGES_PER_SECOND]:,.0f} images/s",
        f"loss {record[LOSS]:.4f}",
        f"gradient {record[GRAD_NORM]:.3g}",
        f"lr {record[LEARNING_RATE]:.2g}",
    ]
    if UTILISATION in record:
        parts.append(f"{record[UTILISATION]:.0%} of peak")
    return " | ".join(parts)
