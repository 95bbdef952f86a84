"""Sampling: the missing chunks of checkpoints' samples and their features, by a pool of workers."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ddpm_core import images, rng
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.errors import DivergedError, InputError
from ddpm_core.features import load_extractor
from ddpm_core.inception import full_float32
from ddpm_core.latents import capture
from ddpm_core.samplers import Method, Spacing, sample_steps
from pipelines.checkpoints.network import NetworkHolder, Precision
from pipelines.evaluate.chain import PROGRESS, holds_progress, stack_progress
from pipelines.runtime.chunks import missing_chunks, save_chunk
from pipelines.runtime.fan_out import Pool
from pipelines.runtime.progress import Progress, Say


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """The part of a protocol that a worker needs."""

    shape: tuple[int, int, int]  # (C, H, W) of a sample
    method: Method
    steps: int
    spacing: Spacing
    weights: Literal["ema", "raw"]
    seed: int
    purpose: str  # of the noise: samples to choose a checkpoint by, or to report its numbers
    batch_size: int
    precision: Precision
    compile: bool
    images_to_keep: int  # the samples below this index are stored as images
    progress: tuple[int, ...] = ()  # timesteps whose predictions of x_0 are measured too


@dataclass(frozen=True)
class SampleChunk:
    """A fixed range of a checkpoint's samples, and the folder its file goes to."""

    indices: range
    checkpoint: Checkpoint
    folder: Path


class Sampler:
    """The worker: holds the extractor and one checkpoint's network; makes chunks, each of which can be made again."""

    def __init__(self, settings: SampleSettings, extractor: str, image_shape: tuple[int, int, int]) -> None:
        height, width, channels = image_shape
        self.settings = settings
        self.networks = NetworkHolder(settings.weights, settings.precision, compile=settings.compile)
        self.device = self.networks.device
        self.extractor = load_extractor(extractor, (channels, height, width)).to(self.device)

    @torch.no_grad()
    def run(self, chunk: SampleChunk) -> bool:
        """Make and commit one chunk; False where the training has removed its checkpoint meanwhile."""
        started = time.monotonic()
        try:
            model = self.networks.of(chunk.checkpoint)
        except InputError:
            if (chunk.checkpoint.path / MANIFEST).is_file():
                raise
            return False
        with full_float32(self.device):  # as the protocol says; a GPU's convolutions would round to TF32
            tensors = self._draw(*model, chunk)
        seconds = time.monotonic() - started
        weights = chunk.checkpoint.weights_sha256(self.settings.weights)
        facts = {"weights_sha256": weights, "seconds": seconds, PROGRESS: list(self.settings.progress)}
        save_chunk(chunk.folder, chunk.indices, tensors, facts)
        return True

    def _draw(self, diffusion: GaussianDiffusion, network: DenoiseFn, chunk: SampleChunk) -> dict[str, Tensor]:
        settings, wanted = self.settings, chunk.indices
        features, logits, kept, progress = [], [], [], []
        for start in range(0, len(wanted), settings.batch_size):
            indices = torch.tensor(wanted[start : start + settings.batch_size])
            noise = rng.SampleNoise(settings.seed, indices.to(self.device), settings.shape, purpose=settings.purpose)
            chain = sample_steps(
                diffusion,
                network,
                (len(indices), *settings.shape),
                noise=noise,
                method=settings.method,
                steps=settings.steps,
                spacing=settings.spacing,
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
            tensors |= stack_progress(progress)
        return tensors

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(uint8 pixels [b,h,w,c], features, logits) of images [b,c,h,w], the last two on the CPU."""
        pixels = images.to_uint8(x)
        features, logits = self.extractor(pixels.permute(0, 3, 1, 2).contiguous())
        return pixels, features.cpu(), logits if logits is None else logits.cpu()


def sample_checkpoints(
    checkpoints: Sequence[Checkpoint],
    chunks: Sequence[range],
    folder: Path,
    settings: SampleSettings,
    extractor: str,
    pool: Pool,
    say: Say,
) -> Iterator[tuple[Checkpoint, list[range]]]:
    """Make what is missing in folder/step-...; with each chunk, (its checkpoint, that one's chunks so far in order). First
    come the checkpoints whose chunks are all there; one that is removed meanwhile is left out."""

    def missing_of(checkpoint: Checkpoint) -> list[range]:
        weights = checkpoint.weights_sha256(settings.weights)  # a run that was deleted and trained again has others

        def wanted(tensors: dict[str, Tensor], facts: dict[str, Any]) -> bool:
            images = len(range(facts["first"], min(facts["stop"], settings.images_to_keep)))
            whole = facts["weights_sha256"] == weights and len(tensors["images"]) >= images
            return whole and holds_progress(tensors, facts, settings.progress)

        def tell(path: Path, error: InputError) -> None:
            say(f"evaluate: {str(error).rsplit(': ', 1)[0]}: it is made again")

        return missing_chunks(folder / checkpoint.path.name, chunks, wanted, tell)

    missing = {c.step: missing_of(c) for c in checkpoints}
    yield from ((c, list(chunks)) for c in checkpoints if not missing[c.step])
    done = {c.step: [indices for indices in chunks if indices not in missing[c.step]] for c in checkpoints}
    units = [SampleChunk(indices, c, folder / c.path.name) for c in checkpoints for indices in missing[c.step]]
    if not units:
        return
    channels, height, width = settings.shape
    progress = Progress("evaluate", sum(len(unit.indices) for unit in units), "samples", say)
    arguments = [settings, extractor, (height, width, channels)]
    gone: set[int] = set()
    for number, made in pool.fan_out(Sampler, arguments, units):
        unit = units[number]
        if not made:
            if unit.checkpoint.step not in gone:
                say(
                    f"evaluate: step {unit.checkpoint.step:,} is skipped: the training removed it (its --keep-last) meanwhile"
                )
            gone.add(unit.checkpoint.step)
            continue
        done[unit.checkpoint.step].append(unit.indices)
        progress.advance(len(unit.indices), f"step {unit.checkpoint.step:,}")
        yield unit.checkpoint, sorted(done[unit.checkpoint.step], key=lambda indices: indices.start)
