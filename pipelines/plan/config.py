"""What is to be planned, as a value."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from ddpm_core.presets import PRESETS
from ddpm_core.ranges import Name, Positive, Range
from pipelines.runtime.options import Checked

PresetName = Literal["cifar10", "celebahq256", "lsun_church", "lsun_bedroom", "lsun_bedroom_large", "lsun_cat", "tiny"]
assert get_args(PresetName) == tuple(PRESETS)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Checked):
    """The work: a data set, a training of it, and what comes after; and the cluster."""

    model: PresetName = "lsun_church"
    """The preset whose network, batch and steps are planned for."""
    images: Positive[int] = 126_227
    """Images of the data set; by default LSUN Church's."""
    workers: Positive[int] = 8
    """GPUs of the cluster."""
    train_workers: Positive[int] = 8
    """GPUs of one training, at most one for each image of its batch."""
    cpus: Positive[int] = 64
    """CPUs that preprocessing may use."""
    gpu: Name = "H100 80GB HBM3"
    """The GPUs' name, as torch.cuda.get_device_name says it."""
    utilisation: Annotated[float, Range("a share above 0, at most 1", low=0, above=True, high=1)] = 0.3
    """Model FLOPs done over FLOPs possible; assumed, until a training here has shown it."""
    bandwidth: Positive[float] = 50.0
    """GB/s at which a GPU exchanges gradients, in each direction; by default an InfiniBand port of 400 Gbit/s."""
    checkpoints: Positive[int] | None = None
    """Checkpoints that are evaluated; by default as many as a training keeps."""
    samples: Positive[int] = 50_000
    """Of each checkpoint."""
    sampler_steps: Positive[int] | None = None
    """Network passes a sample; all timesteps by default."""
    batch_size: Positive[int] = 250
    """Samples a network sees at once; a part of the protocol."""
    chunk_size: Positive[int] = 500
    """Samples a unit of work; no part of the protocol."""
    trials: Positive[int] = 6
    """Trainings of a sweep, each with its evaluation."""
    hours: Positive[float] = 8.0
    """Of a night."""
    stragglers: Annotated[float, Range("a share from 0 to below 1", low=0, high=1, below=True)] = 0.001
    """The share of chunks that take three times as long; assumed."""
    loss_hours: Positive[float] = 50_000.0
    """GPU-hours between two lost workers; by default as the training of Llama 3 405B counts them on 16,384 H100s (419 unexpected
    interruptions in 54 days), which no preemptible node reaches."""
    json: bool = False
    """Print JSON instead of the page."""
