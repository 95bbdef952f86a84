"""What training costs before it is started: parameters, FLOPs, memory, disk, hours. Shapes alone; nothing is computed.

FLOPs are two a multiplication with its addition, of convolutions, products and attention, as is usual; norms and
activations, which take time but little arithmetic, are left out.
"""

import functools
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ddpm_core.configs import Execution, OptimConfig, Precision, UNetConfig
from ddpm_core.dropout import dropout_keys
from ddpm_core.errors import InputError
from ddpm_core.precision import autocast
from ddpm_core.unet import UNet

_ON_TOP = 0.35  # of the activations: gradients that pass through on top of them
_WORKSPACE = 2 << 30  # bytes for what kernels and the allocator need, and the driver


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU during a step. A floor: workspaces of kernels and the allocator's gaps come on top."""

    weights: int  # float32, and copies: bfloat16 ones, if any, and those of attention, stacked
    gradients: int  # in the wrapper's buckets (gradient_as_bucket_view); with clip_replicas, sums and buckets besides
    adam: int
    ema: int
    activations: int  # what the backward pass of one micro-batch needs at its fullest

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.adam + self.ema + self.activations


@dataclass(frozen=True)
class Plan:
    """A training run in numbers."""

    parameters: int
    forward_flops: int  # an image
    training_flops: int  # an image, forward and backward; repeats under activation checkpointing are not in it
    step_flops: int  # the global batch
    memory: Memory  # of each worker
    images_per_second: float  # over all workers
    hours: float
    checkpoint_bytes: int
    disk_bytes: int  # of all checkpoints


def plan(
    unet: UNetConfig,
    optim: OptimConfig,
    execution: Execution | None = None,
    *,
    steps: int,
    checkpoint_every: int,
    workers: int,
    peak_flops: float,
    utilisation: float,
) -> Plan:
    """A run of `steps` on `workers` GPUs of `peak_flops` each, used to the fraction `utilisation`: model FLOPs done over
    FLOPs possible (MFU), which falls by a quarter with activation checkpointing, which computes the forward pass twice.

    Raises ValueError for a utilisation outside (0, 1], a peak that is not positive, or counts below 1.
    """
    if not 0.0 < utilisation <= 1.0:
        raise ValueError(f"utilisation is {utilisation}: a fraction of the peak in (0, 1] is wanted")
    for name, value in [("steps", steps), ("checkpoint_every", checkpoint_every), ("workers", workers)]:
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be 1 or more")
    if not peak_flops > 0:
        raise ValueError(f"peak_flops is {peak_flops}: it must be positive")
    training = training_flops(unet)
    speed = workers * peak_flops * utilisation / training
    size = checkpoint_bytes(unet)
    return Plan(
        parameters=parameters(unet),
        forward_flops=forward_flops(unet),
        training_flops=training,
        step_flops=training * optim.batch_size,
        memory=memory(unet, optim, execution or Execution(), workers),
        images_per_second=speed,
        hours=steps * optim.batch_size / speed / 3600.0,
        checkpoint_bytes=size,
        disk_bytes=size * -(-steps // checkpoint_every),
    )


@functools.cache
def parameters(unet: UNetConfig) -> int:
    """How many numbers the network learns."""
    return sum(p.numel() for p in _on_meta(unet).parameters())


@functools.cache
def forward_flops(unet: UNetConfig) -> int:
    """FLOPs of one image's forward pass."""
    with FlopCounterMode(display=False) as counter:
        _on_meta(unet)(*_inputs(unet, 1, "meta"))
    return counter.get_total_flops()


@functools.cache
def training_flops(unet: UNetConfig) -> int:
    """FLOPs of one image, forward and backward: three times the forward pass, less the first layer's gradient of the image."""
    with FlopCounterMode(display=False) as counter:
        _on_meta(unet)(*_inputs(unet, 1, "meta")).sum().backward()
    return counter.get_total_flops()


def checkpoint_bytes(unet: UNetConfig) -> int:
    """Weights, EMA and Adam's two moments in float32; file headers, some 0.1 MB, come on top."""
    return 4 * 4 * parameters(unet)


def memory(unet: UNetConfig, optim: OptimConfig, execution: Execution, workers: int) -> Memory:
    """The memory of the worker with the largest share of the batch."""
    weights = 4 * parameters(unet)
    share = -(-optim.batch_size // workers)
    images = min(share, execution.micro_batch or share, optim.batch_size // optim.clip_replicas)
    copies, activations = _activations(unet, execution.network_precision, execution.activation_checkpointing)
    # The wrapper's buckets are the gradients. Clipped apart, the sum over replicas is held besides, and with several workers
    # the buckets, which are not used then, and what is exchanged.
    held_gradients = 1 if optim.clip_replicas == 1 else 2 if workers == 1 else 4
    return Memory(weights + copies, held_gradients * weights, 2 * weights, weights, images * activations)


def fit_micro_batch(
    unet: UNetConfig, optim: OptimConfig, execution: Execution, workers: int, capacity: int
) -> Execution:
    """The execution with a micro-batch for which a GPU of `capacity` bytes has room: the one asked for, else the share of a
    worker, or the largest of its halves that fits.

    Raises InputError if none does, or the one asked for cannot fit: then by the floor, which is lower if the network is
    compiled, and recomputes what is cheap.
    """
    share = -(-optim.batch_size // workers)
    if execution.micro_batch is not None:
        least = memory(unet, optim, execution, workers)
        floor = least.total - (least.activations // 2 if execution.compile else 0)
        if floor > capacity:
            raise InputError(
                f"--execution.micro-batch is {execution.micro_batch}, which needs at least {floor / 2**30:.1f} GiB of a GPU that "
                f"has {capacity / 2**30:.1f}: give fewer, --execution.activation-checkpointing, or more --workers"
            )
        return execution
    size = share
    while True:
        chosen = replace(execution, micro_batch=size if size < share else None)
        needed = memory(unet, optim, chosen, workers)
        if needed.total + int(_ON_TOP * needed.activations) + _WORKSPACE <= capacity:
            return chosen
        if size == 1:
            raise InputError(
                f"one image at a time needs about {needed.total / 2**30:.1f} GiB of a GPU that has {capacity / 2**30:.1f}: give "
                "--execution.activation-checkpointing, --execution.precision bfloat16, or a smaller network"
            )
        size = -(-size // 2)


@functools.cache
def _activations(unet: UNetConfig, precision: Precision, checkpointing: bool) -> tuple[int, int]:
    """(bytes kept whatever the batch, bytes an image): the line through batches of 16 and 32. Smaller ones are off it: a
    batch of one needs fewer copies, and among a few images another layer can be the fullest."""
    low, high = (_saved(unet, batch, precision, checkpointing) for batch in (16, 32))
    return 2 * low - high, (high - low) // 16


def _saved(unet: UNetConfig, batch: int, precision: Precision, checkpointing: bool) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, the weights' own left out. Checkpointed: the
    layers' inputs and what lies between layers, and at the fullest moment one layer's own."""
    with FakeTensorMode():
        model = UNet(unet)
        kept = _Kept(model, checkpointing)
        x, t, *key = _inputs(unet, batch, "cpu")
        with (
            torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor),
            autocast(torch.device("cpu"), precision),
        ):
            kept.add(model(x, t, *key), None)
    return kept.bytes_at_the_fullest()


class _Kept:
    """The storages that one forward pass of a network keeps, by the layer that keeps them; None for those between layers."""

    def __init__(self, model: UNet, checkpointing: bool) -> None:
        self.checkpointing = checkpointing
        self.sizes: dict[int, int] = {}  # of each storage
        self.by_layer: dict[nn.Module | None, set[int]] = defaultdict(set)
        self.layer: nn.Module | None = None  # the one that runs now
        self._alive: list[Tensor] = []  # a freed storage's number would be another's soon
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        for layer in (*model.down, model.mid1, model.mid2, *model.up):
            layer.register_forward_pre_hook(self._enter)
            layer.register_forward_hook(self._leave)

    def add(self, tensor: Any, layer: nn.Module | None) -> None:
        """Count what a tensor lies in, unless it is a weight."""
        if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._weights:
            storage = tensor.untyped_storage()
            self._alive.append(tensor)
            self.sizes[storage._cdata] = storage.nbytes()
            self.by_layer[layer].add(storage._cdata)

    def pack(self, tensor: Tensor) -> Tensor:
        """autograd's hook: it keeps this tensor."""
        self.add(tensor, self.layer)
        return tensor

    def bytes_at_the_fullest(self) -> int:
        """What lies between layers and in all of them; checkpointed, in the one that keeps most."""
        between = self.by_layer[None]
        inside = [
            sum(self.sizes[storage] for storage in storages - between)
            for layer, storages in self.by_layer.items()
            if layer is not None
        ]
        return sum(self.sizes[storage] for storage in between) + (max(inside) if self.checkpointing else sum(inside))

    def _enter(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.layer = layer

    def _leave(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.layer = None
        if self.checkpointing:
            self.add(output, None)  # the next layer's input, and a skip


def _on_meta(unet: UNetConfig) -> UNet:
    with torch.device("meta"):
        return UNet(unet)


def _inputs(unet: UNetConfig, batch: int, device: str) -> list[Tensor]:
    x = torch.zeros(batch, unet.in_channels, unet.image_size, unet.image_size, device=device)
    t = torch.zeros(batch, dtype=torch.int64, device=device)
    return [x, t, dropout_keys(0, t, unet.dropout_layers)] if unet.dropout_layers else [x, t]
