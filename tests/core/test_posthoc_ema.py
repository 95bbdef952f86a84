"""EMA of a length chosen after the training, against averages of that length that were tracked in it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from ddpm_core.configs import TRACKED_LENGTHS
from ddpm_core.ema import PowerEma
from ddpm_core.posthoc_ema import chosen_steps, exponent, reconstruct
from ddpm_core.presets import PRESETS
from ddpm_core.training import OptimConfig, TrainState, averages_of, train_step
from ddpm_core.unet import UNet

LENGTHS = (0.03, 0.05, 0.075, 0.1, 0.15, 0.2)


@pytest.mark.parametrize("length", [0.01, *LENGTHS, 0.28])
def test_a_length_is_the_profiles_standard_deviation_over_the_time_of_training(length: float) -> None:
    t = (np.arange(1_000_000) + 0.5) / 1_000_000
    profile = t ** exponent(length)
    mean = np.average(t, weights=profile)
    assert np.sqrt(np.average((t - mean) ** 2, weights=profile)) == pytest.approx(length, rel=1e-6)


def tracked(path: Tensor, length: float, at: int) -> Tensor:
    """The average that PowerEma has after so many updates of weights that went along a path [updates, weights]."""
    model = nn.Linear(path.shape[1], 1, bias=False).double()
    ema = PowerEma(model, length)
    for step in range(at):
        with torch.no_grad():
            model.weight.copy_(path[step])
        ema.update(step)
    return ema.shadow["weight"][0]


def profile(length: float, at: int, updates: int) -> NDArray[np.float64]:
    """By how much weights after update 1, 2, .. count after `at` of them: the integral of the profile over their time."""
    edges = np.minimum(np.arange(updates + 1) / at, 1.0) ** (exponent(length) + 1)
    return np.diff(edges)


@pytest.mark.parametrize("length", LENGTHS)
def test_each_update_counts_by_the_integral_of_the_profile(length: float) -> None:
    path = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = profile(length, 50, 50) @ path.numpy()
    np.testing.assert_allclose(tracked(path, length, 50).numpy(), expected, rtol=1e-11)


@pytest.mark.parametrize("length", LENGTHS)
def test_weights_are_those_of_least_squares_over_sampled_profiles(length: float) -> None:
    """Profiles as vectors of 120,000 values, which moves products by some (gamma / 120,000)^2, and numpy's own least squares."""
    steps, n = [3, 5, 8, 12], 120_000
    columns = np.stack([profile(each, step * n // 12, n) for step in steps for each in TRACKED_LENGTHS], axis=1)
    wanted = profile(length, n, n)
    expected = np.linalg.lstsq(columns, wanted, rcond=None)[0]
    expected /= expected.sum()
    weights, error = reconstruct(steps, length)
    np.testing.assert_allclose(weights.ravel(), expected, atol=1e-6)
    assert error == pytest.approx(np.linalg.norm(columns @ expected - wanted) / np.linalg.norm(wanted), abs=1e-6)


@pytest.mark.parametrize("length", TRACKED_LENGTHS)
def test_a_tracked_length_is_what_was_tracked(length: float) -> None:
    weights, error = reconstruct(chosen_steps(range(10, 1000, 10), 1000), length)
    wanted = np.zeros_like(weights)
    wanted[-1, TRACKED_LENGTHS.index(length)] = 1.0
    np.testing.assert_allclose(weights, wanted, atol=1e-9)
    assert error < 1e-7


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=60, unique=True), st.sampled_from(LENGTHS))
def test_what_training_does_not_change_stays_as_it_is(saved: list[int], length: float) -> None:
    weights, _ = reconstruct(chosen_steps(saved, max(saved)), length)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)


@given(st.sets(st.integers(1, 2000), min_size=1, max_size=200), st.data())
def test_steps_that_are_not_chosen_may_be_deleted_at_any_time(saved: set[int], data: st.DataObject) -> None:
    """Whichever of them are gone, an average at any of the steps is made of the same ones."""
    needed = set(chosen_steps(saved))
    left = needed | data.draw(st.sets(st.sampled_from(sorted(saved))))
    step = data.draw(st.sampled_from(sorted(saved)))
    assert chosen_steps(left, step) == chosen_steps(saved, step)


def bound(length: float, path: Tensor, error: float) -> Tensor:
    """How far a reconstruction of each weight may be off what its path [updates, weights] gives: with its mean as the constant,
    |sum (p' - p) theta| <= |p' - p| |theta - c|, and |p' - p| = error * |p|."""
    updates, gamma = len(path), exponent(length)
    norm = (gamma + 1) / np.sqrt(2 * gamma + 1) / np.sqrt(updates)  # of (gamma + 1) t^gamma / T^(gamma + 1) over 0..T
    return error * float(norm) * (path - path.mean(0)).norm(dim=0)


@pytest.mark.parametrize("length", [0.03, 0.075, 0.15, 0.2])
@pytest.mark.parametrize("saved", [4, 16, 64])
def test_a_reconstruction_is_the_average_tracked_directly(length: float, saved: int) -> None:
    """Along a path that decays, swings and walks at random, within what its profile's error allows."""
    updates, g = 1024, torch.Generator().manual_seed(1)
    t = torch.arange(1, updates + 1, dtype=torch.float64)[:, None] / updates
    walk = torch.randn(updates, 3, dtype=torch.float64, generator=g).cumsum(0) / updates**0.5
    path = 100 + torch.cat([torch.exp(-3 * t), torch.sin(40 * t), walk], dim=1)
    steps = chosen_steps(range(updates // saved, updates, updates // saved), updates)
    weights, error = reconstruct(steps, length)
    made = sum(
        weight * tracked(path, each, step)
        for step, row in zip(steps, weights, strict=True)
        for each, weight in zip(TRACKED_LENGTHS, row, strict=True)
    )
    deviation = (made - tracked(path, length, updates)).abs()
    assert (deviation <= bound(length, path, error) + 1e-10).all()
    # 16 saved steps are enough for the lengths that matter, and say more than the nearer tracked average.
    nearest = min(TRACKED_LENGTHS, key=lambda each: abs(each - length))
    if saved >= 16 and length > 0.05:
        assert error < 0.03
        assert (deviation < (tracked(path, nearest, updates) - tracked(path, length, updates)).abs() / 3).all()


def test_a_trainings_reconstructions_are_the_averages_tracked_in_it() -> None:
    """Of a real network, in float32: an average rounds at most once an update, by 2^-24 of its largest weight each way."""
    tiny, updates = PRESETS["tiny"], 48
    config = OptimConfig(batch_size=2, lr=1e-3, warmup_steps=0, posthoc_ema=True)
    torch.manual_seed(0)
    state, diffusion = TrainState(UNet(tiny.unet), config), tiny.diffusion.build()
    direct = {length: PowerEma(state.model, length) for length in (0.075, 0.15)}
    saved: dict[int, dict[str, Tensor]] = {}
    path: list[Tensor] = []
    for step in range(updates):
        g = torch.Generator().manual_seed(step)
        x, noise = torch.randn(2, 2, 1, 8, 8, generator=g)
        t = torch.randint(1000, (2,), generator=g)
        train_step(state, diffusion, state.model, config, x_start=x, t=t, noise=noise)
        for ema in direct.values():
            ema.update(step)
        path.append(flat(dict(state.model.named_parameters())))
        if state.step % 3 == 0:
            saved[state.step] = {name: tensor.clone() for name, tensor in state.state_dict()["averages"].items()}
    steps, along = chosen_steps(saved, updates), torch.stack(path)
    for length, ema in direct.items():
        weights, error = reconstruct(steps, length)
        made = torch.zeros_like(path[0])
        for step, row in zip(steps, weights.tolist(), strict=True):
            for each, weight in zip(TRACKED_LENGTHS, row, strict=True):
                made += weight * flat(averages_of(saved[step], f"{each:g}"))
        deviation, wanted = (made - flat(ema.shadow)).abs(), flat(ema.shadow)
        rounding = 2 * updates * 2**-24 * along.abs().amax(0) * (1 + np.abs(weights).sum())
        assert (deviation <= bound(length, along, error) + rounding).all()
        assert error < 0.02
        # It can tell: the nearer tracked average is further away, by far.
        nearest = min(TRACKED_LENGTHS, key=lambda each: abs(each - length))
        assert (flat(averages_of(saved[updates], f"{nearest:g}")) - wanted).norm() > 10 * deviation.norm()


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()])
