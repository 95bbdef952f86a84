"""What makes the parts of pictures, wherever Ray runs it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_core import images, rng
from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.latents import capture, interpolate, share_latent
from ddpm_core.png import tile
from ddpm_core.precision import full_float32
from ddpm_core.samplers import sample_steps
from pipelines.checkpoints.network import NetworkHolder
from pipelines.evaluate.illustrate.pictures import WEIGHTS, PictureProtocol, PictureUnit, timesteps_shown
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.chunks import save_chunk

SHARING = 3  # samples from one latent, beside the latent itself: quadrants


class Painter:
    """The worker: holds the source images' data set and the network; makes parts of pictures."""

    def __init__(self, protocol: PictureProtocol, dataset: ShardedDataset) -> None:
        self.protocol, self.dataset = protocol, dataset
        self.networks = NetworkHolder(protocol.weights, protocol.precision, var_type=protocol.var_type)
        self.device = self.networks.device
        height, width, channels = dataset.shape
        self.shape = (channels, height, width)

    @torch.no_grad()
    def run(self, unit: PictureUnit) -> bool:
        """Make and commit one part: its tiles, uint8 [rows, columns, h, w, c]."""
        with full_float32(self.device):
            diffusion, network = self.networks.of(unit.checkpoint)
            tiles = self._draw(diffusion, network, unit)
        weights = unit.checkpoint.weights_sha256(self.protocol.weights)
        save_chunk(unit.folder, unit.indices, {"tiles": tiles.cpu()}, {"weights_sha256": weights})
        return True

    def _draw(self, diffusion: GaussianDiffusion, network: DenoiseFn, unit: PictureUnit) -> Tensor:
        protocol = self.protocol
        process = unit.checkpoint.diffusion_config()
        if unit.kind == "progressive":
            return self._progressive(diffusion, network, timesteps_shown(protocol, process))
        if unit.kind == "shared":
            return self._shared(diffusion, network, protocol.depths("shared", process)[unit.part])
        if unit.kind == "interpolation":
            return self._between(diffusion, network, unit.part, protocol.depths("interpolation", process)[0])
        return self._between(diffusion, network, 0, protocol.depths("coarse_to_fine", process)[unit.part])

    def _noise(self, what: str, numbers: Sequence[int]) -> rng.SampleNoise:
        indices = torch.tensor(numbers, device=self.device)
        return rng.SampleNoise(self.protocol.seed, indices, self.shape, purpose=f"pictures-{what}")

    def _progressive(self, diffusion: GaussianDiffusion, network: DenoiseFn, shown: Sequence[int]) -> Tensor:
        """Chains down, their predictions of x_0 from left to right."""
        protocol = self.protocol
        rows = range(protocol.rows)
        chain = sample_steps(
            diffusion,
            network,
            (len(rows), *self.shape),
            noise=self._noise("progressive", rows),
            **protocol.options,
        )
        predictions, _ = capture(chain, shown)
        return torch.stack([images.to_uint8(predictions[t]) for t in shown], dim=1)

    def _shared(self, diffusion: GaussianDiffusion, network: DenoiseFn, depth: int) -> Tensor:
        """Latents down; a tile is three samples and, at the bottom right, the latent they share."""
        protocol = self.protocol
        count = protocol.rows
        latents, samples = share_latent(
            diffusion,
            network,
            (count, *self.shape),
            depth,
            SHARING,
            latent_noise=self._noise("latents", range(count)),
            noise=self._noise("sharing", range(count * SHARING)),
            **protocol.random_options,
        )
        quarters = torch.cat([samples, latents[:, None]], dim=1)
        tiles = [torch.from_numpy(tile(images.to_uint8(four).cpu().numpy(), 2)) for four in quarters]
        return torch.stack(tiles)[:, None]

    def _between(self, diffusion: GaussianDiffusion, network: DenoiseFn, pair: int, depth: int) -> Tensor:
        """One row: source, its reconstruction, mixes, the other's reconstruction, the other source."""
        order = rng.permutation(self.protocol.seed, "pictures-sources", 0, len(self.dataset))
        numbers = [int(order[(2 * pair + side) % len(order)]) for side in (0, 1)]
        first, second = (self.dataset.images([number]).to(self.device) for number in numbers)
        row = interpolate(
            diffusion,
            network,
            (first, second),
            WEIGHTS,
            depth,
            encoder_noise=(self._noise("encoder", [2 * pair])(0), self._noise("encoder", [2 * pair + 1])(0)),
            noise=self._noise("between", [pair]),
            **self.protocol.options,
        )
        return images.to_uint8(torch.cat([first, row[:, 0], second]))[None]
