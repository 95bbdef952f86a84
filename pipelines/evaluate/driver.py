"""Fan-out: checkpoints -> samples -> features -> metrics.

The unit of work is a chunk, a fixed range of sample indices in batches of a fixed size. A worker commits one file a
chunk; the driver takes them in order. The result does not depend on the number of workers, on the order in which they
finish, or on how often the evaluation was killed; running it again makes the chunks that are missing.

A checkpoint is chosen by samples of one noise (`selection`) and its numbers are reported on samples of another
(`report`): the lowest of several noisy numbers is below what it will be the next time.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from ddpm_core.commit import MANIFEST
from pipelines.checkpoints.saver import mark_best, saved_steps
from pipelines.checkpoints.select import chosen_checkpoints
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.evaluation import Evaluation, describe_values, read_evaluation
from pipelines.evaluate.evaluator import Evaluator
from pipelines.evaluate.illustrate import illustrate
from pipelines.runtime.fan_out import Pool
from pipelines.runtime.locations import Location
from pipelines.runtime.progress import Say

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
    with Pool(config.workers, config.cpus_per_worker, say) as pool:
        evaluator = Evaluator(config, *chosen_checkpoints(config), pool, say)
        chosen = evaluator.evaluate(evaluator.checkpoints, config.noise)
        evaluations, test = chosen["train"], chosen.get("test", ())
        result = EvaluateResult(evaluator.run_ids[config.noise], evaluations, None, test)
        if config.noise == "selection" and not config.foreign and config.weights == "ema":
            keep_best(result.best.folder.parent, evaluator.checkpoints[0].path.parent, say)
        best = next(checkpoint for checkpoint in evaluator.checkpoints if checkpoint.step == result.best.step)
        if not (best.path / MANIFEST).is_file():
            return result
        if config.noise == "selection" and config.report and len(evaluations) > 1:
            again = evaluator.evaluate([best], "report")
            result = replace(result, reported=again["train"][0], test=(*test, *again.get("test", ())))
        illustrate(evaluator, best)
        return result


def keep_best(evaluated: Path, run: Location, say: Say) -> None:
    """Have the training run keep its best checkpoint, by all finished evaluations of a protocol."""
    found = [read_evaluation(path.parent) for path in evaluated.glob(f"step-*/{MANIFEST}")]
    there = set(saved_steps(run))
    best = min(found, key=lambda evaluation: (evaluation.distance, evaluation.step))
    if best.step in there:
        mark_best(run, best.step)
    else:
        say(f"evaluate: the best checkpoint, step {best.step:,}, is no longer kept: give the run a larger --keep-last")
