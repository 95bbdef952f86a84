"""One training step (Algorithm 1) on a batch that the caller made. No loop, no data, no randomness of its own."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.distributed
from torch import Tensor, nn

from ddpm_core.configs import TRACKED_LENGTHS
from ddpm_core.configs import Execution as Execution
from ddpm_core.configs import OptimConfig as OptimConfig
from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.ema import Ema, PowerEma
from ddpm_core.precision import compile_network, in_precision
from ddpm_core.unet import UNet

QUARTERS = 4  # of 0..T-1, whose losses are recorded apart


class TrainState:
    """Everything a step reads and writes: model, EMA, optimizer, and `step`, the number of updates done; and the averages that
    post-hoc EMA is made of, by their length, none by default.

    first_bad: float64 [3] on the device, (step, loss, gradient norm) of the first update whose loss or gradient was not
    finite; (inf, 0, 0) while there is none. The update itself is made, nothing is masked: whoever saves the state looks
    here first, and at parameter_norm(), and keeps the checkpoint before.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, execution: Execution | None = None) -> None:
        self.model, self.execution = model, execution or Execution()
        if self.execution.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.execution.activation_checkpointing:
            if not isinstance(model, UNet):
                raise ValueError(f"activation_checkpointing is on for a {type(model).__name__}: a UNet is wanted")
            model.activation_checkpointing = True
        if self.execution.compile:
            compile_network(model)
        self.ema = Ema(model, config.ema_decay, config.ema_start)
        lengths = TRACKED_LENGTHS if config.posthoc_ema else ()
        self.averages = {f"{length:g}": PowerEma(model, length) for length in lengths}
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=config.lr, betas=config.adam_betas, eps=config.adam_eps
        )
        self.step = 0
        self.to(next(model.parameters()).device)

    def to(self, device: torch.device) -> None:
        """Move weights and EMA to a device; to be called before the first step."""
        self.model.to(device)
        for ema in (self.ema, *self.averages.values()):
            ema.to(device)
        self.first_bad = torch.tensor([torch.inf, 0.0, 0.0], dtype=torch.float64, device=device)
        fused = self.execution.fused_adam
        for group in self.optimizer.param_groups:
            # None, not False, which would also turn PyTorch's default, foreach, off.
            group["fused"] = (device.type in ("cpu", "cuda") if fused is None else fused) or None

    def parameter_norm(self) -> Tensor:
        """The Euclidean norm of all weights, on the device; not finite if an update overflowed."""
        return nn.utils.get_total_norm([p.detach() for p in self.model.parameters()])

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            **({"averages": self._averages()} if self.averages else {}),
        }

    def _averages(self) -> dict[str, Tensor]:
        """What post-hoc EMA is made of, by its length and the weight's name."""
        named = ((length, ema.state_dict()) for length, ema in self.averages.items())
        return {f"{length}/{name}": tensor for length, state in named for name, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state of any execution: moments come into this one's layout, kernels stay this one's."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for length, ema in self.averages.items():
            ema.load_state_dict(averages_of(state["averages"], length))
        saved, fused = state["optimizer"], self.optimizer.param_groups[0]["fused"]
        self.optimizer.load_state_dict(
            {**saved, "param_groups": [{**group, "fused": fused} for group in saved["param_groups"]]}
        )
        for parameter, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # a fused kernel reads them in the order of the weights
                moments[name] = torch.empty_like(parameter).copy_(moments[name])
        self.step = state["step"]


def averages_of(averages: Mapping[str, Tensor], length: str) -> dict[str, Tensor]:
    """Of the tracked averages, that of one length, by the weights' names."""
    prefix = f"{length}/"
    return {name.removeprefix(prefix): tensor for name, tensor in averages.items() if name.startswith(prefix)}


class StepMetrics(NamedTuple):
    """What a step measured, left on the device: reading it is the caller's choice, and a synchronisation."""

    # Of this worker's images, times their share of the global batch: the sum over workers is the loss.
    loss: Tensor
    # Of the global gradient, before the clip; with clip_replicas, the mean over the replicas.
    grad_norm: Tensor
    # [4] the sums of this worker's losses by quarter of 0..T-1, and how many there were: both add up over steps and workers.
    quarter_losses: Tensor
    quarter_counts: Tensor


class Batch(NamedTuple):
    """One worker's share of a global batch, or a part of it."""

    x_start: Tensor  # float32 [b,C,H,W] in [-1, 1]
    t: Tensor  # int64 [b]
    noise: Tensor  # float32 [b,C,H,W]
    dropout_key: Tensor | None  # int32 [b,layers,2], as UNet takes it; None if the network drops nothing

    def split(self, size: int) -> "list[Batch]":
        columns = self.x_start.split(size), self.t.split(size), self.noise.split(size)
        keys = [None] * len(columns[0]) if self.dropout_key is None else self.dropout_key.split(size)
        return [Batch(*parts) for parts in zip(*columns, keys, strict=True)]


def train_step(
    state: TrainState,
    diffusion: GaussianDiffusion,
    denoise_fn: Callable[..., Tensor],
    config: OptimConfig,
    *,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    dropout_key: Tensor | None = None,
    world_size: int = 1,
) -> StepMetrics:
    """One update of weights and EMA from this worker's share of the global batch.

    x_start, noise: [b,C,H,W]; t: [b]; dropout_key: as UNet takes it. denoise_fn: the model, or its
    DistributedDataParallel wrapper, which averages gradients over `world_size` workers. The loss is the mean over the
    global batch of config.batch_size images, however they are shared out and whatever state.execution cuts a share into;
    workers exchange gradients once. Raises ValueError if config.clip_replicas asks for parts that the share is not made of.
    """
    for group in state.optimizer.param_groups:
        group["lr"], group["eps"] = config.learning_rate(state.step), config.epsilon(state.step)
    state.optimizer.zero_grad(set_to_none=True)
    share = Batch(x_start, t, noise, dropout_key)
    if config.clip_replicas == 1:
        # The wrapper averages gradients over the workers: times world_size, they add up to the global batch's.
        losses = _backward(state, diffusion, denoise_fn, share, config.batch_size, world_size, exchange=True)
        grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip)
    else:
        losses, grad_norm = _clip_replicas(state, diffusion, denoise_fn, share, config, world_size)
    state.optimizer.step()
    for ema in (state.ema, *state.averages.values()):
        ema.update(state.step)
    metrics = _measure(losses, grad_norm, t, config.batch_size, diffusion.num_timesteps)
    _remember_first_bad(state, metrics)
    state.step += 1
    return metrics


def _backward(
    state: TrainState,
    diffusion: GaussianDiffusion,
    denoise_fn: Callable[..., Tensor],
    share: Batch,
    divisor: int,
    factor: int,
    *,
    exchange: bool,
) -> Tensor:
    """Add the gradient of factor * (sum of losses) / divisor to the weights', a micro-batch at a time; the losses [b].
    Workers exchange gradients in the last micro-batch's backward pass, or not at all."""
    network = in_precision(denoise_fn, state.execution.network_precision)
    parts = share.split(state.execution.micro_batch or len(share.t))
    losses = []
    for number, part in enumerate(parts, 1):
        exchanges = exchange and number == len(parts)
        with contextlib.nullcontext() if exchanges else getattr(denoise_fn, "no_sync", contextlib.nullcontext)():
            part_losses = _losses(diffusion, network, part)
            (part_losses.sum() / divisor * factor).backward()
        losses.append(part_losses.detach())
    return torch.cat(losses)


def _losses(diffusion: GaussianDiffusion, network: Callable[..., Tensor], share: Batch) -> Tensor:
    keys = () if share.dropout_key is None else (share.dropout_key,)
    return diffusion.training_losses(lambda x_t, t: network(x_t, t, *keys), share.x_start, share.t, share.noise)


def _clip_replicas(
    state: TrainState,
    diffusion: GaussianDiffusion,
    denoise_fn: Callable[..., Tensor],
    share: Batch,
    config: OptimConfig,
    world_size: int,
) -> tuple[Tensor, Tensor]:
    """Leave in the weights' gradients the mean over config.clip_replicas parts of the global batch of each part's clipped
    gradient; (losses [b], mean norm)."""
    size = config.batch_size // config.clip_replicas
    if config.clip_replicas % world_size or len(share.t) != config.batch_size // world_size:
        raise ValueError(
            f"clip_replicas is {config.clip_replicas} and this worker, of {world_size}, has {len(share.t)} of "
            f"{config.batch_size} images: each must have as many whole parts of {size}; take a number of workers that divides "
            "clip_replicas"
        )
    parameters = list(state.model.parameters())
    sums = [torch.zeros_like(p) for p in parameters]
    norms, losses = [], []
    for replica in share.split(size):
        state.optimizer.zero_grad(set_to_none=True)
        losses.append(_backward(state, diffusion, denoise_fn, replica, size, 1, exchange=False))
        norms.append(nn.utils.clip_grad_norm_(parameters, config.grad_clip))
        torch._foreach_add_(sums, cast(list[Tensor], [p.grad for p in parameters]))
    norm = torch.stack(norms).sum()
    if world_size > 1:
        norm = _all_reduce(norm, sums)
    torch._foreach_div_(sums, config.clip_replicas)
    for p, gradient in zip(parameters, sums, strict=True):
        p.grad = gradient
    return torch.cat(losses), norm / config.clip_replicas


def _all_reduce(norm: Tensor, gradients: list[Tensor]) -> Tensor:
    """Add up a scalar and gradients over the workers, in one exchange: the gradients in place, the scalar returned."""
    flat = torch.cat([norm.reshape(1), *(g.flatten() for g in gradients)])
    torch.distributed.all_reduce(flat)
    total, *pieces = flat.split([1, *(g.numel() for g in gradients)])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view(gradient.shape))
    return total.reshape(())


def _measure(losses: Tensor, grad_norm: Tensor, t: Tensor, batch_size: int, num_timesteps: int) -> StepMetrics:
    quarter = t * QUARTERS // num_timesteps
    member = quarter[:, None] == torch.arange(QUARTERS, device=t.device)
    sums = torch.where(member, losses[:, None], 0.0).sum(0)  # where, not a product: NaN stays in its quarter
    return StepMetrics(losses.sum() / batch_size, grad_norm.detach(), sums, member.sum(0))


def _remember_first_bad(state: TrainState, metrics: StepMetrics) -> None:
    """Note the first update whose loss or gradient is not finite, on the device: reading them here would wait for it."""
    loss, norm = metrics.loss.to(torch.float64), metrics.grad_norm.to(torch.float64)
    now = torch.stack([torch.full_like(loss, state.step), loss, norm])
    first = ~now.isfinite().all() & state.first_bad[0].isinf()
    state.first_bad = torch.where(first, now, state.first_bad)
