"""What training costs before it is started: parameters, FLOPs, memory, disk, hours.

FLOPs are two a multiplication with its addition, of convolutions, products and attention, as is usual; norms and
activations, which take time but little arithmetic, are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ddpm_core.configs import TRACKED_LENGTHS, Execution, OptimConfig, Precision, UNetConfig
from ddpm_core.errors import InputError

_ON_TOP = 0.35  # of the activations: gradients that pass through on top of them
_WORKSPACE = 2 << 30  # bytes for what kernels and the allocator need, and the driver


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU during a step. A floor: workspaces of kernels and the allocator's gaps come on top."""

    weights: int  # float32, and copies: bfloat16 ones, if any, and those of attention, stacked
    gradients: int  # in the wrapper's buckets (gradient_as_bucket_view); with clip_replicas, sums and buckets besides
    adam: int
    ema: int  # and averages tracked besides
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
    size = checkpoint_bytes(unet, optim)
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


def parameters(unet: UNetConfig) -> int:
    """How many numbers the network learns."""
    ch = unet.ch
    outside = (ch + 1) * 4 * ch + (4 * ch + 1) * 4 * ch  # the timestep's two layers
    outside += (9 * unet.in_channels + 1) * ch
    width = unet.ch_mult[0] * ch
    outside += 2 * width + (9 * width + 1) * _out_channels(unet)  # norm_out, conv_out
    return outside + sum(layer.parameters for layer in _layers(unet))


def forward_flops(unet: UNetConfig) -> int:
    """FLOPs of one image's forward pass."""
    ch, pixels, last = unet.ch, unet.image_size**2, unet.ch_mult[0] * unet.ch * _out_channels(unet)
    products = ch * 4 * ch + (4 * ch) ** 2 + 9 * pixels * (unet.in_channels * ch + last)
    return 2 * (products + sum(layer.products for layer in _layers(unet)))


def training_flops(unet: UNetConfig) -> int:
    """FLOPs of one image, forward and backward: three times the forward pass, less the gradients of what is not learned, the
    image and the timestep's embedding."""
    unneeded = 9 * unet.image_size**2 * unet.in_channels * unet.ch + unet.ch * 4 * unet.ch
    return 3 * forward_flops(unet) - 2 * unneeded


def checkpoint_bytes(unet: UNetConfig, optim: OptimConfig) -> int:
    """Weights, EMA and Adam's two moments in float32, and averages tracked besides; file headers, some 0.1 MB, come on top."""
    return (4 + _tracked(optim)) * 4 * parameters(unet)


def averages_bytes(unet: UNetConfig, optim: OptimConfig) -> int:
    """The tracked averages of one step, which stay when its checkpoint is deleted."""
    return _tracked(optim) * 4 * parameters(unet)


def _tracked(optim: OptimConfig) -> int:
    return len(TRACKED_LENGTHS) if optim.posthoc_ema else 0


def memory(unet: UNetConfig, optim: OptimConfig, execution: Execution, workers: int) -> Memory:
    """The memory of the worker with the largest share of the batch."""
    weights = 4 * parameters(unet)
    share = -(-optim.batch_size // workers)
    images = min(share, execution.micro_batch or share, optim.batch_size // optim.clip_replicas)
    copies, activations = _activations(unet, execution.network_precision, execution.activation_checkpointing)
    # The wrapper's buckets are the gradients. Clipped apart, the sum over replicas is held besides, and with several workers
    # the buckets, which are not used then, and what is exchanged.
    held_gradients = 1 if optim.clip_replicas == 1 else 2 if workers == 1 else 4
    averages = (1 + _tracked(optim)) * weights
    return Memory(weights + copies, held_gradients * weights, 2 * weights, averages, images * activations)


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


def _out_channels(unet: UNetConfig) -> int:
    return unet.out_channels or unet.in_channels


@dataclass(frozen=True)
class _Block:
    """A residual block with or without attention, by its shapes. fresh: it reads what is no layer's output, the first
    convolution's or [h, skip]."""

    ch: int
    into: int
    out: int
    side: int
    attention: bool
    dropout: bool
    fresh: bool

    @property
    def outputs(self) -> int:
        return self.out * self.side**2

    @property
    def _weights(self) -> int:
        """Of its products, less those of q, k and v."""
        shortcut = self.into * self.out if self.into != self.out else 0
        projection = self.out**2 if self.attention else 0
        return 9 * (self.into + self.out) * self.out + 4 * self.ch * self.out + shortcut + projection

    @property
    def parameters(self) -> int:
        biases = (4 if self.into != self.out else 3) * self.out
        norms = 2 * (self.into + self.out)
        attention = 3 * self.out**2 + 4 * self.out + 2 * self.out if self.attention else 0
        return self._weights + biases + norms + attention

    @property
    def products(self) -> int:
        pixels, timestep = self.side**2, 4 * self.ch * self.out
        attention = 3 * self.out**2 * pixels + 2 * self.out * pixels**2 if self.attention else 0
        return (self._weights - timestep) * pixels + timestep + attention

    def saved(self, batch: int, width: int, checkpointing: bool) -> int:
        """Bytes of what it keeps, in products of `width` bytes a number. Norms and swish read and write float32; what a
        product reads is a copy in bfloat16, and so are its weights."""
        pixels, low, held = self.side**2, width == 2, checkpointing and not self.fresh
        into, out = self.into * pixels, self.out * pixels
        each = _norm_saved(self.into, pixels) - (4 * into if held and not low else 0)
        each += 4 * into + width * into  # what the swish reads, and conv1
        each += width * 2 * 4 * self.ch  # the timestep's embedding before and after its swish
        each += _norm_saved(self.out, pixels) + 4 * out + width * out
        each += 4 * out if self.dropout else 0  # which units stay
        each += width * into if self.into != self.out and low and not held else 0  # what the shortcut reads
        fixed = 2 * self._weights if low else 0
        if self.attention:
            # [q, k, v] with its input and stacked weights, the softmax's logarithms of sums, and what it gives
            each += _norm_saved(self.out, pixels) + width * 5 * out + 4 * pixels
            fixed += width * 3 * self.out**2
        return fixed + batch * each


@dataclass(frozen=True)
class _Resample:
    """A convolution that follows a change of resolution to or from `side`. read: the pixels of its input, with those that
    are padded."""

    channels: int
    side: int
    read: int

    @property
    def outputs(self) -> int:
        return self.channels * self.side**2

    @property
    def parameters(self) -> int:
        return (9 * self.channels + 1) * self.channels

    @property
    def products(self) -> int:
        return 9 * self.channels**2 * self.side**2

    def saved(self, batch: int, width: int, checkpointing: bool) -> int:
        """Bytes of what it keeps: its input, and in bfloat16 a copy of its weights."""
        return batch * width * self.channels * self.read + (2 * 9 * self.channels**2 if width == 2 else 0)


def _norm_saved(channels: int, pixels: int) -> int:
    """Bytes that a group norm keeps of an image: what it reads, in float32, and 32 means and inverse deviations."""
    return 4 * channels * pixels + 2 * 4 * 32


def _layers(unet: UNetConfig) -> Iterator[_Block | _Resample]:
    """The U-Net between its first convolution and its last norm, as ddpm_core.unet.UNet builds it."""
    ch = unet.ch

    def block(into: int, out: int, side: int, fresh: bool = False, attention: bool | None = None) -> _Block:
        attends = side in unet.attn_resolutions if attention is None else attention
        return _Block(ch, into, out, side, attends, unet.dropout > 0, fresh)

    sides = [unet.image_size // 2**level for level in range(len(unet.ch_mult))]
    levels = list(zip([ch * factor for factor in unet.ch_mult], sides, strict=True))
    skips, now = [ch], ch
    for level, (width, side) in enumerate(levels):
        for _ in range(unet.num_res_blocks):
            yield block(now, width, side, fresh=len(skips) == 1)
            now = width
            skips.append(now)
        if level + 1 < len(levels):
            yield _Resample(now, side // 2, (side + 1) ** 2)
            skips.append(now)
    yield block(now, now, sides[-1], attention=True)
    yield block(now, now, sides[-1], attention=False)
    for level, (width, side) in reversed(list(enumerate(levels))):
        for _ in range(unet.num_res_blocks + 1):
            yield block(now + skips.pop(), width, side, fresh=True)
            now = width
        if level:
            yield _Resample(now, 2 * side, (2 * side) ** 2)


def _activations(unet: UNetConfig, precision: Precision, checkpointing: bool) -> tuple[int, int]:
    """(bytes kept whatever the batch, bytes an image): the line through batches of 16 and 32. Smaller ones are off it: a
    batch of one needs fewer copies, and among a few images another layer can be the fullest."""
    low, high = (_saved(unet, batch, precision, checkpointing) for batch in (16, 32))
    return 2 * low - high, (high - low) // 16


def _saved(unet: UNetConfig, batch: int, precision: Precision, checkpointing: bool) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, the weights' own left out. Checkpointed: the
    layers' inputs and what lies between layers, and at the fullest moment one layer's own."""
    width, ch, pixels = 2 if precision == "bfloat16" else 4, unet.ch, unet.image_size**2
    # The embedding, the timestep's first layer before and after its swish, and the image, each as a product's input.
    each = width * (ch + 2 * 4 * ch + unet.in_channels * pixels)
    fixed = 2 * ((4 * ch) ** 2 + 9 * unet.in_channels * ch) if width == 2 else 0
    layers = list(_layers(unet))
    if checkpointing:
        each += sum(width * layer.outputs for layer in layers)  # the next layer's input, and a skip
    last = unet.ch_mult[0] * ch
    held = checkpointing and width == 4  # what norm_out reads is a layer's output, counted above
    each += _norm_saved(last, pixels) - (4 * last * pixels if held else 0) + 4 * last * pixels + width * last * pixels
    each += width * _out_channels(unet) * pixels
    fixed += 2 * 9 * last * _out_channels(unet) if width == 2 else 0
    inside = [layer.saved(batch, width, checkpointing) for layer in layers]
    return fixed + batch * each + (max(inside) if checkpointing else sum(inside))
