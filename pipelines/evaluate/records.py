"""What an evaluation leaves in MLflow: a run for each protocol, numbers on it and on the checkpoints' models, pictures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from ddpm_core import images
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.protocol import Protocol
from pipelines.evaluate.evaluation import Evaluation
from pipelines.evaluate.measure import first_images
from pipelines.evaluate.subject import Role, Subject
from pipelines.runtime.fan_out import OutOfTime
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import Tracker, flatten


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
        return self.tracker.find("train", self.subject.run.name)

    def run_name(self, protocol: Protocol) -> str:
        """The name of the MLflow run that holds a protocol's numbers."""
        return f"{self.subject.run.name}-eval-{protocol.fingerprint[:6]}"

    def find(self, protocol: Protocol) -> TrackedRun | None:
        """The MLflow run that holds a protocol's numbers, if there is one."""
        return self.tracker.find("evaluate", self.run_name(protocol))

    @contextmanager
    def open(self, protocols: Mapping[Role, Protocol]) -> Iterator[dict[Role, TrackedRun]]:
        """The MLflow runs of some protocols, which end as the block does."""
        runs: dict[Role, TrackedRun] = {}
        for role, protocol in protocols.items():
            runs[role] = self.tracker.run(
                "evaluate",
                self.run_name(protocol),
                protocol.fingerprint,
                params=flatten(protocol),
                tags={"ddpm.distance": protocol.distance, "ddpm.data": self.subject.references[role].name},
                parent=self.owner.run_id if self.owner else None,
            )
            runs[role].log_json("protocol.json", asdict(protocol))
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

    def log_evaluation(self, run: TrackedRun, checkpoint: Checkpoint, evaluation: Evaluation, samples: Path) -> None:
        """A finished evaluation with its chain, and the grid of its first samples, which lie in `samples`."""
        if evaluation.progress:
            run.log_json(f"progress/{checkpoint.path.name}.json", evaluation.progress)
        if self.log(run, checkpoint, evaluation.protocol, evaluation.values):
            log_samples(run, evaluation, samples, self.subject.chunks)

    def is_logged(self, checkpoint: Checkpoint) -> bool:
        """Whether the numbers of a checkpoint's selection noise are here, against every reference."""
        for role in self.subject.references:
            protocol = self.subject.protocol(role, "selection")
            run = self.find(protocol)
            if run is None or checkpoint.step not in run.logged_steps(protocol.distance):
                return False
        return True

    def model(self, checkpoint: Checkpoint, protocol: Protocol) -> tuple[str, str]:
        """(run id, model id) of a checkpoint that was evaluated under a protocol."""
        owner = self.owner or self.find(protocol)
        assert owner is not None  # it was evaluated
        return owner.run_id, owner.model_of(self.subject.run.name, checkpoint, protocol.weights)


def log_samples(run: TrackedRun, evaluation: Evaluation, samples: Path, chunks: Sequence[range]) -> None:
    """The grid of a checkpoint's first samples into MLflow."""
    shown = first_images(samples, chunks)
    columns = min(16, len(shown))
    run.log_bytes(f"samples/{evaluation.folder.name}.png", images.encode_png(images.tile(shown, columns)))
    grid = {
        "tile": list(shown.shape[1:3]),
        "columns": columns,
        "count": len(shown),
        "indices": f"0..{len(shown) - 1}",
        "seed": evaluation.protocol.seed,
    }
    run.log_json("samples/grid.json", grid)
