"""What a number depends on. A metric is only comparable with another of the same protocol."""

import hashlib
import json
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal

from ddpm_core.configs import LATER, FixedVariance, Method, Precision, Purpose, Spacing, Split, Weights, identity

INCEPTION = "inception-2015-12-05"
NEIGHBOURS = 10_000  # samples and reference images whose features are kept themselves, for kernels and neighbourhoods


def fingerprint(value: Any) -> str:
    """12 hex digits that name a configuration: the sha256 of its canonical JSON. Dataclasses count as their
    fields; the order of keys does not matter."""
    plain = identity(value) if is_dataclass(value) and not isinstance(value, type) else value
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def metric_name(metric: str, extractor: str) -> str:
    """Only the 2015-12-05 Inception network makes a metric the literature's; a Frechet distance (fd) is a FID then."""
    if extractor == INCEPTION:
        return "fid" if metric == "fd" else metric
    return f"{metric}_{extractor}"


def weights_name(weights: Weights) -> str:
    """As people write it."""
    return "EMA" if weights == "ema" else weights


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything besides the checkpoint that a Frechet distance or Inception score depends on."""

    num_samples: int
    seed: int
    purpose: Purpose = "selection"  # noise to choose a checkpoint by, or to report its numbers
    sampler: Method
    sampler_steps: int
    spacing: Spacing
    clip_denoised: bool
    weights: Weights
    batch_size: int  # float32 features depend on it in the last digits
    precision: Precision
    rounding: Literal["half-up"] = "half-up"
    extractor: str
    extractor_sha256: str
    resize: str
    reference: str
    reference_sha256: str
    reference_images: int
    against: Split = "train"  # what the reference is to the run
    neighbours: int = NEIGHBOURS  # how many samples and reference images kernels and neighbourhoods look at, at most
    eta: float = field(default=0.0, metadata=LATER)  # of DDIM
    var_type: FixedVariance | None = field(default=None, metadata=LATER)  # in place of the run's own
    ema_length: float | None = field(default=None, metadata=LATER)  # sigma_rel of an EMA made after the training

    @property
    def fingerprint(self) -> str:
        return fingerprint(self)

    @property
    def samples_fingerprint(self) -> str:
        """A fingerprint of the samples and their features alone: measured against two references, they are the same."""
        of_reference = ("reference", "reference_sha256", "reference_images", "against", "neighbours")
        return fingerprint({key: value for key, value in identity(self).items() if key not in of_reference})

    def metric(self, name: str) -> str:
        """A metric's name under this protocol: the distance from a test set is not that from the training set."""
        return metric_name(name, self.extractor) + ("_test" if self.against == "test" else "")

    @property
    def distance(self) -> str:
        """The Frechet distance's name."""
        return self.metric("fd")

    @property
    def score(self) -> str:
        """The name of the Inception score (exp of the mean KL from the marginal)."""
        return self.metric("is")

    def describe(self) -> str:
        return (
            f"{self.num_samples:,} samples, {self.sampler} with {self.sampler_steps:,} steps ({self.spacing})"
            f"{f', eta {self.eta:g}' if self.eta else ''}{f', sigma^2 {self.var_type}' if self.var_type else ''}, "
            f"{weights_name(self.weights)} weights"
            f"{f' of length {self.ema_length:g}' if self.ema_length else ''}, "
            f"x0 {'clipped' if self.clip_denoised else 'not clipped'}, rounded {self.rounding} to 8 bits, "
            f"{self.precision}, batch {self.batch_size}, seed {self.seed} for {self.purpose}; features from {self.extractor} "
            f"(sha256 {self.extractor_sha256[:8]}, resize {self.resize}); against {self.reference_images:,} images of "
            f"{self.reference} ({'training' if self.against == 'train' else 'test'} set, sha256 {self.reference_sha256[:8]})"
            f"{'' if self.neighbours == NEIGHBOURS else f', KID, precision and recall of {self.neighbours:,}'}"
        )
