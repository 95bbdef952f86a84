"""Sampling: the missing chunks of checkpoints' samples and their features, by a pool of workers, which also make the numbers
of what they drew."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_core import images, rng
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.errors import DivergedError, InputError
from ddpm_core.features import load_extractor
from ddpm_core.latents import capture
from ddpm_core.precision import full_float32
from ddpm_core.protocol import Protocol
from ddpm_core.samplers import sample_steps
from pipelines.checkpoints.network import NetworkHolder
from pipelines.evaluate.extractor import local_spec
from pipelines.runtime.fan_out import Outcome, Pool, UnitWorker, make_missing
from pipelines.storage.chunks import save_chunk
from pipelines.storage.locations import Location, is_there

# Of the x_0 predicted along the chain, in a chunk: float32 [points, n, d] and [points, n, k].
CHAIN, CHAIN_LOGITS = "progress", "progress_logits"


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """What a worker needs to know to draw samples under a protocol."""

    protocol: Protocol
    shape: tuple[int, int, int]  # (C, H, W) of a sample
    compile: bool
    channels_last: bool = False
    images_to_keep: int  # the samples below this index are stored as images
    progress: tuple[int, ...] = ()  # timesteps whose predictions of x_0 are measured too


@dataclass(frozen=True)
class SampleChunk:
    """A fixed range of a checkpoint's samples, and the folder its file goes to."""

    indices: range
    checkpoint: Checkpoint
    folder: Location


class Sampler:
    """The worker: holds the extractor and one checkpoint's network; makes chunks, each of which can be made again, and has
    the measurer, if there is one, do all other units."""

    def __init__(self, settings: SampleSettings, extractor: str, measurer: UnitWorker | None = None) -> None:
        self.settings, self.protocol, self.measurer = settings, settings.protocol, measurer
        protocol = settings.protocol
        self.networks = NetworkHolder(
            protocol.weights,
            protocol.precision,
            compile=settings.compile,
            channels_last=settings.channels_last,
            var_type=protocol.var_type,
        )
        self.device = self.networks.device
        self.extractor = load_extractor(local_spec(extractor), settings.shape).to(self.device)

    def run(self, unit: Any) -> bool | list[str]:
        """Of a chunk, what `sample` returns; of another unit, what the measurer does."""
        if isinstance(unit, SampleChunk):
            return self.sample(unit)
        assert self.measurer is not None  # the caller gave a unit for it
        lines: list[str] = self.measurer.run(unit)
        return lines

    @torch.no_grad()
    def sample(self, chunk: SampleChunk) -> bool:
        """Make and commit one chunk; False if the training has removed its checkpoint meanwhile."""
        started = time.monotonic()
        try:
            model = self.networks.of(chunk.checkpoint)
        except InputError:
            if is_there(chunk.checkpoint.path / MANIFEST):
                raise
            return False
        with full_float32(self.device):  # as the protocol says; a GPU's convolutions would round to TF32
            tensors = self._draw(*model, chunk)
        seconds = time.monotonic() - started
        weights = chunk.checkpoint.weights_sha256(self.protocol.weights)
        facts = {"weights_sha256": weights, "seconds": seconds, CHAIN: list(self.settings.progress)}
        save_chunk(chunk.folder, chunk.indices, tensors, facts)
        return True

    def _draw(self, diffusion: GaussianDiffusion, network: DenoiseFn, chunk: SampleChunk) -> dict[str, Tensor]:
        settings, protocol, wanted = self.settings, self.protocol, chunk.indices
        features, logits, kept, progress = [], [], [], []
        for start in range(0, len(wanted), protocol.batch_size):
            indices = torch.tensor(wanted[start : start + protocol.batch_size])
            noise = rng.SampleNoise(
                protocol.seed,
                indices.to(self.device),
                settings.shape,
                purpose=protocol.purpose,
                compiled=settings.compile and self.device.type == "cuda",
            )
            chain = sample_steps(
                diffusion,
                network,
                (len(indices), *settings.shape),
                noise=noise,
                method=protocol.sampler,
                steps=protocol.sampler_steps,
                spacing=protocol.spacing,
                eta=protocol.eta,
            )
            predictions, x = capture(chain, settings.progress)
            if not torch.isfinite(x).all():
                raise DivergedError(
                    f"samples of step {chunk.checkpoint.step:,} hold NaN or infinity: its network diverged, take an earlier one"
                )
            progress.append([self._features(predictions[t])[1:] for t in settings.progress])
            pixels, batch_features, batch_logits = self._features(x)
            features.append(batch_features)
            if batch_logits is not None:
                logits.append(batch_logits)
            kept.append(pixels[(indices < settings.images_to_keep).to(self.device)].cpu())
        tensors = {"features": torch.cat(features), "images": torch.cat(kept)}
        if logits:
            tensors["logits"] = torch.cat(logits)
        if settings.progress:
            tensors |= stack_chain(progress)
        return tensors

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(uint8 pixels [b,h,w,c], features, logits) of images [b,c,h,w], the last two on the CPU."""
        pixels = images.to_uint8(x)
        features, logits = self.extractor(pixels.permute(0, 3, 1, 2).contiguous())
        return pixels, features.cpu(), logits if logits is None else logits.cpu()


def sample_checkpoints(
    checkpoints: Sequence[Checkpoint],
    chunks: Sequence[range],
    folder: Location,
    settings: SampleSettings,
    extractor: str,
    pool: Pool,
    measurer: UnitWorker | None = None,
    due: list[Any] | None = None,
) -> Iterator[tuple[Checkpoint, list[range], Outcome]]:
    """Make what is missing in folder/step-...; with each chunk, (its checkpoint, that one's chunks so far in order, what
    became of this one). A checkpoint that the training removes meanwhile is skipped. due: units for the measurer, which the
    caller may add to."""
    weights = {c.step: c.weights_sha256(settings.protocol.weights) for c in checkpoints}

    def is_current(unit: SampleChunk, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> bool:
        kept = len(range(unit.indices.start, min(unit.indices.stop, settings.images_to_keep)))
        # A run that was deleted and trained again has other weights.
        of_weights = facts.get("weights_sha256") == weights[unit.checkpoint.step]
        chain = not settings.progress or (CHAIN in arrays and facts.get(CHAIN) == list(settings.progress))
        return of_weights and isinstance(facts.get("seconds"), int | float) and len(arrays["images"]) >= kept and chain

    done: dict[int, list[range]] = {c.step: [] for c in checkpoints}
    skipped: set[int] = set()
    for unit, outcome in make_missing(
        pool,
        Sampler,
        [settings, extractor, measurer],
        [SampleChunk(indices, c, folder / c.path.name) for c in checkpoints for indices in chunks],
        is_current=is_current,
        stage="evaluate",
        counted="samples",
        note=lambda unit: f"step {unit.checkpoint.step:,}",
        say=pool.say,
        due=due,
    ):
        step = unit.checkpoint.step
        if outcome == "skipped":
            if step not in skipped:
                pool.say(f"evaluate: step {step:,} is skipped: the training removed it (its --keep-last) meanwhile")
            skipped.add(step)
        else:
            done[step].append(unit.indices)
            yield unit.checkpoint, sorted(done[step], key=lambda indices: indices.start), outcome


def stack_chain(batches: Sequence[Sequence[tuple[Tensor, Tensor | None]]]) -> dict[str, Tensor]:
    """A chunk's tensors [points, n, ..] of its batches' (features, logits) at each point of the chain."""
    points = list(zip(*batches, strict=True))
    stacked = {CHAIN: torch.stack([torch.cat([features for features, _ in point]) for point in points])}
    logits = [torch.cat([part for _, part in point if part is not None]) for point in points if point[0][1] is not None]
    return stacked | ({CHAIN_LOGITS: torch.stack(logits)} if logits else {})
