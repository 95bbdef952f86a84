"""One training step against a loop written out by hand, and how a batch shared among workers adds up."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.schedules import make_betas
from ddpm_core.training import OptimConfig, TrainState, train_step

BETAS = make_betas("linear", 50, 2e-3, 0.3)


class Network(nn.Module):
    """A convolution and a timestep's bias, float64: small, and it uses both arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1, dtype=torch.float64)
        self.embed = nn.Embedding(50, 1, dtype=torch.float64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x).tanh() + self.embed(t)[:, :, None, None]


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def batch(step: int, size: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(step)
    return {
        "x_start": torch.rand((size, 1, 4, 4), generator=g, dtype=torch.float64) * 2 - 1,
        "t": torch.randint(50, (size,), generator=g),
        "noise": torch.randn((size, 1, 4, 4), generator=g, dtype=torch.float64),
    }


CONFIG = OptimConfig(batch_size=6, lr=0.05, warmup_steps=3, grad_clip=0.2, ema_decay=0.7)


def test_steps_equal_algorithm_1_with_adam_written_out() -> None:
    """Warm-up from a rate of 0, clip of the global norm, Adam with bias correction, EMA whose first update copies."""
    diffusion, state = GaussianDiffusion(BETAS), TrainState(network(), CONFIG)
    twin = network()
    parameters: list[Tensor] = list(twin.parameters())
    m, v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    shadow = [p.detach().clone() for p in parameters]
    abar = torch.cumprod(1 - BETAS, 0)
    clipped = 0
    for step in range(6):
        data = batch(step, 6)
        metrics = train_step(state, diffusion, state.model, CONFIG, **data)

        a = abar[data["t"]].reshape(-1, 1, 1, 1)
        x_t = a.sqrt() * data["x_start"] + (1 - a).sqrt() * data["noise"]
        loss = ((data["noise"] - twin(x_t, data["t"])) ** 2).mean()  # Algorithm 1
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        factor = min(1.0, 0.2 / (norm + 1e-6))  # torch's clip adds 1e-6 to the norm
        clipped += factor < 1
        rate = 0.05 * min(step / 3, 1)
        for i, g in enumerate(gradients):
            g = g * factor
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g**2
            m_hat, v_hat = m[i] / (1 - 0.9 ** (step + 1)), v[i] / (1 - 0.999 ** (step + 1))
            with torch.no_grad():
                parameters[i].sub_(rate * m_hat / (v_hat.sqrt() + 1e-8))
            now = parameters[i].detach().clone()
            shadow[i] = now if step == 0 else 0.7 * shadow[i] + 0.3 * now

        assert state.step == step + 1
        assert metrics.loss.item() == pytest.approx(loss.item(), rel=1e-12)
        assert metrics.grad_norm.item() == pytest.approx(norm, rel=1e-12)
        # float64 rounding; Adam divides by sqrt(v), which repeats a gradient's 1e-15 at the size of the rate.
        for ours, expected in zip(state.model.parameters(), parameters, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
        for name, expected in zip(state.ema.shadow, shadow, strict=True):
            torch.testing.assert_close(state.ema.shadow[name], expected, rtol=0, atol=1e-12)
    assert clipped > 0


def test_the_first_step_of_a_warm_up_changes_no_weight() -> None:
    state = TrainState(network(), CONFIG)
    before = [p.detach().clone() for p in state.model.parameters()]
    train_step(state, GaussianDiffusion(BETAS), state.model, CONFIG, **batch(0, 6))
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    assert state.optimizer.state  # but Adam has seen the gradient
    train_step(state, GaussianDiffusion(BETAS), state.model, CONFIG, **batch(1, 6))
    assert not any(torch.equal(a, b) for a, b in zip(before[:2], state.model.parameters(), strict=False))


@pytest.mark.parametrize(("step", "rate"), [(0, 0.0), (1, 4e-8), (2500, 1e-4), (5000, 2e-4), (900_000, 2e-4)])
def test_the_papers_learning_rate_at_the_anchors(step: int, rate: float) -> None:
    assert OptimConfig().learning_rate(step) == pytest.approx(rate, rel=1e-14)
    assert OptimConfig(warmup_steps=0).learning_rate(step) == 2e-4


def test_two_workers_with_half_a_batch_make_the_step_of_one() -> None:
    """Each worker's hooks stand for DistributedDataParallel: they average its gradient with the other's."""
    diffusion, data = GaussianDiffusion(BETAS), batch(3, 6)
    config = OptimConfig(batch_size=6, lr=0.05, warmup_steps=0, grad_clip=0.2)
    alone = TrainState(network(), config)
    whole = train_step(alone, diffusion, alone.model, config, **data)

    halves = [{name: value[part] for name, value in data.items()} for part in (slice(0, 4), slice(4, 6))]
    gradients = []
    for half in halves:
        twin = network()
        loss = diffusion.training_losses(twin, half["x_start"], half["t"], half["noise"]).sum() / 6 * 2
        gradients.append(torch.autograd.grad(loss, list(twin.parameters())))
    losses = []
    for half, other in zip(halves, reversed(gradients), strict=True):
        state = TrainState(network(), config)
        for i, p in enumerate(state.model.parameters()):
            p.register_hook(lambda g, i=i, other=other: (g + other[i]) / 2)
        metrics = train_step(state, diffusion, state.model, config, world_size=2, **half)
        losses.append(metrics.loss.item())
        assert metrics.grad_norm.item() == pytest.approx(whole.grad_norm.item(), rel=1e-12)  # of the global gradient
        for ours, expected in zip(state.model.parameters(), alone.model.parameters(), strict=True):
            # The sum over six images in another order.
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert sum(losses) == pytest.approx(whole.loss.item(), rel=1e-12)


def test_a_state_resumes_bit_for_bit() -> None:
    diffusion, whole = GaussianDiffusion(BETAS), TrainState(network(), CONFIG)
    for step in range(3):
        train_step(whole, diffusion, whole.model, CONFIG, **batch(step, 6))
    resumed = TrainState(Network(), CONFIG)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for step in range(3, 6):
        train_step(whole, diffusion, whole.model, CONFIG, **batch(step, 6))
        train_step(resumed, diffusion, resumed.model, CONFIG, **batch(step, 6))
    assert resumed.step == whole.step == 6
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, tensor in whole.ema.shadow.items():
        assert torch.equal(tensor, resumed.ema.shadow[name])


def test_a_loss_that_is_not_finite_shows_in_the_metrics() -> None:
    state = TrainState(network(), CONFIG)
    with torch.no_grad():
        next(state.model.parameters()).fill_(math.nan)
    metrics = train_step(state, GaussianDiffusion(BETAS), state.model, CONFIG, **batch(0, 6))
    assert not math.isfinite(metrics.loss.item())
    assert not math.isfinite(metrics.grad_norm.item())


def test_metrics_hold_no_graph() -> None:
    state = TrainState(network(), CONFIG)
    metrics = train_step(state, GaussianDiffusion(BETAS), state.model, CONFIG, **batch(0, 6))
    assert not metrics.loss.requires_grad
    assert not metrics.grad_norm.requires_grad


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"batch_size": 0}, "batch_size is 0: give a positive number"),
        ({"lr": -1e-4}, "lr is -0.0001"),
        ({"lr": math.nan}, "lr is nan"),
        ({"grad_clip": 0.0}, "grad_clip is 0.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
    ],
)
def test_values_that_cannot_train_are_refused_by_name(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        OptimConfig(**values)
