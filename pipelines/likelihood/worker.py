"""Chunks of a likelihood measurement: what a worker computes of some images, and what all of them come to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ddpm_core import rng
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.configs import Weights
from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.gaussian import Cdf
from ddpm_core.likelihood import Bound, bound_term, estimate_bound, rate_distortion, variational_bound
from ddpm_core.pixel_range import SCALE
from ddpm_core.precision import full_float32
from ddpm_core.verdicts import mean_interval
from pipelines.checkpoints.network import NetworkHolder
from pipelines.runtime.chunks import load_chunk, save_chunk
from pipelines.shards.dataset import ShardedDataset


@dataclass(frozen=True, kw_only=True)
class LikelihoodProtocol:
    """Everything besides the checkpoint that the numbers depend on."""

    images: int
    strata: int | None  # None: the full bound
    seed: int
    weights: Weights
    cdf: Cdf
    batch_size: int
    data: str
    data_sha256: str
    clip_denoised: Literal[True] = True
    precision: Literal["float32"] = "float32"


@dataclass(frozen=True)
class LikelihoodChunk:
    """Positions among the chosen images, those images' numbers, and the folder that the file goes to."""

    indices: range
    images: Tensor
    checkpoint: Checkpoint
    folder: Path


class LikelihoodWorker:
    """Holds the data set and one checkpoint's network; makes chunks, each of which can be made again."""

    def __init__(self, protocol: LikelihoodProtocol, dataset: ShardedDataset) -> None:
        self.protocol, self.dataset = protocol, dataset
        self.networks = NetworkHolder(protocol.weights)
        self.device = self.networks.device

    @torch.no_grad()
    def run(self, chunk: LikelihoodChunk) -> bool:
        """Make and commit one chunk."""
        with full_float32(self.device):  # a GPU's convolutions would round to TF32
            model = self.networks.of(chunk.checkpoint)
            parts = [self._measure(model, numbers) for numbers in chunk.images.split(self.protocol.batch_size)]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        weights = chunk.checkpoint.weights_sha256(self.protocol.weights)
        save_chunk(chunk.folder, chunk.indices, tensors, {"weights_sha256": weights})
        return True

    def _measure(self, model: tuple[GaussianDiffusion, DenoiseFn], numbers: Tensor) -> dict[str, Tensor]:
        """float64: prior [b] with terms and mse [b,T], or, estimated, with total, decoder and mse [b], the last at x_1."""
        indices, protocol = numbers.to(self.device), self.protocol
        x = self.dataset.images(numbers.numpy()).to(self.device)
        noise = rng.SampleNoise(protocol.seed, indices, tuple(x.shape[1:]), purpose="likelihood")
        cdf = protocol.cdf
        if protocol.strata is None:
            bound = variational_bound(*model, x, noise, cdf=cdf)
            return {"prior": bound.prior, "terms": bound.terms, "mse": bound.mse}
        drawn = estimate_bound(*model, x, noise, seed=protocol.seed, indices=indices, strata=protocol.strata, cdf=cdf)
        _, mse = bound_term(*model, x, torch.zeros_like(indices), noise(0), cdf=cdf)
        return {"prior": drawn.prior, "total": drawn.total, "decoder": drawn.decoder, "mse": mse}


def merge(folder: Path, chunks: Sequence[range]) -> tuple[dict[str, float], dict[str, list[float]] | None]:
    """(values, curves) of a whole measurement; holds a chunk, four numbers an image and three a timestep. bpd: L, whose
    standard error and 95 % interval are for images like these: they cover their choice, the noise and the drawn terms.
    rate_bpd: L_1 + .. + L_T. distortion_bpd: L_0. prior_bpd: L_T. rmse: of the x_0 predicted from x_1, on 0..255."""
    columns: dict[str, list[Tensor]] = {"total": [], "prior": [], "decoder": [], "mse": []}
    sums: dict[str, Tensor] = {}
    for positions in chunks:
        stored, _ = load_chunk(folder, positions)
        if "terms" in stored:
            for name, rows in [("terms", stored["terms"]), ("mse", stored["mse"]), ("root", stored["mse"].sqrt())]:
                for row in rows:  # one by one: the bits do not depend on where chunks end
                    sums[name] = sums[name].add_(row) if name in sums else row.clone()
            stored["total"] = Bound(stored["terms"], stored["prior"], stored["mse"]).total
            stored |= {"decoder": stored["terms"][:, 0].clone(), "mse": stored["mse"][:, 0].clone()}  # no views
        for name, column in columns.items():
            column.append(stored[name])
    total, prior, decoder, mse = (torch.cat(column) for column in columns.values())
    n, mean = len(total), float(total.mean())
    low, high = mean_interval(total.tolist())
    values = {
        "bpd": mean,
        "bpd_se": float(total.std()) / math.sqrt(n),
        "bpd_ci_low": low,
        "bpd_ci_high": high,
        "rate_bpd": float((total - decoder).mean()),
        "distortion_bpd": float(decoder.mean()),
        "prior_bpd": float(prior.mean()),
        "rmse": SCALE * float(mse.mean().sqrt()),
    }
    return values, curves_of({name: each / n for name, each in sums.items()}, prior.mean()) if sums else None


def curves_of(means: Mapping[str, Tensor], prior: Tensor) -> dict[str, list[float]]:
    """Fig. 5 and Table 4 over the paper's t = 1..T, the table's row T - t + 1: the term L_(t-1), what having x_t costs, and
    the RMSE of the x_0 predicted from it on 0..255, as a root of the mean over all images and as a mean of their roots."""
    curve = rate_distortion(Bound(means["terms"][None], prior[None], means["mse"][None]))
    return {
        "t": list(range(1, len(means["terms"]) + 1)),
        "terms_bpd": means["terms"].tolist(),
        "rate_bpd": curve.rate.tolist(),
        "rmse": curve.distortion.tolist(),
        "rmse_mean_of_roots": (SCALE * means["root"]).tolist(),
    }
