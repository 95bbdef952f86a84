"""Chunks of a likelihood measurement: what a worker computes of some images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_core import rng
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.likelihood import estimate_bound, variational_bound
from ddpm_core.precision import full_float32
from pipelines.checkpoints.network import NetworkHolder
from pipelines.likelihood.result import LikelihoodProtocol
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.chunks import save_chunk
from pipelines.storage.locations import Location


@dataclass(frozen=True)
class LikelihoodChunk:
    """A unit of work. indices: positions among the chosen images. images: their numbers in the data set, int64. folder: for
    the file."""

    indices: range
    images: Tensor
    checkpoint: Checkpoint
    folder: Location


def choose_images(seed: int, total: int, count: int) -> Tensor:
    """The first `count` numbers of a permutation of 0..total-1, ascending, so that files are read from front to back."""
    return rng.permutation(seed, "likelihood-images", 0, total)[:count].sort().values


class LikelihoodWorker:
    """Measures chunks with one checkpoint's network at a time; each chunk can be made again."""

    def __init__(self, protocol: LikelihoodProtocol, dataset: ShardedDataset) -> None:
        self.protocol, self.dataset = protocol, dataset
        self.networks = NetworkHolder(protocol.weights, var_type=protocol.var_type)
        self.device = self.networks.device

    @torch.no_grad()
    def run(self, chunk: LikelihoodChunk) -> bool:
        """Measure and commit one chunk; returns that it was made."""
        with full_float32(self.device):  # a GPU's convolutions would round to TF32
            model = self.networks.of(chunk.checkpoint)
            parts = [self._measure(model, numbers) for numbers in chunk.images.split(self.protocol.batch_size)]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        weights = chunk.checkpoint.weights_sha256(self.protocol.weights)
        save_chunk(chunk.folder, chunk.indices, tensors, {"weights_sha256": weights})
        return True

    def _measure(self, model: tuple[GaussianDiffusion, DenoiseFn], numbers: Tensor) -> dict[str, Tensor]:
        """What a chunk stores of some images, by their numbers, float64 in bits/dim.

        The full bound: prior [b], terms [b,T], mse [b,T]. An estimate: prior, total, decoder, mse, [b] each, the mse of x_0
        predicted from x_1.
        """
        indices, protocol = numbers.to(self.device), self.protocol
        x = self.dataset.images(numbers.numpy()).to(self.device)
        noise = rng.SampleNoise(protocol.seed, indices, tuple(x.shape[1:]), purpose="likelihood")
        cdf = protocol.cdf
        if protocol.strata is None:
            bound = variational_bound(*model, x, noise, cdf=cdf)
            # L = L_T + L_{T-1} + .. + L_1 + L_0 (Eq. 5): prior and, from L_0 on, terms
            return {"prior": bound.prior, "terms": bound.terms, "mse": bound.mse}
        estimate = estimate_bound(
            *model, x, noise, seed=protocol.seed, indices=indices, strata=protocol.strata, cdf=cdf
        )
        return {name: getattr(estimate, name) for name in ("prior", "total", "decoder", "mse")}
