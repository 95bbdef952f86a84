"""The batches of a training run: each a pure function of the configuration, the data and the step, made ahead of time."""

import functools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from ddpm_core import images, rng
from ddpm_core.dropout import dropout_keys
from ddpm_core.training import Batch
from pipelines.shards.dataset import ShardedDataset
from pipelines.shards.order import rank_slice
from pipelines.train.config import TrainConfig

DEPTH = 4  # batches ahead of the one in use, each made by a thread
RESIDENT_BYTES = 2 << 30  # a data set up to this size, and a quarter of what is free there, lives on the CUDA device
COPY_BYTES = 64 << 20  # of a data set at a time, on its way there


def make_batch(config: TrainConfig, dataset: ShardedDataset, step: int, rank: int, world_size: int) -> Batch:
    """The share of worker `rank` in the batch of step `step`, on the CPU. Images, t, noise, flips and dropout of the whole
    batch are a function of (seed, step): position p of the stream of all steps draws them, whoever holds it."""
    pixels = torch.from_numpy(dataset.pixels(share_indices(config, dataset, step, rank, world_size)))
    return draw(config, pixels, step, rank, world_size)


def share_indices(config: TrainConfig, dataset: ShardedDataset, step: int, rank: int, world_size: int) -> np.ndarray:
    """The images of a worker's share, int64 [b]."""
    size = config.optim.batch_size
    return dataset.global_batch(config.seed, step, size, config.shuffle_window)[rank_slice(size, rank, world_size)]


def draw(config: TrainConfig, pixels: Tensor, step: int, rank: int, world_size: int) -> Batch:
    """A batch from its pixels, uint8 [b,H,W,C], on whichever device they are. t and flips are equal on every device,
    the noise to float32 rounding."""
    return draw_at(config, pixels, positions_of(config, step, rank, world_size, pixels.device))


def positions_of(config: TrainConfig, step: int, rank: int, world_size: int, device: torch.device) -> Tensor:
    """The places of a worker's share in the stream of all steps' batches, int64 [b]."""
    share = rank_slice(config.optim.batch_size, rank, world_size)
    first = step * config.optim.batch_size
    return torch.arange(first + share.start, first + share.stop, device=device)


def draw_at(config: TrainConfig, pixels: Tensor, positions: Tensor) -> Batch:
    """draw() of tensors alone, which compiles into a few kernels."""
    x_start = images.to_float(pixels)
    if config.horizontal_flip:
        flip = rng.coins(config.seed, "flip", positions, 0)
        x_start = torch.where(flip[:, None, None, None], x_start.flip(3), x_start)
    t = rng.integers(config.seed, "t", positions, 0, config.diffusion.num_timesteps)
    noise = rng.normal(config.seed, "noise", positions, 0, x_start.shape[1:])
    layers = config.unet.dropout_layers
    return Batch(x_start, t, noise, dropout_keys(config.seed, positions, layers) if layers else None)


class Loader(Iterator[Batch]):
    """Batches of the steps `first_step` to `config.steps` - 1 on `device`, made ahead by threads so that a training step
    need not wait. An exception in a thread is raised where its batch is asked for.

    To a CUDA device go 8-bit pixels, from pinned memory; floats, flips and noise are made there. A small data set goes
    there once, as a whole.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: ShardedDataset,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        first_step: int = 0,
        depth: int = DEPTH,
    ) -> None:
        self.seconds_waited = 0.0  # in next(), for batches that were not ready
        self._config, self._dataset = config, dataset
        self._rank, self._world_size = rank, world_size
        self._device, self._cuda = device, device.type == "cuda"
        # 500 kernels of a microsecond each, as they are.
        compiled = self._cuda and config.execution.compile
        self._draw_at = torch.compile(draw_at, fullgraph=True, dynamic=False) if compiled else draw_at
        self._resident = _on_device(dataset, device) if self._cuda else None
        self._pool = ThreadPoolExecutor(
            depth,
            thread_name_prefix="loader",
            # Pinned memory belongs to a thread's current device.
            initializer=functools.partial(torch.cuda.set_device, device) if self._cuda else None,
        )
        self._depth, self._step, self._submitted = depth, first_step, first_step
        self._ahead: deque[Future[Batch | Tensor]] = deque()
        self._submit()

    def __next__(self) -> Batch:
        if self._step >= self._config.steps:
            raise StopIteration
        started = time.monotonic()
        made = self._ahead.popleft().result()
        self.seconds_waited += time.monotonic() - started
        step, self._step = self._step, self._step + 1
        self._submit()
        return made if isinstance(made, Batch) else self._finish(made, step)

    def close(self) -> None:
        """End the threads: at once, but for batches in the making, for which nobody waits."""
        self._pool.shutdown(wait=False)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _submit(self) -> None:
        """Have the next `depth` batches made."""
        for step in range(self._submitted, min(self._step + self._depth, self._config.steps)):
            self._ahead.append(self._pool.submit(self._make, step))
            self._submitted = step + 1

    def _make(self, step: int) -> Batch | Tensor:
        """In a thread. On the CPU the whole batch; for CUDA pixels, or indices into the pixels there, in pinned memory."""
        config, dataset, rank, world_size = self._config, self._dataset, self._rank, self._world_size
        if not self._cuda:
            return make_batch(config, dataset, step, rank, world_size)
        indices = share_indices(config, dataset, step, rank, world_size)
        return torch.from_numpy(indices if self._resident is not None else dataset.pixels(indices)).pin_memory()

    def _finish(self, made: Tensor, step: int) -> Batch:
        """On the device, in the caller's stream. The pinned memory is not used again before its copy is done: torch's
        allocator sees to that."""
        moved = made.to(self._device, non_blocking=True)  # pixels, or indices into the resident ones
        pixels = moved if self._resident is None else self._resident[moved]
        return self._draw_at(
            self._config, pixels, positions_of(self._config, step, self._rank, self._world_size, self._device)
        )


def _on_device(dataset: ShardedDataset, device: torch.device) -> Tensor | None:
    """All pixels on a CUDA device, uint8 [n,H,W,C], if they fit."""
    free, _ = torch.cuda.mem_get_info(device)
    if dataset.nbytes > min(RESIDENT_BYTES, free // 4):
        return None
    everything = torch.empty((len(dataset), *dataset.shape), dtype=torch.uint8, device=device)
    rows = max(1, COPY_BYTES // int(np.prod(dataset.shape)))
    for first in range(0, len(dataset), rows):
        part = range(first, min(first + rows, len(dataset)))
        everything[part.start : part.stop] = torch.from_numpy(dataset.pixels(part)).to(device)
    return everything
