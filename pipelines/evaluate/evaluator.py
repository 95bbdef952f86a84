"""The evaluation of one run's checkpoints: what they are compared with, their samples, numbers and pictures."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Literal

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.commit import MANIFEST, write_json
from ddpm_core.errors import InputError
from ddpm_core.protocol import Protocol
from pipelines.evaluate.calibrate import check_calibrated
from pipelines.evaluate.chain import measure_progress, progress_timesteps
from pipelines.evaluate.config import EvaluateConfig, Purpose
from pipelines.evaluate.evaluation import (
    GRID,
    MIN_CHUNKS,
    ChunkStatistics,
    Evaluation,
    describe_values,
    distance_and_interval,
    look_at,
    measure,
    read_evaluation,
    record_samples,
)
from pipelines.evaluate.reference import NEIGHBOURS, extractor_for, extractor_spec, open_reference, reference_statistics
from pipelines.evaluate.worker import SampleSettings, sample_checkpoints
from pipelines.runtime.chunks import chunk_ranges, load_chunk
from pipelines.runtime.fan_out import OutOfTime, Pool
from pipelines.runtime.locations import absolute
from pipelines.runtime.progress import Say
from pipelines.shards.dataset import ShardedDataset
from pipelines.tracking.tracker import TrackedRun, Tracker, default_uri, flatten

WORTH_A_LOOK = 4 * MIN_CHUNKS  # chunks; a person waits long for so many, and a quarter of them has an interval
Role = Literal["train", "test"]


class Evaluator:
    """The checkpoints of a call, what they are compared with, and how."""

    def __init__(
        self,
        config: EvaluateConfig,
        name: str,
        checkpoints: Sequence[Checkpoint],
        pool: Pool,
        say: Say,
        tracker: Tracker | None = None,
    ) -> None:
        """name: the run's, whose checkpoints these are; at least one, all of one configuration. tracker: opened when it is
        needed, unless given."""
        self.config, self.name, self.checkpoints, self.pool, self.say = config, name, checkpoints, pool, say
        self.storage = storage = absolute(config.storage, option="--storage")
        self.uri, self._tracker = config.tracking_uri or default_uri(storage), tracker
        first = self.checkpoints[0]
        given = config.reference or first.config["shards"]
        self.references: dict[Role, ShardedDataset] = {"train": open_reference(given, "--reference", first, self.name)}
        if config.test_reference is not None:
            self.references["test"] = open_reference(config.test_reference, "--test-reference", first, self.name)
        self.spec = extractor_spec(config.extractor)
        self.extractor = extractor_for(self.spec, self.references["train"])
        check_calibrated(self.extractor, storage)
        if config.samples <= self.extractor.dim:
            say(
                f"evaluate: {config.samples:,} samples for {self.extractor.dim:,} features: the covariance is singular and "
                "the distance far above its value at large n"
            )
        self.chunks = chunk_ranges(config.samples, config.chunk_size)
        protocol = self.protocol("train", config.noise)  # refuses a sampler that cannot be
        T = first.diffusion_config().num_timesteps
        self.progress = progress_timesteps(T, protocol.sampler_steps, protocol.spacing, config.progress)
        self.run_ids: dict[Purpose, str] = {}  # MLflow's, of the samples compared with the training set

    @cached_property
    def tracker(self) -> Tracker:
        """Where results go."""
        return self._tracker or Tracker(self.uri, self.config.experiment, self.storage)

    @cached_property
    def owner(self) -> TrackedRun | None:
        """The training's MLflow run, which owns the checkpoints' models."""
        return self.tracker.find("train", self.name)

    def run_name(self, protocol: Protocol) -> str:
        """The name of the MLflow run that holds a protocol's numbers."""
        return f"{self.name}-eval-{protocol.fingerprint[:6]}"

    def folder(self, protocol: Protocol) -> Path:
        """Of a protocol's results, one in it for each checkpoint."""
        return self.storage / "evaluate" / self.name / protocol.fingerprint

    def is_measured(self, checkpoint: Checkpoint, purpose: Purpose) -> bool:
        """Whether finished evaluations of these very weights are there, against every reference."""
        protocols = [self.protocol(role, purpose) for role in self.references]
        name = checkpoint.path.name
        return all(is_of(self.folder(protocol) / name, checkpoint, protocol, self.progress) for protocol in protocols)

    def samples(self, purpose: Purpose) -> Path:
        """The folder of the samples of one noise, one in it for each checkpoint."""
        return self.storage / "evaluate" / self.name / f"samples-{self.protocol('train', purpose).samples_fingerprint}"

    def protocol(self, role: Role, purpose: Purpose) -> Protocol:
        """What the numbers will depend on. InputError for a sampler that cannot be."""
        config, dataset = self.config, self.references[role]
        T = self.checkpoints[0].diffusion_config().num_timesteps
        steps = config.sampler_steps or T
        if steps > T:
            raise InputError(f"--sampler-steps is {steps}: the run's schedule has {T} timesteps")
        return Protocol(
            num_samples=config.samples,
            seed=config.seed,
            purpose=purpose,
            sampler=config.sampler,
            sampler_steps=steps,
            spacing=config.spacing if steps < T else "uniform",
            clip_denoised=True,
            weights="raw" if config.weights == "raw" else "ema",
            batch_size=min(config.batch_size, config.chunk_size),
            precision=config.precision,
            extractor=self.extractor.name,
            extractor_sha256=self.extractor.sha256,
            resize=self.extractor.resize,
            reference=dataset.name,
            reference_sha256=dataset.sha256,
            reference_images=len(dataset),
            against=role,
            neighbours=NEIGHBOURS,
        )

    def evaluate(self, checkpoints: Sequence[Checkpoint], purpose: Purpose) -> dict[Role, tuple[Evaluation, ...]]:
        """Measure checkpoints against each reference on samples of one purpose, or find that done. One that the training
        removes meanwhile is left out; InputError where none remains."""
        protocols = {role: self.protocol(role, purpose) for role in self.references}
        folders = {
            (role, c.step): self.folder(protocol) / c.path.name
            for role, protocol in protocols.items()
            for c in checkpoints
        }
        samples = self.samples(purpose)
        todo = [c for c in checkpoints if not self.is_measured(c, purpose)]
        if todo:
            _ = self.pool.size  # before anything is written: a refusal leaves no run behind
        with self.tracked(protocols) as runs:
            if todo:
                self._make(todo, samples, folders, protocols)
                checkpoints = [
                    c for c in checkpoints if c not in todo or (folders["train", c.step] / MANIFEST).is_file()
                ]
            if not checkpoints:
                raise InputError(
                    f"run {self.name!r} has lost every checkpoint that was to be evaluated: give its training a larger "
                    "--keep-last"
                )
            evaluations = {
                role: tuple(read_evaluation(folders[role, c.step]) for c in checkpoints) for role in protocols
            }
            for role, found in evaluations.items():
                for checkpoint, evaluation in zip(checkpoints, found, strict=True):
                    if evaluation.progress:
                        runs[role].log_json(f"progress/{checkpoint.path.name}.json", evaluation.progress)
                    if self.log(runs[role], checkpoint, evaluation.protocol, evaluation.values):
                        record_samples(runs[role], evaluation, samples / checkpoint.path.name, self.chunks)
        if not todo:
            counted = "1 checkpoint" if len(checkpoints) == 1 else f"{len(checkpoints)} checkpoints"
            self.say(f"evaluate: {self.name} is done, {counted} under protocol {protocols['train'].fingerprint}")
        return evaluations

    @contextmanager
    def tracked(self, protocols: Mapping[Role, Protocol]) -> Iterator[dict[Role, TrackedRun]]:
        """The MLflow runs of some protocols, which end as the block does."""
        runs: dict[Role, TrackedRun] = {}
        for role, protocol in protocols.items():
            runs[role] = self.tracker.run(
                "evaluate",
                self.run_name(protocol),
                protocol.fingerprint,
                params=flatten(protocol),
                tags={"ddpm.distance": protocol.distance, "ddpm.data": self.references[role].name},
                parent=self.owner.run_id if self.owner else None,
            )
            runs[role].log_json("protocol.json", asdict(protocol))
        self.run_ids[protocols["train"].purpose] = runs["train"].run_id
        try:
            yield runs
        except BaseException as error:
            for run in runs.values():
                run.finish("KILLED" if isinstance(error, KeyboardInterrupt | OutOfTime) else "FAILED")
            raise
        for run in runs.values():
            run.finish()

    def tracked_run(self, protocol: Protocol) -> TrackedRun | None:
        """The MLflow run that holds a protocol's numbers, if there is one."""
        return self.tracker.find("evaluate", self.run_name(protocol))

    def is_logged(self, checkpoint: Checkpoint) -> bool:
        """Whether MLflow has the numbers of a checkpoint's selection noise, against every reference."""
        for role in self.references:
            protocol = self.protocol(role, "selection")
            run = self.tracked_run(protocol)
            values = read_evaluation(self.folder(protocol) / checkpoint.path.name).values
            if run is None or checkpoint.step not in run.logged_steps(list(values)[-1]):  # that is logged last
                return False
        return True

    def model(self, checkpoint: Checkpoint, protocol: Protocol) -> tuple[str, str]:
        """(run id, model id) of a checkpoint in MLflow."""
        owner = self.owner or self.tracked_run(protocol)
        assert owner is not None  # it was evaluated
        return owner.run_id, owner.model_of(self.name, checkpoint, protocol.weights)

    def log(self, run: TrackedRun, checkpoint: Checkpoint, protocol: Protocol, values: Mapping[str, float]) -> bool:
        """A checkpoint's numbers into MLflow; whether they are new there."""
        dataset = self.references[protocol.against]
        return run.log_result(
            self.owner or run,
            self.name,
            checkpoint,
            protocol.weights,
            values,
            dataset=dataset.name,
            protocol=protocol.fingerprint,
        )

    def _make(
        self,
        checkpoints: Sequence[Checkpoint],
        samples: Path,
        folders: Mapping[tuple[Role, int], Path],
        protocols: Mapping[Role, Protocol],
    ) -> None:
        """Sample what is missing; each checkpoint is measured, beside that, when all of its chunks are there."""
        references = {
            role: reference_statistics(dataset, self.spec, self.config.cpus_per_worker, self.say)
            for role, dataset in self.references.items()
        }
        whole = references["train"].statistics

        def finish(checkpoint: Checkpoint) -> None:
            for role, protocol in protocols.items():
                values = measure(
                    samples / checkpoint.path.name, self.chunks, protocol, references[role], self.extractor
                )
                values |= look_at(samples / checkpoint.path.name, self.chunks, self.references[role])
                facts = {
                    "step": checkpoint.step,
                    "protocol": asdict(protocol),
                    "values": values,
                    "weights_sha256": checkpoint.weights_sha256(protocol.weights),
                    "progress": measure_progress(
                        samples / checkpoint.path.name,
                        self.chunks,
                        self.progress,
                        references[role].statistics,
                    ),
                }
                write_json(folders[role, checkpoint.step] / MANIFEST, facts)
                self.say(f"evaluate: step {checkpoint.step:,} has {describe_values(values, protocol)}")

        def look(checkpoint: Checkpoint, done: Sequence[range]) -> None:
            features = [load_chunk(samples / checkpoint.path.name, indices)[0]["features"] for indices in done]
            value, interval = distance_and_interval(ChunkStatistics(features), whole)
            if interval is not None:
                self.say(
                    f"evaluate: step {checkpoint.step:,} has {protocols['train'].distance} {value:.4g} ({interval[0]:.4g} to "
                    f"{interval[1]:.4g}) on its first {sum(map(len, done)):,} samples; it falls with their number"
                )

        with ThreadPoolExecutor(1) as beside:
            futures: list[Future[None]] = []
            for checkpoint, done in sample_checkpoints(
                checkpoints,
                self.chunks,
                samples,
                self.settings(protocols["train"]),
                self.spec,
                self.pool,
                self.say,
            ):
                if len(done) == len(self.chunks):
                    futures.append(beside.submit(finish, checkpoint))
                elif len(self.chunks) >= WORTH_A_LOOK and len(done) in quarters(len(self.chunks)):
                    futures.append(beside.submit(look, checkpoint, done))
            for future in futures:
                future.result()

    def settings(self, protocol: Protocol) -> SampleSettings:
        height, width, channels = self.references["train"].shape
        return SampleSettings(
            shape=(channels, height, width),
            method=protocol.sampler,
            steps=protocol.sampler_steps,
            spacing=protocol.spacing,
            weights=protocol.weights,
            seed=protocol.seed,
            purpose=protocol.purpose,
            batch_size=protocol.batch_size,
            precision=self.config.precision,
            compile=self.config.compile,
            images_to_keep=max(GRID, self.config.nearest),
            progress=self.progress,
        )


def is_of(folder: Path, checkpoint: Checkpoint, protocol: Protocol, progress: Sequence[int]) -> bool:
    """Whether a finished evaluation of these very weights is there, with the points of the chain that are asked for."""
    try:
        facts = json.loads((folder / MANIFEST).read_text())
        there = [point["t"] for point in facts["progress"]]
        same = facts["weights_sha256"] == checkpoint.weights_sha256(protocol.weights)
        return bool(same and (not progress or there == list(progress)))
    except (OSError, ValueError, KeyError):
        return False


def quarters(chunks: int) -> set[int]:
    """After how many chunks a person is told the distance so far."""
    return {chunks * part // 4 for part in (1, 2, 3)}
