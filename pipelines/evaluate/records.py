"""What an evaluation leaves in MLflow: a run for each protocol, numbers on it and on the checkpoints' models, pictures."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.png import encode_png, tile
from ddpm_core.protocol import Protocol
from ddpm_core.records import (
    CHECKPOINT,
    DATA_TAG,
    DISTANCE_TAG,
    EVALUATE,
    IMAGES_SEEN,
    KID,
    PRECISION,
    PROTOCOL,
    PROTOCOL_TAG,
    PURPOSE_TAG,
    RECALL,
    RUN_TAG,
    SAMPLES_LAYOUT,
    SAMPLES_TAG,
    STEP,
    TRAIN,
    best_metric,
    chain_path,
    curve_metric,
    flatten,
    newest_metric,
    ranking_place,
    samples_path,
)
from pipelines.evaluate.evaluation import Evaluation, describe_values, read_evaluations
from pipelines.evaluate.subject import Role, Subject
from pipelines.runtime.fan_out import OutOfTime
from pipelines.storage.locations import Location
from pipelines.tracking.origin import DataInput, data_input
from pipelines.tracking.run import TrackedRun, note_tags
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.ui import image, report_link, share_ranking, update_standings


class Records:
    """The MLflow runs of what is evaluated. open_tracker: called when it is first needed."""

    def __init__(self, subject: Subject, open_tracker: Callable[[], Tracker]) -> None:
        self.subject, self._open_tracker = subject, open_tracker

    @cached_property
    def tracker(self) -> Tracker:
        return self._open_tracker()

    @cached_property
    def owner(self) -> TrackedRun | None:
        """The training's MLflow run, which owns the checkpoints' models."""
        return self.tracker.find(TRAIN, self.subject.run.name)

    def reference(self, role: Role) -> DataInput:
        """What the samples are measured against, as an input of MLflow's runs."""
        dataset = self.subject.references[role]
        return data_input(dataset.name, dataset.sha256, dataset.card, dataset.path, "evaluation")

    def run_name(self, protocol: Protocol) -> str:
        """The name of the MLflow run that holds a protocol's numbers."""
        return f"{self.subject.run.name}-eval-{protocol.fingerprint[:6]}"

    def find(self, protocol: Protocol) -> TrackedRun | None:
        """The MLflow run that holds a protocol's numbers, if there is one."""
        return self.tracker.find(EVALUATE, self.run_name(protocol))

    @contextmanager
    def open(self, protocols: Mapping[Role, Protocol]) -> Iterator[dict[Role, TrackedRun]]:
        """The MLflow runs of some protocols, which end as the block does."""
        runs: dict[Role, TrackedRun] = {}
        for role, protocol in protocols.items():
            runs[role] = self.tracker.run(
                EVALUATE,
                self.run_name(protocol),
                protocol.fingerprint,
                params=flatten(protocol),
                tags={
                    RUN_TAG: self.subject.run.name,
                    DISTANCE_TAG: protocol.distance,
                    DATA_TAG: self.subject.references[role].name,
                },
                parent=self.owner.run_id if self.owner else None,
                data=self.reference(role),
            )
            runs[role].log_json(PROTOCOL, asdict(protocol))
        try:
            yield runs
        except BaseException as error:
            for run in runs.values():
                run.finish("KILLED" if isinstance(error, KeyboardInterrupt | OutOfTime) else "FAILED")
            raise
        for run in runs.values():
            run.finish()

    def log(self, run: TrackedRun, checkpoint: Checkpoint, protocol: Protocol, values: Mapping[str, float]) -> bool:
        """A checkpoint's numbers, on the protocol's run and on the checkpoint's model; whether they are new there."""
        return run.log_result(
            self.owner or run,
            self.subject.run.name,
            checkpoint,
            protocol.weights,
            # The distance last: if it is there, so is all else.
            {name: values[name] for name in sorted(values, key=lambda name: name == protocol.distance)},
            dataset=self.subject.references[protocol.against].name,
            protocol=protocol.fingerprint,
        )

    def log_evaluation(
        self, run: TrackedRun, checkpoint: Checkpoint, evaluation: Evaluation, samples: Location
    ) -> None:
        """A finished evaluation with its chain, and the grid of its first samples, which lie in `samples`."""
        if evaluation.progress:
            run.log_json(chain_path(checkpoint.step), evaluation.progress)
        if self.log(run, checkpoint, evaluation.protocol, evaluation.values):
            log_samples(run, evaluation, samples, self.subject.chunks)

    def rank(
        self,
        run: TrackedRun,
        protocol: Protocol,
        checkpoints: Sequence[Checkpoint],
        evaluations: Sequence[Evaluation],
    ) -> None:
        """Give each checkpoint a run of its own under the protocol, by which MLflow's table of runs ranks checkpoints, and
        the training's run the curve, the best and the newest of them. run: the protocol's."""
        for checkpoint, evaluation in zip(checkpoints, evaluations, strict=True):
            self._log_checkpoint(run, checkpoint, evaluation)
        update_standings(self.tracker, protocol.fingerprint, protocol.distance)
        if self.owner is not None:
            self._log_on_training(self.owner, run, protocol, evaluations)

    def _log_checkpoint(self, of_protocol: TrackedRun, checkpoint: Checkpoint, evaluation: Evaluation) -> None:
        protocol, training, step = evaluation.protocol, self.subject.run.name, checkpoint.step
        run = self.tracker.run(
            CHECKPOINT,
            f"step {step:,} of {training} ({protocol.fingerprint[:6]})",  # the UI cuts long names at their end
            protocol.fingerprint,
            params={"training": training, "step": str(step), **flatten(protocol)},
            tags={
                PROTOCOL_TAG: protocol.fingerprint,
                PURPOSE_TAG: protocol.purpose,
                RUN_TAG: training,
                DATA_TAG: protocol.reference,
                **note_tags(samples_image(of_protocol, step)),
            },
            parent=self.owner.run_id if self.owner else None,
            data=self.reference(protocol.against),
        )
        batch_size = checkpoint.config.get("optim", {}).get("batch_size")
        images_seen = {} if batch_size is None else {IMAGES_SEEN: float(step * batch_size)}
        run.log_values({STEP: float(step), **images_seen, **evaluation.values}, step)
        run.finish()

    def _log_on_training(
        self, training: TrackedRun, of_protocol: TrackedRun, protocol: Protocol, known: Sequence[Evaluation]
    ) -> None:
        """The curve of all results under the protocol that are there, of checkpoints that are deleted too; the best and the
        newest of them, if no protocol of more samples gave those. known: some of them."""
        by_step = read_evaluations(self.subject.results(protocol), known)
        curve = curve_metric(protocol.distance, protocol.fingerprint)  # one run has the curves of several protocols
        logged = training.logged_steps(curve)
        training.log_records(
            {STEP: evaluation.step, curve: evaluation.distance}
            for evaluation in by_step
            if evaluation.step not in logged
        )
        of_best = int(training.tags().get(SAMPLES_TAG, 0))
        # The best is measured again, alone, for its report: that says nothing of the others.
        enough = protocol.num_samples > of_best or (protocol.num_samples == of_best and protocol.purpose == "selection")
        if not enough or protocol.against != "train":
            return
        values = {newest_metric(protocol.distance): by_step[-1].distance}
        finite = [evaluation for evaluation in by_step if math.isfinite(evaluation.distance)]
        if finite:
            best = min(finite, key=lambda evaluation: (evaluation.distance, evaluation.step))
            training.set_note(self._note(of_protocol, best, by_step))
            values |= {best_metric(protocol.distance): best.distance, best_metric(STEP): float(best.step)}
        # MLflow shows the value of the highest step, which another protocol may have come to before: so all are of step 0.
        training.log_values(values, 0)
        training.set_tags({PROTOCOL_TAG: protocol.fingerprint, SAMPLES_TAG: str(protocol.num_samples)})

    def _note(self, of_protocol: TrackedRun, best: Evaluation, evaluations: Sequence[Evaluation]) -> str:
        """What MLflow shows above a training: the best of its checkpoints, its samples, and where to read on."""
        protocol = best.protocol
        close = [f"{other.step:,}" for other in evaluations if other != best and other.indistinguishable_from(best)]
        place = ranking_place(self.tracker.experiment_id, protocol.fingerprint)
        parts = [
            f"**Step {best.step:,} is the best of {len(evaluations)}: {describe_values(best.values, protocol)}.**",
            f"Not to be told apart from it by their intervals: step {', '.join(close)}." if close else "",
            f"[All checkpoints by {protocol.distance}]({place})",
            report_link(self.tracker),  # before the picture: MLflow folds a long note
            samples_image(of_protocol, best.step),
            f"Protocol {protocol.fingerprint}: {protocol.describe()}.",
        ]
        return "\n\n".join(part for part in parts if part)

    def link(self, protocol: Protocol) -> str:
        """To the table of all checkpoints under the protocol in MLflow's UI, the lowest distance first."""
        others = [protocol.score, *(protocol.metric(name) for name in (KID, PRECISION, RECALL))]
        return share_ranking(self.tracker, protocol.fingerprint, protocol.distance, others)

    def logged_steps(self) -> set[int]:
        """The steps whose numbers of selection noise are here, against every reference."""
        found = []
        for role in self.subject.references:
            protocol = self.subject.protocol(role, "selection")
            run = self.find(protocol)
            found.append(set() if run is None else run.logged_steps(protocol.distance))
        return set.intersection(*found)

    def model(self, checkpoint: Checkpoint, protocol: Protocol) -> tuple[str, str]:
        """(run id, model id) of a checkpoint that was evaluated under a protocol."""
        owner = self.owner or self.find(protocol)
        assert owner is not None  # it was evaluated
        return owner.run_id, owner.model_of(self.subject.run.name, checkpoint, protocol.weights)


def samples_image(of_protocol: TrackedRun, step: int) -> str:
    """The grid of a checkpoint's first samples, for a note."""
    return image(of_protocol.run_id, samples_path(step), f"The first samples of step {step:,}")


def log_samples(run: TrackedRun, evaluation: Evaluation, samples: Location, chunks: Sequence[range]) -> None:
    """The grid of a checkpoint's first samples into MLflow."""
    from pipelines.evaluate.measure import first_images  # here: with torchmetrics

    shown = first_images(samples, chunks)
    columns = min(16, len(shown))
    run.log_bytes(samples_path(evaluation.step), encode_png(tile(shown.numpy(), columns)))
    grid = {
        "tile": list(shown.shape[1:3]),
        "columns": columns,
        "count": len(shown),
        "indices": f"0..{len(shown) - 1}",
        "seed": evaluation.protocol.seed,
    }
    run.log_json(SAMPLES_LAYOUT, grid)
