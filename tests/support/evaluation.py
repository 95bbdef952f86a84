"""What two evaluations must have in common."""

from pipelines.evaluate.evaluation import Evaluation


def numbers(evaluations: tuple[Evaluation, ...]) -> list[dict[str, float]]:
    """What must be equal to the last bit: every value but the speed."""
    return [
        {key: value for key, value in evaluation.values.items() if key != "samples_per_second"}
        for evaluation in evaluations
    ]
