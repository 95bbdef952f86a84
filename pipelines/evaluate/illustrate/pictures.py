"""Pictures of what a checkpoint does on the way: progressive generation, shared latents and interpolations (Fig. 6 to 9).

A picture is a grid of tiles. Its parts are units of a fan-out, chunks like any other: made once, found again after a kill.
"""

import hashlib
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.configs import LATER, DiffusionConfig, FixedVariance, Method, Precision, Spacing, Weights
from ddpm_core.png import encode_png, tile
from ddpm_core.protocol import weights_name
from ddpm_core.timesteps import coarse_to_fine_depths, progress_timesteps, visited_timesteps
from pipelines.runtime.fan_out import Pool, UnitWorker, make_missing
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.chunks import load_arrays
from pipelines.storage.locations import Location

if TYPE_CHECKING:
    from ddpm_core.samplers import SamplerOptions

Kind = Literal["progressive", "shared", "interpolation", "coarse_to_fine"]
POINTS = 10  # of a chain, whose predictions of x_0 are shown
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
    def options(self) -> "SamplerOptions":
        return {"method": self.sampler, "steps": self.sampler_steps, "spacing": self.spacing, "eta": self.eta}

    @property
    def random_options(self) -> "SamplerOptions":
        """The same for samples from p(x_0|x_t), which a deterministic sampler would make all alike: DDIM with eta 1, the
        ancestral chain of the visited steps with their beta-tilde."""
        return self.options if self.sampler == "ancestral" else {**self.options, "method": "ddim", "eta": 1.0}

    def depths(self, kind: Kind, process: DiffusionConfig) -> tuple[int, ...]:
        """How many diffusion steps the latents of a picture have behind them, one number a part of the picture: as in the
        paper's for T = 1000; latents are shared where this chain stops."""
        T = process.num_timesteps
        if kind == "interpolation":
            return (T // 2,)
        if kind == "coarse_to_fine":
            return coarse_to_fine_depths(T)
        stops = [t + 1 for t in visited_timesteps(process, self.sampler_steps, self.spacing)[:-1]]
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
    tiles: np.ndarray
    row_labels: tuple[str, ...]
    column_labels: tuple[str, ...]
    caption: str

    def png(self) -> bytes:
        columns, *shape = self.tiles.shape[1:]
        return encode_png(tile(self.tiles.reshape(-1, *shape), columns))

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


def painter(protocol: PictureProtocol, dataset: ShardedDataset) -> UnitWorker:
    """The worker that makes parts of pictures."""
    from pipelines.evaluate.illustrate.painter import Painter  # here: with torch

    return Painter(protocol, dataset)


def timesteps_shown(protocol: PictureProtocol, process: DiffusionConfig) -> tuple[int, ...]:
    """Where along the chain the predictions of x_0 are shown."""
    return progress_timesteps(process, protocol.sampler_steps, protocol.spacing, POINTS)


def draw_pictures(
    checkpoint: Checkpoint, dataset: ShardedDataset, protocol: PictureProtocol, folder: Location, pool: Pool
) -> list[Picture]:
    """All pictures of a checkpoint, with the parts made that are missing in `folder`/KIND."""
    process = checkpoint.diffusion_config()
    weights = checkpoint.weights_sha256(protocol.weights)
    parts: dict[Kind, int] = {
        "progressive": 1,
        "shared": len(protocol.depths("shared", process)),
        "interpolation": protocol.rows,
        "coarse_to_fine": len(protocol.depths("coarse_to_fine", process)),
    }
    units = [
        PictureUnit(kind, part, checkpoint, folder / kind) for kind, count in parts.items() for part in range(count)
    ]
    made = make_missing(
        pool,
        painter,
        [protocol, dataset],
        units,
        is_current=lambda unit, _, facts: facts.get("weights_sha256") == weights,
        stage="evaluate",
        counted="picture parts",
        note=lambda unit: f"step {checkpoint.step:,}, {unit.kind}",
        say=pool.say,
    )
    deque(made, maxlen=0)
    tiles: dict[Kind, list[np.ndarray]] = {kind: [] for kind in parts}
    for unit in units:
        tiles[unit.kind].append(load_arrays(unit.folder, unit.indices)[0]["tiles"])
    return compose(protocol, process, tiles)


def compose(protocol: PictureProtocol, process: DiffusionConfig, tiles: dict[Kind, list[np.ndarray]]) -> list[Picture]:
    rows = range(protocol.rows)
    sampler = protocol.sampler + (f" (eta {protocol.eta:g})" if protocol.eta else "")
    weights = weights_name(protocol.weights)
    chain = f"{sampler} sampling in {protocol.sampler_steps:,} steps, {weights} weights, seed {protocol.seed}"
    stochastic = chain if protocol.sampler == "ancestral" else chain.replace(sampler, "ddim (eta 1)")
    mixes = ("source", "rec.", *(f"{weight:.1f}" for weight in WEIGHTS[1:-1]), "rec.", "source")
    sources = f"Sources: images of {protocol.data} that the seed chose"
    shared = protocol.depths("shared", process)
    fine = protocol.depths("coarse_to_fine", process)
    (between,) = protocol.depths("interpolation", process)
    return [
        Picture(
            "progressive",
            tiles["progressive"][0],
            tuple(f"sample {row}" for row in rows),
            tuple(f"t = {t + 1:,}" for t in timesteps_shown(protocol, process)),
            f"Progressive generation: x_0 as it is predicted from x_t along the chain (the paper's Fig. 6). {chain}.",
        ),
        Picture(
            "shared",
            np.concatenate(tiles["shared"], axis=1),
            tuple(f"latent {row}" for row in rows),
            tuple(f"share x_{depth}" for depth in shared),
            "Samples that share a latent: in each tile three samples from p(x_0 | x_t) and, bottom right, their x_t "
            f"(Fig. 7). {stochastic}.",
        ),
        Picture(
            "interpolation",
            np.concatenate(tiles["interpolation"]),
            tuple(f"pair {row}" for row in rows),
            mixes,
            f"Interpolation between real images, mixed at {between:,} diffusion steps (Fig. 8). {sources}. {chain}.",
        ),
        Picture(
            "coarse_to_fine",
            np.concatenate(tiles["coarse_to_fine"]),
            tuple(f"{depth:,} steps" for depth in fine),
            mixes,
            "Interpolation of one pair from coarse to fine: the more diffusion steps before the mix, the less of the sources "
            f"remains (Fig. 9). {sources}. {chain}.",
        ),
    ]
