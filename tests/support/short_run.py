"""What train() leaves, made in this process within a second."""

from dataclasses import asdict, replace
from pathlib import Path

from ddpm_core.checkpoint import snapshot, write_checkpoint
from ddpm_core.diffusion import DiffusionConfig
from ddpm_core.training import train_step
from pipelines.shards.dataset import ShardedDataset
from pipelines.train.config import config_for
from pipelines.train.loader import make_batch
from pipelines.train.worker import initial_state
from support.training import NETWORK, OPTIM


def short_run(digits: ShardedDataset, folder: Path, num_timesteps: int) -> Path:
    """The folder of a run of six steps over a short chain, with checkpoints at 3 and 6."""
    settings = config_for(
        "tiny",
        shards=str(digits.path),
        unet=replace(NETWORK, dropout=0.0),
        optim=OPTIM,
        diffusion=DiffusionConfig(num_timesteps=num_timesteps, beta_end=0.4),
        steps=6,
    )
    state, diffusion = initial_state(settings), settings.diffusion.build()
    for step in range(settings.steps):
        batch = make_batch(settings, digits, step, 0, 1)
        values = {name: getattr(batch, name) for name in ("x_start", "t", "noise")}
        train_step(state, diffusion, state.model, settings.optim, **values)
        if state.step in (3, 6):
            write_checkpoint(folder, snapshot(state), asdict(settings))
    return folder
