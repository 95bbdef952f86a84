"""Checkpoints to samples, numbers and pictures."""

from typing import TYPE_CHECKING

from ddpm_core.exports import lazily

if TYPE_CHECKING:
    from pipelines.evaluate.calibration import calibrate
    from pipelines.evaluate.driver import describe_grid, describe_lengths, evaluate, evaluate_grid, evaluate_lengths
    from pipelines.evaluate.evaluation import compare, read_evaluation

__all__ = [
    "calibrate",
    "compare",
    "describe_grid",
    "describe_lengths",
    "evaluate",
    "evaluate_grid",
    "evaluate_lengths",
    "read_evaluation",
]
__getattr__ = lazily(
    __name__,
    calibrate="calibration",
    compare="evaluation",
    describe_grid="driver",
    describe_lengths="driver",
    evaluate="driver",
    evaluate_grid="driver",
    evaluate_lengths="driver",
    read_evaluation="evaluation",
)
