"""Fan-out: checkpoints -> samples -> features -> metrics.

The unit of work is a chunk, a fixed range of sample indices in batches of a fixed size. A worker commits one file a
chunk; the driver takes them in order. The result does not depend on the number of workers, on the order in which they
finish, or on how often the evaluation was killed; running it again makes the chunks that are missing.

A checkpoint is chosen by samples of one noise (`selection`) and its numbers are reported on samples of another
(`report`): the lowest of several noisy numbers is below what it will be the next time.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.commit import MANIFEST, write_json
from ddpm_core.errors import InputError
from ddpm_core.protocol import Protocol
from pipelines.calibration import check_calibrated
from pipelines.chunks import chunk_ranges, load_chunk
from pipelines.evaluation_config import EvaluateConfig
from pipelines.fanout import pool_size
from pipelines.locations import Location, absolute
from pipelines.progress import Say
from pipelines.progression import measure_progress, progress_timesteps
from pipelines.reference import NEIGHBOURS, extractor_for, extractor_spec, open_reference, reference_statistics
from pipelines.results import (
    GRID,
    MIN_CHUNKS,
    ChunkStatistics,
    Evaluation,
    describe_values,
    distance_and_interval,
    measure,
    read_evaluation,
    record,
)
from pipelines.sampling import SampleSettings, sample_checkpoints
from pipelines.saving import mark_best, saved_steps
from pipelines.selection import find_checkpoints, import_weights
from pipelines.shards import ShardedDataset
from pipelines.tracking import TrackedRun, Tracker, default_uri, flatten

WORTH_A_LOOK = 4 * MIN_CHUNKS  # chunks; a person waits long for so many, and a quarter of them has an interval
Purpose = Literal["selection", "report"]
Role = Literal["train", "test"]

__all__ = ["EvaluateConfig", "EvaluateResult", "evaluate"]


@dataclass(frozen=True)
class EvaluateResult:
    """All evaluations of a call by ascending step, on selection noise; that of the best on report noise, where there was
    a choice; and the MLflow run of the former. `test`: those of the same samples against the test set, in the same order,
    the reported one last."""

    run_id: str
    evaluations: tuple[Evaluation, ...]
    reported: Evaluation | None
    test: tuple[Evaluation, ...]

    @property
    def best(self) -> Evaluation:
        """The lowest distance; the earlier checkpoint where two are equal."""
        return min(self.evaluations, key=lambda evaluation: (evaluation.distance, evaluation.step))

    @property
    def indistinguishable(self) -> tuple[Evaluation, ...]:
        """The others whose intervals overlap with the best one's."""
        best = self.best
        return tuple(other for other in self.evaluations if other != best and other.indistinguishable_from(best))

    def describe(self) -> list[str]:
        """The outcome in sentences, the best checkpoint last."""
        best, again = self.best, self.reported
        lines = [f"protocol {best.protocol.fingerprint}: {best.protocol.describe()}"]
        if self.indistinguishable:
            steps = ", ".join(f"{other.step:,}" for other in self.indistinguishable)
            lines.append(f"not to be told apart from the best by their intervals: step {steps}")
        if again is not None:
            lines.append(
                f"the best, on samples it was not chosen by, has {describe_values(again.values, again.protocol)}"
            )
        return [*lines, f"best is step {best.step:,} with {describe_values(best.values, best.protocol)}"]


def evaluate(config: EvaluateConfig, say: Say = lambda line: None) -> EvaluateResult:
    """Evaluate checkpoints, or finish that, or find it done.

    InputError for a run nobody knows, a reference of other images, or an extractor that cannot be had or failed its
    calibration; before anything is sampled.
    """
    evaluator = Evaluator(config, say)
    chosen = evaluator.evaluate(evaluator.checkpoints, "selection")
    run_id, evaluations, test = evaluator.runs["train"].run_id, chosen["train"], chosen.get("test", ())
    result = EvaluateResult(run_id, evaluations, None, test)
    if not config.foreign and config.weights == "ema":
        keep_best(result.best.folder.parent, evaluator.checkpoints[0].path.parent, say)
    if config.report and len(evaluations) > 1:
        best = [checkpoint for checkpoint in evaluator.checkpoints if checkpoint.step == result.best.step]
        again = evaluator.evaluate(best, "report")
        result = EvaluateResult(run_id, evaluations, again["train"][0], (*test, *again.get("test", ())))
    return result


class Evaluator:
    """The checkpoints of a call, what they are compared with, and how."""

    def __init__(self, config: EvaluateConfig, say: Say) -> None:
        self.config, self.say = config, say
        self.storage = storage = absolute(config.storage, option="--storage")
        uri = config.tracking_uri or default_uri(storage)
        if config.foreign:
            self.name, self.checkpoints = import_weights(config.weights, config.reference, storage)
        else:
            self.name, self.checkpoints = find_checkpoints(config.run or "", config.checkpoints, storage, uri)
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
        protocol = self.protocol("train", "selection")  # refuses a sampler that cannot be
        T = first.diffusion_config().num_timesteps
        self.progress = progress_timesteps(T, protocol.sampler_steps, protocol.spacing, config.progress)
        self.uri = uri
        self.runs: dict[Role, TrackedRun] = {}

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
            precision="float32",
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
        """Measure checkpoints against each reference on samples of one purpose, or find that done."""
        protocols = {role: self.protocol(role, purpose) for role in self.references}
        folders = {
            (role, c.step): self.storage / "evaluate" / self.name / protocol.fingerprint / c.path.name
            for role, protocol in protocols.items()
            for c in checkpoints
        }
        samples = self.storage / "evaluate" / self.name / f"samples-{protocols['train'].samples_fingerprint}"
        todo = [
            c
            for c in checkpoints
            if not all(is_of(folders[r, c.step], c, protocols[r], self.progress) for r in protocols)
        ]
        if todo:  # before anything is written: a refusal leaves no run behind
            self.workers = pool_size(self.config.workers, self.config.cpus_per_worker)
        tracker = Tracker(self.uri, self.config.experiment, self.storage)
        train_run = tracker.find("train", self.name)
        for role, protocol in protocols.items():
            self.runs[role] = run = tracker.run(
                "evaluate",
                f"{self.name}-eval-{protocol.fingerprint[:6]}",
                protocol.fingerprint,
                params=flatten(protocol),
                tags={"ddpm.distance": protocol.distance, "ddpm.data": self.references[role].name},
                parent=train_run.run_id if train_run else None,
            )
            run.log_json("protocol.json", asdict(protocol))
        try:
            if todo:
                self._make(todo, samples, folders, protocols)
            evaluations = {
                role: tuple(read_evaluation(folders[role, c.step]) for c in checkpoints) for role in protocols
            }
            for role, found in evaluations.items():
                for checkpoint, evaluation in zip(checkpoints, found, strict=True):
                    record(
                        train_run or self.runs[role],
                        self.runs[role],
                        self.name,
                        checkpoint,
                        evaluation,
                        self.references[role],
                        samples / checkpoint.path.name,
                        self.chunks,
                    )
        except BaseException as error:
            for run in self.runs.values():
                run.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        for run in self.runs.values():
            run.finish()
        if not todo:
            counted = "1 checkpoint" if len(checkpoints) == 1 else f"{len(checkpoints)} checkpoints"
            self.say(f"evaluate: {self.name} is done, {counted} under protocol {protocols['train'].fingerprint}")
        return evaluations

    def _make(
        self,
        checkpoints: Sequence[Checkpoint],
        samples: Path,
        folders: Mapping[tuple[Role, int], Path],
        protocols: Mapping[Role, Protocol],
    ) -> None:
        """Sample what is missing; each checkpoint is measured, beside that, when all of its chunks are there."""
        cpus = self.config.cpus_per_worker
        references = {
            role: reference_statistics(self.references[role], self.spec, cpus, self.say) for role in protocols
        }
        whole = references["train"].statistics

        def finish(checkpoint: Checkpoint) -> None:
            for role, protocol in protocols.items():
                values = measure(
                    samples / checkpoint.path.name, self.chunks, protocol, references[role], self.extractor
                )
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
                self._settings(protocols["train"]),
                self.spec,
                workers=self.workers,
                cpus_per_worker=cpus,
                say=self.say,
            ):
                if len(done) == len(self.chunks):
                    futures.append(beside.submit(finish, checkpoint))
                elif len(self.chunks) >= WORTH_A_LOOK and len(done) in quarters(len(self.chunks)):
                    futures.append(beside.submit(look, checkpoint, done))
            for future in futures:
                future.result()

    def _settings(self, protocol: Protocol) -> SampleSettings:
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
            images_to_keep=GRID,
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


def keep_best(evaluated: Path, run: Location, say: Say) -> None:
    """Have the training run keep its best checkpoint, by all finished evaluations of a protocol."""
    found = [read_evaluation(path.parent) for path in evaluated.glob(f"step-*/{MANIFEST}")]
    there = set(saved_steps(run))
    best = min(found, key=lambda evaluation: (evaluation.distance, evaluation.step))
    if best.step in there:
        mark_best(run, best.step)
    else:
        say(f"evaluate: the best checkpoint, step {best.step:,}, is no longer kept: give the run a larger --keep-last")
