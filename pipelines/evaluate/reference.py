"""Reference statistics: a pass of the pool over the shards, made once for a data set and extractor, and kept with them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from ddpm_core import typed
from ddpm_core.errors import InputError, one_line
from ddpm_core.precision import full_float32
from ddpm_core.protocol import NEIGHBOURS
from ddpm_core.rng import permutation
from pipelines.evaluate.extractor import Extractor, load_for
from pipelines.runtime.fan_out import Pool
from pipelines.runtime.progress import Progress
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.chunks import content_sha256
from pipelines.storage.locations import Location, committed

if TYPE_CHECKING:
    from ddpm_core.metrics import FeatureStatistics

FORMAT = 2
BATCH = 250  # images an extractor sees at once; its float32 features depend on it in the last digits
SPLITS = 10  # of the Inception score
UNITS = 64  # of work, at most: each hands over two covariances


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: the features of all images of a data set.

    halves: of a random half of the images, and of the other. features: float32 [min(n, neighbours), d] of a random choice
    of images. score: the images' own Inception score (mean, std over splits of random images), None without logits.
    """

    halves: "tuple[FeatureStatistics, FeatureStatistics]"
    features: Tensor
    score: tuple[float, float] | None

    @property
    def statistics(self) -> "FeatureStatistics":
        """Of all images."""
        # Here and below: with torchmetrics, which takes as long as torch.
        from ddpm_core.metrics import FeatureStatistics

        whole = FeatureStatistics(self.halves[0].dim)
        for half in self.halves:
            whole.merge_state(half)
        return whole


class Sums:
    """What is kept of the images' features: sums that merge, and the features of the chosen ones."""

    def __init__(self, images: int, extractor: Extractor) -> None:
        from ddpm_core.metrics import FeatureStatistics, InceptionScore

        self.halves = (FeatureStatistics(extractor.dim), FeatureStatistics(extractor.dim))
        self.score = InceptionScore(images, min(SPLITS, images), extractor.num_logits) if extractor.num_logits else None
        self.features = [torch.empty(0, extractor.dim)]

    def state(self) -> dict[str, Tensor]:
        """As named tensors, which merge() of another takes."""
        parts = {"a": self.halves[0], "b": self.halves[1]} | ({"score": self.score} if self.score is not None else {})
        tensors = {f"{part}.{name}": value for part, sums in parts.items() for name, value in sums.statistics().items()}
        return {**tensors, "features": torch.cat(self.features)}

    def merge(self, state: dict[str, Tensor]) -> None:
        for part, sums in zip(("a", "b", "score"), (*self.halves, self.score), strict=True):
            if sums is not None:
                prefix = f"{part}."
                sums.merge_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        self.features.append(state["features"])

    def reference(self) -> Reference:
        score = None if self.score is None else tuple(float(value) for value in self.score.compute())
        return Reference(self.halves, torch.cat(self.features), (score[0], score[1]) if score is not None else None)


class ShardFeatures:
    """The pool's worker: a range of images -> the sums over them. Holds the extractor once."""

    def __init__(self, extractor: Extractor, dataset: ShardedDataset, neighbours: int) -> None:
        self.neighbours = neighbours
        self.dataset, self.facts = dataset, extractor
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.extractor = load_for(extractor.spec, dataset).to(self.device)
        self.place = torch.argsort(permutation(0, "reference", 0, len(dataset)))  # of each image in a random order

    @torch.no_grad()
    def run(self, unit: range) -> dict[str, Tensor]:
        sums, count = Sums(len(self.dataset), self.facts), len(self.dataset)
        for start in range(unit.start, unit.stop, BATCH):
            chosen = np.arange(start, min(start + BATCH, unit.stop))
            pixels = torch.from_numpy(self.dataset.pixels(chosen)).to(self.device)
            with full_float32(self.device):
                features, logits = self.extractor(pixels.permute(0, 3, 1, 2).contiguous())
            features, place = features.cpu(), self.place[torch.from_numpy(chosen)]
            sums.halves[0].update(features[place < count // 2])
            sums.halves[1].update(features[place >= count // 2])
            sums.features.append(features[place < self.neighbours])
            if sums.score is not None and logits is not None:
                sums.score.update(logits.cpu(), place)
        return sums.state()


def reference_path(dataset: ShardedDataset, extractor: Extractor, neighbours: int = NEIGHBOURS) -> Location:
    """Where the statistics lie; the name holds the sha256 of the images and of the extractor, and how many images' features
    are kept if that is not the default."""
    kept = "" if neighbours == NEIGHBOURS else f"-neighbours{neighbours}"
    name = f"{extractor.name}-{extractor.sha256[:12]}-{dataset.sha256[:12]}-{FORMAT}{kept}.safetensors"
    return dataset.path / "reference" / name


def reference_statistics(
    dataset: ShardedDataset, extractor: Extractor, pool: Pool, neighbours: int = NEIGHBOURS
) -> Reference:
    """The statistics of all images of a data set, read from beside its shards or made by the pool and put there. Units are
    merged in their order, so that the sums do not depend on the workers."""
    path = reference_path(dataset, extractor, neighbours)
    if path.exists():
        try:
            return read_reference(path, dataset, extractor, neighbours)
        except InputError as error:
            if path.is_dir():
                raise
            pool.say(f"reference: {error}")
    merged = Sums(len(dataset), extractor)
    units = units_of(dataset)
    progress = Progress("reference", len(dataset), "images", pool.say)
    early: dict[int, dict[str, Tensor]] = {}  # what came before its turn
    turn = 0
    for number, sums in pool.fan_out(ShardFeatures, [extractor, dataset, neighbours], units):
        early[number] = sums
        while turn in early:
            merged.merge(early.pop(turn))
            turn += 1
        progress.advance(len(units[number]))
    state = {name: tensor.contiguous() for name, tensor in merged.state().items()}
    with committed(path) as temporary:
        save_file(state, temporary, metadata={"sha256": content_sha256(state)})
    return merged.reference()


def read_reference(
    path: Location, dataset: ShardedDataset, extractor: Extractor, neighbours: int = NEIGHBOURS
) -> Reference:
    """The statistics in a file. Raises InputError if it is damaged, or of other images or another extractor."""
    from ddpm_core.metrics.mergeable import check_features

    sums = Sums(len(dataset), extractor)
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder, where reference statistics are wanted: delete it")
    try:
        data = typed.read_whole(path)
        state = load(data)
        stated = typed.tensors_metadata(data).get("sha256")  # not in files of earlier versions
        if stated is not None and stated != content_sha256(state):
            raise ValueError("its content has another sha256")
        sums.merge(state)
        reference = sums.reference()
        check_features(reference.features, extractor.dim)
        if int(reference.statistics.n) != len(dataset) or len(reference.features) != min(len(dataset), neighbours):
            raise ValueError(f"it is of other images than the {len(dataset):,} of the data set")
    except (SafetensorError, ValueError, LookupError, RuntimeError, TypeError) as error:
        raise InputError(f"file {str(path)!r} is damaged ({one_line(error)}): it is made again") from error
    return reference


def units_of(dataset: ShardedDataset) -> list[range]:
    """The images of each unit of work: whole shards, a function of the data set alone."""
    shards = [dataset.shard_range(shard) for shard in range(len(dataset.manifest["shards"]))]
    each = -(-len(shards) // UNITS)
    groups = [shards[first : first + each] for first in range(0, len(shards), each)]
    return [range(group[0].start, group[-1].stop) for group in groups]
