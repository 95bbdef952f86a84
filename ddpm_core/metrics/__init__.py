"""The evaluation's metrics: FID and FID-infinity, Inception score, KID, precision and recall; intervals of
all.

All are torchmetrics metrics that merge in any order, save (`statistics()`) and start from what was saved
(`merge_state`). They work on features and logits, whichever extractor made them (`features.py`).
"""

from ddpm_core.metrics.extrapolation import ExtrapolatedFrechetDistance
from ddpm_core.metrics.frechet import FeatureStatistics, FeatureSums, FrechetDistance, frechet_distance
from ddpm_core.metrics.inception_score import InceptionScore
from ddpm_core.metrics.intervals import (
    ChunkSums,
    extrapolation_interval,
    frechet_interval,
    kid_interval,
    proportion_interval,
    recall_interval,
    score_interval,
)
from ddpm_core.metrics.kernel_distance import KernelDistance
from ddpm_core.metrics.precision_recall import PrecisionRecall

__all__ = [
    "ChunkSums",
    "ExtrapolatedFrechetDistance",
    "FeatureStatistics",
    "FeatureSums",
    "FrechetDistance",
    "InceptionScore",
    "KernelDistance",
    "PrecisionRecall",
    "extrapolation_interval",
    "frechet_distance",
    "frechet_interval",
    "kid_interval",
    "proportion_interval",
    "recall_interval",
    "score_interval",
]
