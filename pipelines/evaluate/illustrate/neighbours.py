"""The training images nearest to samples, in pixels and in an extractor's features (Fig. 12 and 15 of the paper), and how
many samples look memorized.

Every image of the training set is looked at: a unit of the fan-out is a range of them, its chunk the nearest in it.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ddpm_core import rng
from ddpm_core.metrics.intervals import proportion_interval
from ddpm_core.metrics.memorization import (
    NEAREST,
    THRESHOLD,
    Neighbours,
    memorized,
    merge_neighbours,
    nearest,
    nearness,
)
from ddpm_core.precision import full_float32
from ddpm_core.protocol import Protocol
from ddpm_core.records import CI_HIGH, CI_LOW, HELD_OUT, MEMORIZED, MEMORIZED_FEATURES
from pipelines.evaluate.extractor import Extractor, load_for
from pipelines.evaluate.illustrate.pictures import Picture
from pipelines.evaluate.reference import BATCH, units_of
from pipelines.runtime.fan_out import Pool, make_missing
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.chunks import content_sha256, load_chunks, save_chunk
from pipelines.storage.locations import Location

Space = Literal["pixels", "features"]
SPACES: tuple[Space, ...] = ("pixels", "features")
SHOWN = 8  # samples of a picture, and images of its rows


@dataclass(frozen=True)
class NeighbourUnit:
    """A range of training images, and the folder the file goes to."""

    indices: range
    folder: Location


class NeighbourWorker:
    """Holds the queries, uint8 [q,h,w,c], and the extractor; finds the nearest of a range of images."""

    def __init__(self, queries: Tensor, extractor: Extractor, dataset: ShardedDataset) -> None:
        self.dataset = dataset
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.extractor = load_for(extractor.spec, dataset).to(self.device)
        self.facts = identity(queries, extractor)
        batches = [self._spaces(part) for part in queries.split(BATCH)]
        self.queries = {space: torch.cat([batch[space] for batch in batches]) for space in SPACES}

    @torch.no_grad()
    def run(self, unit: NeighbourUnit) -> bool:
        nearest_of: dict[Space, Neighbours] = {}
        for start in range(unit.indices.start, unit.indices.stop, BATCH):
            chosen = np.arange(start, min(start + BATCH, unit.indices.stop))
            items = self._spaces(torch.from_numpy(self.dataset.pixels(chosen)))
            for space in SPACES:
                near = nearest(self.queries[space], items[space], start)
                nearest_of[space] = merge_neighbours([nearest_of[space], near]) if space in nearest_of else near
        tensors = {
            f"{space}_{name}": values.cpu() for space in SPACES for name, values in nearest_of[space]._asdict().items()
        }
        save_chunk(unit.folder, unit.indices, tensors, self.facts)
        return True

    @torch.no_grad()
    def _spaces(self, pixels: Tensor) -> dict[Space, Tensor]:
        """float64 [n,d] of images in each space; pixels are integers, whose distances are exact."""
        pixels = pixels.to(self.device)
        with full_float32(self.device):
            features, _ = self.extractor(pixels.permute(0, 3, 1, 2).contiguous())
        return {"pixels": pixels.flatten(1).double(), "features": features.double()}


@dataclass(frozen=True)
class Memorization:
    """What looking up `samples` (and as many held-out images, or none) among the training images gave."""

    samples: int
    held_out: int
    training_images: int
    neighbours: Mapping[Space, Neighbours]  # of the samples, then of the held-out images

    def values(self, protocol: Protocol) -> dict[str, float]:
        """The metrics: the fraction of samples called memorized with its 95 % interval, that of held-out images beside."""
        values: dict[str, float] = {}
        for space in SPACES:
            name = MEMORIZED if space == "pixels" else protocol.metric(MEMORIZED_FEATURES)
            copies = memorized(self.neighbours[space].distances)
            hits = int(copies[: self.samples].sum())
            low, high = proportion_interval(hits, self.samples)
            values |= {name: hits / self.samples, name + CI_LOW: low, name + CI_HIGH: high}
            if self.held_out:
                values[name + HELD_OUT] = float(copies[self.samples :].double().mean())
        return values

    def describe(self, protocol: Protocol) -> str:
        values = self.values(protocol)
        hits = round(values[MEMORIZED] * self.samples)
        text = (
            f"{hits:,} of {self.samples:,} samples memorized (95 % interval {values[MEMORIZED + CI_LOW]:.2%} to "
            f"{values[MEMORIZED + CI_HIGH]:.2%}), that is, nearer to a training image than {THRESHOLD:g} x the mean of the "
            f"{NEAREST} nearest"
        )
        if self.held_out:
            text += f"; {values[MEMORIZED + HELD_OUT]:.2%} of {self.held_out:,} held-out images are"
        return text

    def facts(self) -> dict[str, Any]:
        """Everything about each sample 0, 1, .., as JSON."""
        return {
            "threshold": THRESHOLD,
            "nearest": NEAREST,
            "samples": self.samples,
            "held_out": self.held_out,
            "training_images": self.training_images,
            **{
                space: {
                    "nearness": nearness(self.neighbours[space].distances)[: self.samples].tolist(),
                    "training_image": self.neighbours[space].numbers[: self.samples, 0].tolist(),
                    "distance": self.neighbours[space].distances[: self.samples, 0].tolist(),
                }
                for space in SPACES
            },
        }

    def pictures(self, samples: Tensor, dataset: ShardedDataset) -> list[Picture]:
        """The samples that stand out most from all others, each beside its nearest training images, one picture a space."""
        drawn = []
        for space in SPACES:
            near = Neighbours(*(part[: self.samples] for part in self.neighbours[space]))
            chosen = nearness(near.distances).argsort(stable=True)[:SHOWN]
            columns = min(SHOWN, near.numbers.shape[1])
            numbers = near.numbers[chosen, :columns]
            training = dataset.pixels(numbers.flatten().numpy()).reshape(len(chosen), columns, *dataset.shape)
            where = "pixels" if space == "pixels" else "the extractor's features"
            drawn.append(
                Picture(
                    f"neighbours_{space}",
                    np.concatenate([samples[chosen].numpy()[:, None], training], axis=1),
                    tuple(f"sample {int(number)}" for number in chosen),
                    ("sample", *(f"nearest {place + 1}" for place in range(columns))),
                    f"The {len(chosen)} of {self.samples:,} samples that are nearest to training images, by the ratio of the "
                    f"nearest distance to the mean of {NEAREST}, and those images; distances in {where}, over all "
                    f"{self.training_images:,} training images.",
                )
            )
        return drawn


def find_neighbours(
    samples: Tensor,
    held_out: ShardedDataset | None,
    dataset: ShardedDataset,
    extractor: Extractor,
    folder: Location,
    *,
    seed: int,
    pool: Pool,
) -> Memorization:
    """The nearest of all images of a data set to samples, uint8 [n,h,w,c], and to as many of the held-out images; what is
    missing in the folder is made."""
    queries = samples
    if held_out is not None:
        order = rng.permutation(seed, "held-out", 0, len(held_out))[: len(samples)]
        queries = torch.cat([samples, torch.from_numpy(held_out.pixels(order.sort().values.numpy()))])
    wanted = identity(queries, extractor)
    units = [NeighbourUnit(numbers, folder) for numbers in units_of(dataset)]
    made = make_missing(
        pool,
        NeighbourWorker,
        [queries, extractor, dataset],
        units,
        is_current=lambda unit, _, facts: all(facts.get(name) == value for name, value in wanted.items()),
        stage="evaluate",
        counted="training images",
        note=lambda unit: "nearest neighbours",
        say=pool.say,
    )
    deque(made, maxlen=0)
    chunks = [chunk for _, chunk, _ in load_chunks(folder, [unit.indices for unit in units])]
    neighbours: dict[Space, Neighbours] = {
        space: merge_neighbours(
            [Neighbours(chunk[f"{space}_distances"], chunk[f"{space}_numbers"]) for chunk in chunks]
        )
        for space in SPACES
    }
    return Memorization(len(samples), len(queries) - len(samples), len(dataset), neighbours)


def identity(queries: Tensor, extractor: Extractor) -> dict[str, str]:
    """What a chunk of neighbours depends on, beside the data set."""
    return {"queries": content_sha256({"queries": queries}), "extractor": extractor.sha256}
