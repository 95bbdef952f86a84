"""Where things lie in a storage: the folder or URL that holds trainings, evaluations, sweeps and nights.

    train/RUN/step-00001000/        checkpoints, with config.json, config.toml and best.json beside them
    ema/RUN-ema-0.15/step-.../      a checkpoint's weights averaged over another length, made after the training
    evaluate/RUN/PROTOCOL/step-.../ numbers of one checkpoint under one protocol
    evaluate/RUN/samples-.../       chunks of samples and their features; pictures-.., likelihood-.. likewise
    sweep/NAME/                     outcomes of a sweep's trials
    nightly/EXPERIMENT/             the night's report and ledger
    calibration/                    which extractors gave known answers
    ray/                            what Ray Train and Ray Tune keep of runs
    mlflow.db, mlartifacts/         MLflow's records, unless a tracking server keeps them

Every such path is made here.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ddpm_core.commit import ReadablePath
from ddpm_core.errors import InputError
from pipelines.storage.locations import Location, check_writable, location

LONGEST_NAME = 200  # bytes of a folder; file systems take 255, and MLflow's artifacts and temporary files add to it


@dataclass(frozen=True)
class Run:
    """A training's place: its checkpoints, and the results that belong to them.

    folder: of its checkpoints. evaluations: of its results, in the storage of whoever evaluates.
    """

    name: str
    folder: Location
    evaluations: Location

    def results(self, protocol: str) -> Location:
        """The numbers under a protocol, given by its fingerprint; in it, a folder for each checkpoint."""
        return self.evaluations / protocol

    def samples(self, fingerprint: str) -> Location:
        """The chunks of samples, by the fingerprint of what decides them."""
        return self.evaluations / f"samples-{fingerprint}"

    def pictures(self, fingerprint: str) -> Location:
        """The parts of pictures, by the fingerprint of what decides them."""
        return self.evaluations / f"pictures-{fingerprint}"

    def likelihood(self, protocol: str) -> Location:
        """The likelihoods under a protocol, given by its fingerprint."""
        return self.evaluations / f"likelihood-{protocol}"


@dataclass(frozen=True)
class Storage:
    """A storage, by its absolute path or URL."""

    root: Location

    def run(self, name: str, folder: Location | None = None) -> Run:
        """The training of a name. folder: of its checkpoints, if they lie outside this storage."""
        return Run(name, self.trainings / name if folder is None else folder, self.root / "evaluate" / name)

    @property
    def trainings(self) -> Location:
        """The folder of all trainings, one in it for each."""
        return self.root / "train"

    def averaged(self, run: str, length: float) -> Location:
        """The checkpoints of a training with an EMA of another length."""
        return self.root / "ema" / f"{run}-ema-{length:g}"

    @property
    def ray(self) -> Location:
        """What Ray Train and Ray Tune keep."""
        return self.root / "ray"

    @property
    def sweeps(self) -> Location:
        """The folder of all sweeps, one in it for each."""
        return self.root / "sweep"

    def sweep(self, name: str) -> Location:
        """The outcomes of a sweep."""
        return self.sweeps / name

    def nights(self, experiment: str) -> Location:
        """The report and ledger of an experiment's nightly evaluation."""
        return self.root / "nightly" / folder_name(experiment)

    def calibration(self, extractor: str) -> Location:
        """The outcome of an extractor's calibration; `extractor` holds its name and sha256."""
        return self.root / "calibration" / f"{folder_name(extractor)}.json"

    @property
    def database(self) -> Location:
        """MLflow's SQLite database."""
        return self.root / "mlflow.db"

    def artifacts(self, experiment: str) -> Location:
        """MLflow's artifacts of an experiment."""
        return self.root / "mlartifacts" / folder_name(experiment)


def folder_name(name: str) -> str:
    """A name that a person chose, as that of one folder: it leads nowhere else, and no file system finds it too long."""
    quoted = quote(name, safe=" ")
    if not quoted.strip("."):
        quoted = quoted.replace(".", "%2E")
    if len(quoted) > LONGEST_NAME:
        quoted = f"{quoted[: LONGEST_NAME - 13]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return quoted


def by_prefix(given: str, known: Sequence[str], what: str) -> str | None:
    """The one of some names that is `given`, or begins with it, or whose fingerprint does: the part behind the last dash. None if
    there is none. Raises InputError if there are several."""
    if given in known or not given:
        return given or None
    matching = [name for name in known if name.startswith(given) or name.rpartition("-")[2].startswith(given)]
    if len(matching) > 1:
        raise InputError(f"{what} {given!r} may be {' or '.join(sorted(matching))}: give more of its name")
    return matching[0] if matching else None


def shards_of(config: Mapping[str, Any], checkpoint: ReadablePath) -> str:
    """The path or URL of the shards that a checkpoint was trained on. config: its training's.

    A storage can be moved and copied with all that is in it: shards that lay in the storage of then are looked for in that of
    now first. Raises InputError if the configuration does not name them.
    """
    shards, storage = config.get("shards"), config.get("storage")  # weights from elsewhere have no storage
    if not isinstance(shards, str):
        raise InputError(
            f"checkpoint {str(checkpoint)!r} does not say in its manifest.json which shards it was trained on: give those to "
            "compare with"
        )
    inside = shards.removeprefix(f"{storage}".rstrip("/") + "/")
    if isinstance(storage, str) and inside != shards:
        moved = checkpoint.parent.parent.parent / inside
        if moved.exists():
            return str(moved)
    return shards


def open_storage(path: str, *, to_write: bool = False) -> Storage:
    """A storage at a path or URL. Raises InputError if it cannot be reached, and `to_write` if nothing can be written there."""
    root = location(path, option="--storage")
    if to_write:
        check_writable(root, "--storage")
    return Storage(root)
