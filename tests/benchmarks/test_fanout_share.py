"""How much of the time of an evaluation its workers sample, from the start of the pool to the last chunk."""

import time
from pathlib import Path

import pytest
import torch

from ddpm_core.checkpoint import Checkpoint, snapshot, write_checkpoint
from ddpm_core.protocol import Protocol
from ddpm_core.training import Execution, OptimConfig, TrainState
from ddpm_core.unet import UNet, UNetConfig
from pipelines.evaluate.worker import SampleSettings, sample_checkpoints
from pipelines.runtime.fan_out import Pool
from pipelines.storage.chunks import chunk_ranges, load_chunk

pytestmark = pytest.mark.bench
WORKERS, CHUNKS_EACH, CHUNK, BATCH = 2, 8, 96, 48


def random_checkpoint(folder: Path) -> Checkpoint:
    """Of a small network at 32x32 that was never trained: sampling takes as long."""
    network = UNetConfig(image_size=32, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(16,), dropout=0.0)
    torch.manual_seed(0)
    state = TrainState(UNet(network), OptimConfig(batch_size=8), Execution())
    config = {"unet": network.__dict__, "diffusion": {"num_timesteps": 1000}}
    return write_checkpoint(folder, snapshot(state), config)


def test_workers_sample_nearly_all_of_the_time(ray_session: None, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path)
    chunks = chunk_ranges(WORKERS * CHUNKS_EACH * CHUNK, CHUNK)
    settings = SampleSettings(
        protocol=Protocol(
            num_samples=chunks[-1].stop,
            seed=0,
            sampler="ddim",
            sampler_steps=15,
            spacing="uniform",
            clip_denoised=True,
            weights="ema",
            batch_size=BATCH,
            precision="float32",
            extractor="pixels",
            extractor_sha256="",
            resize="",
            reference="",
            reference_sha256="",
            reference_images=0,
        ),
        shape=(3, 32, 32),
        compile=False,
        images_to_keep=0,
    )
    started = time.monotonic()
    with Pool(WORKERS, 1.0, print) as pool:
        made = sample_checkpoints([checkpoint], chunks, tmp_path / "samples", settings, "pixels", pool)
        done = [len(so_far) for _, so_far, _ in made]
    wall = time.monotonic() - started
    folder = tmp_path / "samples" / checkpoint.path.name
    seconds = [load_chunk(folder, indices)[1]["seconds"] for indices in chunks]
    share = sum(seconds) / (WORKERS * wall)
    print(f"\n{len(done)} chunks of {min(seconds):.1f} to {max(seconds):.1f} s on {WORKERS} workers: busy {share:.1%}")
    assert share >= 0.95
