"""The whole workflow at laptop size, through the same commands a cluster runs, on a Ray cluster of its own.

Handwritten digits (scikit-learn's copy of the UCI set) stand in for LSUN: they are written out as LSUN ships its images.
What is finished is not done again; when everything is, nothing is started.
"""

import os
import shlex
import subprocess
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ddpm_core import typed
from ddpm_core.commit import sha256_file, write_json
from ddpm_core.errors import InputError
from ddpm_core.protocol import fingerprint
from pipelines.demo.digits import train_extractor, write_lmdb
from pipelines.demo.local_ray import ray_cluster
from pipelines.runtime.console import EVENTS, EventReader, line_of
from pipelines.runtime.progress import ProgressLine, Say, duration
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.lease import sole_writer

POLL = 0.1  # seconds between looks for what a stage says
ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = "demo"
TRAIN = {"--steps": "1200", "--checkpoint-every": "300", "--log-every": "20", "--workers": "2"}
SWEEP = {"--train.steps": "200", "--train.seed": "1", "--train.log-every": "20", "--train.checkpoint-every": "200"}
PROTOCOL = {
    "--samples": "1000",
    "--chunk-size": "100",
    "--batch-size": "100",
    "--sampler": "ddim",
    "--sampler-steps": "20",
}
SEEDS = {"--seeds": "2"}  # trainings of each schedule: two give a spread between them
NEAREST = "200"  # samples whose nearest training images are looked up
LIKELIHOOD = {"--images": "100", "--chunk-size": "50", "--batch-size": "50"}
COMPRESSION = {"--images": "4", "--theory-steps": "100"}
INDENT = "  "  # of what a stage says, below its title
BAR = 30  # characters of the longest bar of the stages' shares


class Finished(TypedDict):
    """What finished.json holds. files: the sha256 of each file that the demo made, by its path from there."""

    identity: str
    report: str
    best: str
    files: dict[str, str]


@dataclass(frozen=True)
class DemoResult:
    """What a person looks at next."""

    report: Path
    best: str


def demo(storage: Path, say: Say) -> DemoResult:
    """Run every stage that is not finished. Raises InputError with the end of its log if one fails."""
    home = storage / "demo"
    finished = home / "finished.json"
    asked = {"train": TRAIN, "sweep": {**SWEEP, **SEEDS}, "protocol": PROTOCOL, "nearest": NEAREST}
    identity = fingerprint({**asked, "likelihood": LIKELIHOOD, "compression": COMPRESSION})
    result = read_finished(finished, identity)
    if result is not None:
        say("Everything is there: nothing to do.")
        return result
    with sole_writer(home, "the demo in", say):
        return run_stages(storage, home, identity, say)


def run_stages(storage: Path, home: Path, identity: str, say: Say) -> DemoResult:
    """demo(), as the only one who writes to its folder. identity: of what it shall make."""
    source, shards, extractor = home / "digits_train_lmdb", home / "digits", home / "digits.pt"
    finished, report = home / "finished.json", home / "report.html"
    clock = Clock()
    say("[1/9] images: 1,797 handwritten digits as an LSUN-layout LMDB of WebP files")
    if not (source / "data.mdb").is_file():
        write_lmdb(source)
    clock.lap("images")
    events = EventReader(home / "events.jsonl")
    with ray_cluster({EVENTS: str(events.path)}) as environment:
        clock.lap("starting Ray")
        stages = Stages(environment, home / "logs", events, clock, say)
        size = {"--image-size": "8", "--channels": "1", "--name": "digits", "--images-per-shard": "256"}
        stages.run(
            "[2/9] preprocess: LMDB to 8x8 shards, with Ray Data",
            ["python", "jobs/preprocess.py", "--source", str(source), "--output", str(shards), *flat(size)],
        )
        if not extractor.is_file():
            accuracy = train_extractor(extractor, ShardedDataset.open(shards))
            say(f"a small classifier to measure with: {accuracy:.1%} right on digits it has not seen")
        place = {"--storage": str(storage), "--experiment": EXPERIMENT}
        measure = {**PROTOCOL, "--extractor": str(extractor)}
        trained = stages.run(
            "[3/9] train: a submitted job, two data-parallel workers under Ray Train",
            [
                *("ray", "job", "submit", "--working-dir", ".", "--"),
                *("python", "jobs/train_lsun.py", "tiny", "--shards", str(shards), *flat(TRAIN), *flat(place)),
            ],
        )
        run = trained["run"]
        stages.run(
            "[4/9] sweep: linear against quadratic betas under Ray Tune, two seeds each",
            [
                *("python", "jobs/sweep.py", "schedules", "tiny", "--schedules", "linear", "quad", "--no-matched"),
                *("--train.shards", str(shards), *flat(SWEEP), *flat(SEEDS)),
                *(*flat(under("train", place)), *flat(under("evaluate", {**measure, "--pictures": "0"}))),
            ],
        )
        evaluated = stages.run(
            "[5/9] evaluate: every checkpoint, 1,000 samples each, fanned out over workers",
            ["python", "jobs/evaluate.py", "--run", run, "--nearest", NEAREST, *flat(measure), *flat(place)],
        )
        best = f"{run}, {evaluated['best']}"
        stages.run(
            "[6/9] likelihood: bits/dim of 100 images, all 1,000 terms of the bound",
            ["python", "jobs/evaluate.py", "likelihood", "--run", run, *flat(LIKELIHOOD), *flat(place)],
        )
        coding = {"--run": run, "--data": str(shards), "--output": str(home / "curve"), **COMPRESSION}
        stages.run(
            "[7/9] compress: images as files, beside theory, PNG, JPEG and WebP",
            ["python", "jobs/compress.py", "curve", *flat(coding), *flat(place)],
        )
        stages.run(
            "[8/9] report: one HTML file from what MLflow holds",
            ["python", "jobs/report.py", "--output", str(report), *flat(place)],
        )
        say("[9/9] stopping Ray")
    clock.lap("stopping Ray")
    watched = [source / "data.mdb", extractor, report, *shards.iterdir(), *storage.rglob("manifest.json")]
    # Relative to this file's folder: a storage can be moved.
    files = {os.path.relpath(path, home): sha256_file(path) for path in sorted(set(watched)) if path.is_file()}
    write_json(finished, {"identity": identity, "report": report.name, "best": best, "files": files})
    for line in clock.describe():
        say(line)
    return DemoResult(report, best)


def read_finished(path: Path, identity: str) -> DemoResult | None:
    """The result of an earlier demo, if all that it made is still there, byte for byte."""
    try:
        facts = typed.read_json(path, Finished, what="record of the demo", advice="run make demo again")
        whole = all(sha256_file(path.parent / name) == sha256 for name, sha256 in facts["files"].items())
    except (OSError, ValueError):  # damaged: what is there is looked through again
        return None
    return DemoResult(path.parent / facts["report"], facts["best"]) if whole and facts["identity"] == identity else None


def flat(options: Mapping[str, str]) -> list[str]:
    return [word for pair in options.items() for word in pair]


def under(prefix: str, options: Mapping[str, str]) -> dict[str, str]:
    """Options of a nested configuration: --steps as --train.steps."""
    return {f"--{prefix}.{option[2:]}": value for option, value in options.items()}


class Clock:
    """How long each stage took."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, stage: str) -> float:
        """End a stage; the seconds since the last one ended."""
        now = time.monotonic()
        self._last, seconds = now, now - self._last
        self._laps[stage] = seconds
        return seconds

    def describe(self) -> list[str]:
        """A line for each stage with its share of the whole."""
        whole = sum(self._laps.values())
        longest = max(self._laps.values())
        return [
            f"Done in {duration(whole)}:",
            *(
                f"  {stage:<12} {duration(seconds):>5} {seconds / whole:>4.0%}  {'#' * round(BAR * seconds / longest)}".rstrip()
                for stage, seconds in self._laps.items()
            ),
        ]


@dataclass(frozen=True)
class Stages:
    """Runs the demo's commands one after the other, from the repository's root."""

    environment: Mapping[str, str]
    logs: Path
    events: EventReader
    clock: Clock
    say: Say

    def run(self, title: str, command: Sequence[str]) -> dict[str, Any]:
        """Show the command and what it says; its whole output goes to a log. Its result, or InputError with the end of the
        log if it fails."""
        self.say(title)
        # Paths below the repository as a person at its root would type them.
        self.say(f"  $ {shlex.join(word.removeprefix(f'{ROOT}/') for word in command)}")
        result: dict[str, Any] = {}
        name = title.split()[1].rstrip(":")
        log_path = self.logs / f"{title.split(']')[0][1]}-{name}.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=dict(self.environment), stdout=log, stderr=subprocess.STDOUT
            )
            try:
                ended = False
                while not ended:
                    ended = process.poll() is not None  # looked at before the events, so that none is left
                    for event in self.events.read():
                        result |= event.get("result", {})
                        said = line_of(event)
                        indented = textwrap.indent(said, INDENT)
                        self.say(ProgressLine(said.standing, indented) if isinstance(said, ProgressLine) else indented)
                    time.sleep(POLL)
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if process.returncode != 0:
            tail = "\n".join(log_path.read_text().splitlines()[-30:])
            raise InputError(
                f"{title.split('] ')[1].split(':')[0]} failed with exit code {process.returncode}; run make demo again after "
                f"fixing what its log, {str(log_path)!r}, says; it ends:\n{tail}"
            )
        self.say(f"  {duration(self.clock.lap(name))}")
        return result
