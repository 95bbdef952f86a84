"""Pictures of what a checkpoint does on the way: progressive generation, shared latents and interpolations (Fig. 6 to 9).

A picture is a grid of tiles. Its parts are units of a fan-out, chunks like any other: made once, found again after a kill.
"""

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ddpm_core import images, rng
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.configs import LATER, FixedVariance, Method, Precision, Spacing, Weights
from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.latents import capture, coarse_to_fine_depths, interpolate, share_latent
from ddpm_core.precision import full_float32
from ddpm_core.protocol import weights_name
from ddpm_core.samplers import SamplerOptions, sample_steps, select_timesteps
from pipelines.checkpoints.network import NetworkHolder
from pipelines.evaluate.worker import progress_timesteps
from pipelines.runtime.fan_out import Pool, make_missing
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.chunks import load_chunk, save_chunk
from pipelines.storage.locations import Location

Kind = Literal["progressive", "shared", "interpolation", "coarse_to_fine"]
POINTS = 10  # of a chain, whose predictions of x_0 are shown
SHARING = 3  # samples from one latent, beside the latent itself: quadrants
WEIGHTS = tuple(step / 10 for step in range(11))  # 0 and 1 are the sources' reconstructions


@dataclass(frozen=True, kw_only=True)
class PictureProtocol:
    """Everything besides the checkpoint that the pictures depend on. rows: chains, latents and pairs of source images."""

    rows: int
    seed: int
    sampler: Method
    sampler_steps: int
    spacing: Spacing
    weights: Weights
    precision: Precision
    data: str
    data_sha256: str
    eta: float = field(default=0.0, metadata=LATER)
    var_type: FixedVariance | None = field(default=None, metadata=LATER)
    ema_length: float | None = field(default=None, metadata=LATER)

    @property
    def options(self) -> SamplerOptions:
        return {"method": self.sampler, "steps": self.sampler_steps, "spacing": self.spacing, "eta": self.eta}

    @property
    def random_options(self) -> SamplerOptions:
        """The same for samples from p(x_0|x_t), which a deterministic sampler would make all alike: DDIM with eta 1, the
        ancestral chain of the visited steps with their beta-tilde."""
        return self.options if self.sampler == "ancestral" else {**self.options, "method": "ddim", "eta": 1.0}

    def depths(self, kind: Kind, diffusion: GaussianDiffusion) -> tuple[int, ...]:
        """How many diffusion steps the latents of a picture have behind them, one number a part of the picture: as in the
        paper's for T = 1000; latents are shared where this chain stops."""
        T = diffusion.num_timesteps
        if kind == "interpolation":
            return (T // 2,)
        if kind == "coarse_to_fine":
            return coarse_to_fine_depths(T)
        visited = select_timesteps(T, self.sampler_steps, self.spacing, diffusion.alphas_cumprod)
        stops = [t + 1 for t in visited[:-1]]
        near = {min(stops, key=lambda depth: abs(depth - T * quarters // 4)) for quarters in (1, 2, 3) if stops}
        return (T, *sorted(near, reverse=True))


@dataclass(frozen=True)
class PictureUnit:
    """One part of a picture, and the folder its file goes to."""

    kind: Kind
    part: int
    checkpoint: Checkpoint
    folder: Location

    @property
    def indices(self) -> range:
        """The part as a chunk's indices."""
        return range(self.part, self.part + 1)


@dataclass(frozen=True)
class Picture:
    """A grid of tiles, uint8 [rows, columns, h, w, c], its labels, and what it shows, in words."""

    kind: str
    tiles: Tensor
    row_labels: tuple[str, ...]
    column_labels: tuple[str, ...]
    caption: str

    def png(self) -> bytes:
        return images.encode_png(images.tile(self.tiles.flatten(0, 1), self.tiles.shape[1]))

    def facts(self, png: bytes) -> dict[str, Any]:
        """What stands beside its file, as JSON."""
        rows, columns, height, width, _ = self.tiles.shape
        return {
            "kind": self.kind,
            "file": f"{self.kind}.png",
            "sha256": hashlib.sha256(png).hexdigest(),
            "rows": rows,
            "columns": columns,
            "tile": [height, width],
            "row_labels": list(self.row_labels),
            "column_labels": list(self.column_labels),
            "caption": self.caption,
        }


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
        if unit.kind == "progressive":
            return self._progressive(diffusion, network)
        if unit.kind == "shared":
            return self._shared(diffusion, network, protocol.depths("shared", diffusion)[unit.part])
        if unit.kind == "interpolation":
            return self._between(diffusion, network, unit.part, protocol.depths("interpolation", diffusion)[0])
        return self._between(diffusion, network, 0, protocol.depths("coarse_to_fine", diffusion)[unit.part])

    def _noise(self, what: str, numbers: Sequence[int]) -> rng.SampleNoise:
        indices = torch.tensor(numbers, device=self.device)
        return rng.SampleNoise(self.protocol.seed, indices, self.shape, purpose=f"pictures-{what}")

    def _progressive(self, diffusion: GaussianDiffusion, network: DenoiseFn) -> Tensor:
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
        shown = timesteps_shown(protocol, diffusion)
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
        return torch.stack([images.tile(images.to_uint8(four), 2) for four in quarters])[:, None]

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


def timesteps_shown(protocol: PictureProtocol, diffusion: GaussianDiffusion) -> tuple[int, ...]:
    """Where along the chain the predictions of x_0 are shown."""
    return progress_timesteps(diffusion, protocol.sampler_steps, protocol.spacing, POINTS)


def draw_pictures(
    checkpoint: Checkpoint, dataset: ShardedDataset, protocol: PictureProtocol, folder: Location, pool: Pool
) -> list[Picture]:
    """All pictures of a checkpoint, with the parts made that are missing in `folder`/KIND."""
    diffusion = checkpoint.diffusion_config().build()
    weights = checkpoint.weights_sha256(protocol.weights)
    parts: dict[Kind, int] = {
        "progressive": 1,
        "shared": len(protocol.depths("shared", diffusion)),
        "interpolation": protocol.rows,
        "coarse_to_fine": len(protocol.depths("coarse_to_fine", diffusion)),
    }
    units = [
        PictureUnit(kind, part, checkpoint, folder / kind) for kind, count in parts.items() for part in range(count)
    ]
    made = make_missing(
        pool,
        Painter,
        [protocol, dataset],
        units,
        is_current=lambda unit, tensors, facts: facts.get("weights_sha256") == weights,
        stage="evaluate",
        counted="picture parts",
        note=lambda unit: f"step {checkpoint.step:,}, {unit.kind}",
        say=pool.say,
    )
    deque(made, maxlen=0)
    tiles: dict[Kind, list[Tensor]] = {kind: [] for kind in parts}
    for unit in units:
        tiles[unit.kind].append(load_chunk(unit.folder, unit.indices)[0]["tiles"])
    return compose(protocol, diffusion, tiles)


def compose(protocol: PictureProtocol, diffusion: GaussianDiffusion, tiles: dict[Kind, list[Tensor]]) -> list[Picture]:
    rows = range(protocol.rows)
    sampler = protocol.sampler + (f" (eta {protocol.eta:g})" if protocol.eta else "")
    weights = weights_name(protocol.weights)
    chain = f"{sampler} sampling in {protocol.sampler_steps:,} steps, {weights} weights, seed {protocol.seed}"
    stochastic = chain if protocol.sampler == "ancestral" else chain.replace(sampler, "ddim (eta 1)")
    mixes = ("source", "rec.", *(f"{weight:.1f}" for weight in WEIGHTS[1:-1]), "rec.", "source")
    sources = f"Sources: images of {protocol.data} that the seed chose"
    shared = protocol.depths("shared", diffusion)
    fine = protocol.depths("coarse_to_fine", diffusion)
    (between,) = protocol.depths("interpolation", diffusion)
    return [
        Picture(
            "progressive",
            tiles["progressive"][0],
            tuple(f"sample {row}" for row in rows),
            tuple(f"t = {t + 1:,}" for t in timesteps_shown(protocol, diffusion)),
            f"Progressive generation: x_0 as it is predicted from x_t along the chain (the paper's Fig. 6). {chain}.",
        ),
        Picture(
            "shared",
            torch.cat(tiles["shared"], dim=1),
            tuple(f"latent {row}" for row in rows),
            tuple(f"share x_{depth}" for depth in shared),
            "Samples that share a latent: in each tile three samples from p(x_0 | x_t) and, bottom right, their x_t "
            f"(Fig. 7). {stochastic}.",
        ),
        Picture(
            "interpolation",
            torch.cat(tiles["interpolation"]),
            tuple(f"pair {row}" for row in rows),
            mixes,
            f"Interpolation between real images, mixed at {between:,} diffusion steps (Fig. 8). {sources}. {chain}.",
        ),
        Picture(
            "coarse_to_fine",
            torch.cat(tiles["coarse_to_fine"]),
            tuple(f"{depth:,} steps" for depth in fine),
            mixes,
            "Interpolation of one pair from coarse to fine: the more diffusion steps before the mix, the less of the sources "
            f"remains (Fig. 9). {sources}. {chain}.",
        ),
    ]
