"""Checkpoints to samples, numbers and pictures."""

from typing import TYPE_CHECKING

from ddpm_core.exports import lazily

if TYPE_CHECKING:
    from pipelines.evaluate.calibration import calibrate
    from pipelines.evaluate.driver import evaluate
    from pipelines.evaluate.evaluation import compare, read_evaluation

__all__ = ["calibrate", "compare", "evaluate", "read_evaluation"]
__getattr__ = lazily(
    __name__, calibrate="calibration", compare="evaluation", evaluate="driver", read_evaluation="evaluation"
)
