"""What each evaluation worker runs: a range of sample indices -> images, features and logits, in one file."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from ddpm_core import images, rng
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.commit import committed_file, sha256_file, write_json
from ddpm_core.features import load_extractor
from ddpm_core.inception import full_float32
from ddpm_core.samplers import Method, Spacing, sample
from ddpm_core.unet import UNet


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """The part of a protocol that a worker needs."""

    shape: tuple[int, int, int]  # (C, H, W) of a sample
    method: Method
    steps: int
    spacing: Spacing
    weights: Literal["ema", "raw"]
    seed: int
    batch_size: int
    images_to_keep: int  # the samples below this index are stored as images


@dataclass(frozen=True)
class Chunk:
    """A fixed range of a checkpoint's samples, and the folder its file goes to."""

    number: int
    indices: range
    checkpoint: Checkpoint
    folder: Path


def chunk_file(number: int) -> str:
    return f"chunk-{number:05d}.safetensors"


def finished_chunk(folder: Path, number: int) -> bool:
    """Whether a chunk is there, whole: its record, and a file of the sha256 that the record states."""
    path = folder / chunk_file(number)
    try:
        return bool(json.loads(path.with_suffix(".json").read_text())["sha256"] == sha256_file(path))
    except (OSError, ValueError, KeyError):
        return False


class ChunkWorker:
    """Holds the extractor and one checkpoint's network; makes chunks, each of which can be made again."""

    def __init__(self, settings: SampleSettings, extractor: str, image_shape: tuple[int, int, int]) -> None:
        height, width, channels = image_shape
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.extractor = load_extractor(extractor, (channels, height, width)).to(self.device)
        self.loaded: Checkpoint | None = None

    def _load(self, checkpoint: Checkpoint) -> None:
        if self.loaded is None or self.loaded.path != checkpoint.path:
            self.network = UNet(checkpoint.unet_config())
            self.network.load_state_dict(checkpoint.weights(self.settings.weights))
            self.network.to(self.device).eval()
            self.diffusion = checkpoint.diffusion_config().build().to(self.device)
            self.loaded = checkpoint

    @torch.no_grad()
    def run(self, chunk: Chunk) -> tuple[int, int]:
        """Make and commit one chunk: (the checkpoint's step, the number of samples)."""
        with full_float32(self.device):  # as the protocol says; a GPU's convolutions would round to TF32
            return self._run(chunk)

    def _run(self, chunk: Chunk) -> tuple[int, int]:
        self._load(chunk.checkpoint)
        settings, started = self.settings, time.monotonic()
        features, logits, kept = [], [], []
        for start in range(0, len(chunk.indices), settings.batch_size):
            indices = torch.tensor(chunk.indices[start : start + settings.batch_size])
            noise = rng.SampleNoise(settings.seed, indices.to(self.device), settings.shape)
            x = sample(
                self.diffusion,
                self.network,
                (len(indices), *settings.shape),
                noise=noise,
                method=settings.method,
                steps=settings.steps,
                spacing=settings.spacing,
            )
            pixels = images.to_uint8(x)
            batch_features, batch_logits = self.extractor(pixels.permute(0, 3, 1, 2).contiguous())
            features.append(batch_features.cpu())
            if batch_logits is not None:
                logits.append(batch_logits.cpu())
            kept.append(pixels[(indices < settings.images_to_keep).to(self.device)].cpu())
        tensors = {"features": torch.cat(features)}
        if logits:
            tensors["logits"] = torch.cat(logits)
        if len(torch.cat(kept)):
            tensors["images"] = torch.cat(kept)
        path = chunk.folder / chunk_file(chunk.number)
        with committed_file(path) as temporary:
            save_file(tensors, temporary)
        facts = {
            "first": chunk.indices.start,
            "stop": chunk.indices.stop,
            "sha256": sha256_file(path),
            "weights_sha256": chunk.checkpoint.weights_sha256(settings.weights),
            "seconds": time.monotonic() - started,
        }
        write_json(path.with_suffix(".json"), facts)
        return chunk.checkpoint.step, len(chunk.indices)
