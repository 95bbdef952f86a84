"""What is measured between two records of a training: losses, norms, speed, memory, utilisation."""

import resource
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed

from ddpm_core import records
from ddpm_core.configs import Precision
from ddpm_core.costs import training_flops
from ddpm_core.devices import Peak, peak_flops
from ddpm_core.training import StepMetrics, TrainState
from pipelines.train.config import TrainConfig

OPEN = "open"  # the key of a last record that is not yet one: an interval's sums at a checkpoint in the middle of it


class Meter:
    """Sums since the last record, kept on the device: reading them is the only synchronisation with it."""

    def __init__(self, config: TrainConfig, device: torch.device, world_size: int) -> None:
        self._config, self._device, self._world_size = config, device, world_size
        self.peak = peak_of(device, config.execution.network_precision)
        self._reset(0.0)

    def _reset(self, waited: float) -> None:
        self._shared = torch.zeros(9, dtype=torch.float64, device=self._device)  # loss; losses, counts by quarter of t
        self._grad_norm = torch.zeros((), dtype=torch.float64, device=self._device)
        self._steps = self._timed = 0
        self._started, self._waited = time.monotonic(), waited

    def add(self, metrics: StepMetrics) -> None:
        self._shared += torch.cat([metrics.loss.reshape(1), metrics.quarter_losses, metrics.quarter_counts])
        self._grad_norm += metrics.grad_norm
        self._steps += 1
        self._timed += 1

    def open_sums(self) -> list[dict[str, Any]]:
        """Where the interval has begun: its sums over all workers, for a checkpoint in the middle of it. They are sums of
        float32 in float64, so that their order does not matter."""
        if not self._steps:
            return []
        shared = self._shared.clone()
        if self._world_size > 1:
            torch.distributed.all_reduce(shared)
        return [{OPEN: {"steps": self._steps, "shared": shared.tolist(), records.GRAD_NORM: self._grad_norm.item()}}]

    def resume(self, sums: Mapping[str, Any], rank: int) -> None:
        """Go on from open_sums(), which only rank 0 adds to what the workers share."""
        self._steps = sums["steps"]
        self._grad_norm += sums[records.GRAD_NORM]
        if rank == 0:
            self._shared += torch.tensor(sums["shared"], dtype=torch.float64, device=self._device)

    def close(self, state: TrainState, seconds_waited: float) -> dict[str, Any]:
        """The record for the steps since the last one, equal on all workers but for speed, memory and the share of the
        time spent waiting for batches. seconds_waited: the loader's, from its start."""
        if self._world_size > 1:
            # A worker's loss is its share of the batch's; the gradient norm is global already.
            torch.distributed.all_reduce(self._shared)
        loss, *quarters = self._shared.tolist()
        elapsed = time.monotonic() - self._started
        speed = self._timed * self._config.optim.batch_size / elapsed
        record = {
            "step": state.step,
            records.LOSS: loss / self._steps,
            records.GRAD_NORM: self._grad_norm.item() / self._steps,
            records.PARAM_NORM: state.parameter_norm().item(),
            records.LEARNING_RATE: self._config.optim.learning_rate(state.step - 1),
            records.IMAGES_PER_SECOND: speed,
            records.DATA_WAIT_SHARE: (seconds_waited - self._waited) / elapsed,
            records.MEMORY_GIB: self._memory() / 2**30,
        }
        for number, (total, count) in enumerate(zip(quarters[:4], quarters[4:], strict=True), 1):
            if count:
                record[records.loss_quarter(number)] = total / count
        if self.peak is not None:
            flops = speed * training_flops(self._config.unet) / self._world_size
            record[records.UTILISATION] = flops / self.peak.flops
        self._reset(seconds_waited)
        return record

    def _memory(self) -> int:
        """The most that this worker ever held, in bytes: on its GPU, or in all."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_of(device: torch.device, precision: Precision) -> Peak | None:
    """What the device that is at hand can do; None for a CPU, and a GPU that nothing is known of."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return peak_flops(properties.name, precision, properties)
