"""What each training worker runs: the steps, their batches, the records and the checkpoints."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import ray.util.queue
import torch
import torch.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ddpm_core import rng
from ddpm_core.checkpoint import list_checkpoints, save_checkpoint
from ddpm_core.training import TrainState, train_step
from ddpm_core.unet import UNet
from pipelines.shards import ShardedDataset, global_batch, rank_slice
from pipelines.training_config import TrainConfig


@dataclass(frozen=True)
class WorkerTask:
    """What the driver hands to every worker."""

    config: TrainConfig
    dataset: ShardedDataset
    folder: Path  # of the run's checkpoints
    outbox: ray.util.queue.Queue


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch."""

    x_start: Tensor  # float32 [b,C,H,W] in [-1, 1]
    t: Tensor  # int64 [b]
    noise: Tensor  # float32 [b,C,H,W]


def make_batch(config: TrainConfig, dataset: ShardedDataset, step: int, rank: int, world_size: int) -> Batch:
    """The share of worker `rank` in the batch of step `step`. Images, t, noise and flips of the whole batch are a
    function of (seed, step): position p of the stream of all steps draws them, whoever holds it."""
    size = config.optim.batch_size
    share = rank_slice(size, rank, world_size)
    indices = global_batch(len(dataset), config.seed, step, size)[share]
    positions = torch.arange(step * size, (step + 1) * size)[share]
    x_start = dataset.images(indices)
    if config.horizontal_flip:
        flip = rng.coins(config.seed, "flip", positions, 0)
        x_start = torch.where(flip[:, None, None, None], x_start.flip(3), x_start)
    t = rng.integers(config.seed, "t", positions, 0, config.diffusion.num_timesteps)
    noise = rng.normal(config.seed, "noise", positions, 0, x_start.shape[1:])
    return Batch(x_start, t, noise)


def initial_state(config: TrainConfig) -> TrainState:
    """The state before the first step: weights from the seed, drawn on the CPU, the global generator left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive_seed(config.seed, "weights"))
        model = UNet(config.unet)
    return TrainState(model, config.optim)


def run_worker(arguments: dict[str, Any]) -> None:
    """Train from the newest checkpoint to the last step. Runs in each of Ray Train's workers."""
    task: WorkerTask = arguments["task"]
    config = task.config
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()

    state = initial_state(config)
    state.to(device)
    checkpoints = [c for c in list_checkpoints(task.folder) if c.step <= config.steps]
    if checkpoints:
        checkpoints[-1].restore(state)
    diffusion = config.diffusion.build().to(device)
    denoise_fn: torch.nn.Module = state.model
    if world_size > 1:
        denoise_fn = DistributedDataParallel(state.model, device_ids=[device] if device.type == "cuda" else None)
    denoise_fn.train()

    def send(message: dict[str, Any]) -> None:
        if rank == 0:
            task.outbox.put(message)

    send({"kind": "start", "step": state.step})
    interval = Interval(device)
    history: list[dict[str, float]] = []
    while state.step < config.steps:
        batch = make_batch(config, task.dataset, state.step, rank, world_size)
        # Dropout draws from the process's generator: seeded by step, so that a resumed run draws the same.
        torch.manual_seed(rng.derive_seed(config.seed, "dropout", state.step, rank))
        metrics = train_step(
            state,
            diffusion,
            denoise_fn,
            config.optim,
            x_start=batch.x_start.to(device),
            t=batch.t.to(device),
            noise=batch.noise.to(device),
            world_size=world_size,
        )
        interval.add(metrics.loss, metrics.grad_norm)
        due = state.step % config.checkpoint_every == 0 or state.step == config.steps
        if due or state.step % config.log_every == 0:
            record = interval.close(state.step, config)
            if not np.isfinite([record["loss"], record["grad_norm"]]).all():
                kept = f"step {checkpoints[-1].step:,}" if checkpoints else "none"
                send(
                    {
                        "kind": "diverged",
                        "text": f"the loss or gradient of {task.folder.name} is not finite by step {state.step:,} (loss "
                        f"{record['loss']}, gradient norm {record['grad_norm']}, learning rate {record['lr']:g}); the last "
                        f"good checkpoint is {kept}: lower --optim.lr or choose another objective",
                    }
                )
                return
            history.append(record)
            send({"kind": "record", "record": record})
        if due:
            if rank == 0:
                save_checkpoint(task.folder, state, asdict(config), history)
            history = []
            checkpoints = list_checkpoints(task.folder)[-1:]


class Interval:
    """Means since the last record, kept on the device: reading them is the only synchronisation with it."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._steps = 0
        self._started = time.monotonic()

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        self._sums += torch.stack([loss, grad_norm]).to(torch.float64)
        self._steps += 1

    def close(self, step: int, config: TrainConfig) -> dict[str, float]:
        """The record for the steps since the last one, equal on all workers but for the speed."""
        if torch.distributed.is_initialized():
            # A worker's loss is its share of the batch's; the gradient norm is global already.
            torch.distributed.all_reduce(self._sums[:1])
        loss, grad_norm = (self._sums / self._steps).tolist()
        now = time.monotonic()
        speed = self._steps * config.optim.batch_size / (now - self._started)
        self._sums.zero_()
        self._steps, self._started = 0, now
        lr = config.optim.learning_rate(step - 1)
        return {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "images_per_second": speed}
