"""The result of a likelihood measurement: values with an interval, and the curves of Fig. 5, under a protocol."""

from dataclasses import dataclass, field
from typing import Literal

from typing_extensions import TypedDict

from ddpm_core import typed
from ddpm_core.commit import MANIFEST, check_manifest, damaged_manifest, read_manifest
from ddpm_core.configs import LATER, Cdf, FixedVariance, Weights
from ddpm_core.ranges import Count, Positive
from ddpm_core.records import BPD, CI_HIGH
from pipelines.storage.locations import Location

WHAT = "likelihood"


class LikelihoodManifest(TypedDict):
    """What a likelihood's manifest.json holds."""

    step: Count[int]
    weights_sha256: str
    num_timesteps: Positive[int]
    protocol: typed.JsonObject
    values: dict[str, float]
    curves: dict[str, list[float]] | None


@dataclass(frozen=True, kw_only=True)
class LikelihoodProtocol:
    """Everything but the checkpoint that the numbers depend on.

    images: how many. strata: of the timesteps, for an estimate; None for the full bound.
    """

    images: int
    strata: int | None
    seed: int
    weights: Weights
    cdf: Cdf
    batch_size: int
    data: str
    data_sha256: str
    clip_denoised: Literal[True] = True
    precision: Literal["float32"] = "float32"
    var_type: FixedVariance | None = field(default=None, metadata=LATER)  # in place of the run's own


@dataclass(frozen=True)
class Likelihood:
    """A finished measurement of one checkpoint. values, curves: those of `merge_chunks`."""

    step: int
    weights_sha256: str
    num_timesteps: int
    protocol: LikelihoodProtocol
    values: dict[str, float]
    curves: dict[str, list[float]] | None

    def describe(self) -> str:
        bpd, half_width = self.values[BPD], self.values[BPD + CI_HIGH] - self.values[BPD]
        strata, T = self.protocol.strata, self.num_timesteps
        how = f"full bound of {T:,} terms" if strata is None else f"estimate from {1 + strata:,} of {T:,} terms"
        if self.protocol.var_type is not None:
            how += f", sigma^2 {self.protocol.var_type}"
        images = f"{self.protocol.images:,} images of {self.protocol.data}"
        return f"step {self.step:,}: {bpd:.3f} +- {half_width:.3f} bits/dim on {images}, {how}"


def read_likelihood(folder: Location, weights_sha256: str) -> Likelihood | None:
    """The finished measurement of these weights; None if there is none. Raises InputError if it is damaged."""
    if not (folder / MANIFEST).is_file():
        return None
    facts = check_manifest(folder, read_manifest(folder, what=WHAT), LikelihoodManifest, what=WHAT)
    try:
        protocol = typed.build(LikelihoodProtocol, facts["protocol"])
        if lacking := sorted({BPD, BPD + CI_HIGH} - facts["values"].keys()):
            raise ValueError(f"values lacks {lacking[0]}")
    except ValueError as error:
        raise damaged_manifest(folder, error, WHAT) from error
    if facts["weights_sha256"] != weights_sha256:
        return None
    return Likelihood(facts["step"], weights_sha256, facts["num_timesteps"], protocol, facts["values"], facts["curves"])
