"""Samplers against exact linear propagation, the exact solution of the probability flow and a mixture with its score."""

import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gaussian_case import GaussianData, cumulative, scalars, unchecked
from torch import Tensor

from ddpm_core.configs import Method, Schedule, Spacing, VarType
from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.rng import SampleNoise
from ddpm_core.samplers import sample, sample_steps, select_timesteps
from ddpm_core.schedules import make_betas

LINEAR = make_betas("linear")


def coefficients(
    diffusion: GaussianDiffusion, denoise_fn: Callable[[Tensor, Tensor], Tensor], **options: Any
) -> Tensor:
    """What the returned x_0 of a linear network is made of: entry a is the weight of the noise drawn at address a (T: of
    x_T). One chain with a batch of one-pixel images, of which image a has noise 1 at address a and 0 elsewhere."""
    n = diffusion.num_timesteps + 1

    def one_hot(address: int) -> Tensor:
        noise = torch.zeros(n, 1, 1, 1, dtype=torch.float64)
        noise[address] = 1.0
        return noise

    images = sample(diffusion, denoise_fn, (n, 1, 1, 1), noise=one_hot, clip_denoised=False, **options)
    return images.flatten()


@pytest.mark.parametrize(
    ("s2", "var_type", "variance"),
    [
        (1.0, "fixedlarge", 9.998999999999990e-01),
        (1.0, "fixedsmall", 9.910673763528224e-01),
        (0.25, "fixedlarge", 2.507520750075313e-01),
        (0.25, "fixedsmall", 2.461252113604479e-01),
        (0.01, "fixedlarge", 1.015373821159755e-02),
        (0.01, "fixedsmall", 9.275856377615342e-03),
    ],
)
def test_ancestral_samples_of_gaussian_data_have_the_known_variance(
    s2: float, var_type: VarType, variance: float
) -> None:
    diffusion = GaussianDiffusion(LINEAR, var_type=var_type)
    weights = coefficients(diffusion, GaussianData(LINEAR, s2).predictor())
    # A product of 1000 steps with 1e-16 each; the anchors print 16 digits of a like computation.
    assert float(weights.square().sum()) == pytest.approx(variance, rel=1e-11)


@pytest.mark.parametrize("s2", [1.0, 0.25, 0.01])
def test_with_the_best_variance_the_samples_have_the_datas_own(s2: float) -> None:
    """sigma^2 = Var[x_{t-1}|x_t] makes every reverse step exact: x_t keeps its marginal down to x_1, whose mean is x_0's."""
    data = GaussianData(LINEAR, s2)
    diffusion = GaussianDiffusion(LINEAR, var_type="learned", loss_type="kl")
    network = data.predictor("eps", lambda t: math.log(max(data.xprev_variance(t), 1e-30)))
    total = float(coefficients(diffusion, network).square().sum())
    start = 1.0 / data.marginal(999)  # the chain starts from variance 1 instead of the marginal's
    carried = math.prod(data.xprev_gain(t) for t in range(1000)) ** 2
    exact = s2 - data.xstart_variance(0) + (1.0 - 1.0 / start) * carried
    # The learned log-variances pass through a float32 table: 6e-8 of up to 10 in the exponent.
    assert total == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("steps", [10, 50, 999])
def test_a_strided_chain_of_unit_gaussian_data_keeps_its_variance(steps: int) -> None:
    """For s^2 = 1 fixedlarge is exact whatever the stride: only the noise of the last step is left out, 1 - abar."""
    weights = coefficients(GaussianDiffusion(LINEAR), GaussianData(LINEAR, 1.0).predictor(), steps=steps)
    assert float(weights.square().sum()) == pytest.approx(1 - 1e-4, rel=1e-10)
    assert int((weights != 0).sum()) == steps  # x_T and every step but the last


@pytest.mark.parametrize("steps", [1000, 40])
def test_ddim_with_eta_one_is_the_ancestral_chain_of_fixedsmall(steps: int) -> None:
    diffusion, network = GaussianDiffusion(LINEAR, var_type="fixedsmall"), GaussianData(LINEAR, 0.25).predictor()
    ddim = coefficients(diffusion, network, method="ddim", eta=1.0, steps=steps)
    ancestral = coefficients(diffusion, network, method="ancestral", steps=steps)
    # The same map from noise to image, not only the same distribution. 1 - abar - sigma^2 is 4.5e-5 with 1e-16.
    torch.testing.assert_close(ddim, ancestral, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_ddim_step_is_eq_12_with_sigma_of_eq_16(eta: float) -> None:
    """Song, Meng & Ermon 2021, from t = 400 to the next of the chosen timesteps."""
    diffusion, network = GaussianDiffusion(LINEAR), lambda x, t: torch.full_like(x, 0.9)
    step = next(
        sample_steps(
            diffusion,
            network,
            (1, 1, 1, 1),
            noise=lambda address: scalars(-1.7),
            method="ddim",
            eta=eta,
            steps=11,
            clip_denoised=False,
            start=(scalars(0.2), 400),
        )
    )
    abar = cumulative(LINEAR)
    now, before = abar[400], abar[300]
    sigma = eta * math.sqrt((1 - before) / (1 - now)) * math.sqrt(1 - now / before)
    x_0 = (0.2 - math.sqrt(1 - now) * 0.9) / math.sqrt(now)
    expected = math.sqrt(before) * x_0 + math.sqrt(1 - before - sigma**2) * 0.9 + sigma * -1.7
    assert step.t == 400
    assert step.x.item() == pytest.approx(expected, rel=1e-12)
    assert step.pred_xstart.item() == pytest.approx(x_0, rel=1e-12)


def test_float32_ddim_keeps_the_small_coefficients_of_the_last_steps() -> None:
    """1 - abar - sigma^2 is 5e-5 at t = 1: taken in float32 it would be wrong by 1e-3."""
    diffusion, network = GaussianDiffusion(LINEAR), lambda x, t: x
    x, options = torch.full((1, 1, 1, 1), 0.3), {"method": "ddim", "eta": 1.0, "clip_denoised": False}
    zero = lambda address: torch.zeros(1, 1, 1, 1)  # noqa: E731
    single = sample(diffusion, network, (1, 1, 1, 1), noise=zero, start=(x, 1), **options)  # type: ignore[arg-type]
    double = sample(diffusion, network, (1, 1, 1, 1), noise=zero, start=(x.double(), 1), **options)  # type: ignore[arg-type]
    abar_1, abar_2 = 1 - 1e-4, (1 - 1e-4) * (1 - float(LINEAR[1]))
    kept = math.sqrt(1 - abar_1) * math.sqrt((1 - abar_1) * (1 - abar_2 / abar_1) / (1 - abar_2) / (1 - abar_1))
    x_0 = (0.3 - math.sqrt(1 - abar_2) * 0.3) / math.sqrt(abar_2)
    x_1 = math.sqrt(abar_1) * x_0 + math.sqrt(1 - abar_1 - kept**2) * 0.3
    assert double.item() == pytest.approx(
        (x_1 - math.sqrt(1 - abar_1) * x_1) / math.sqrt(abar_1), rel=1e-7
    )  # 0.3 in float32
    assert single.item() == pytest.approx(double.item(), abs=1e-7)  # three ulps of 0.3


def test_ddim_with_eta_zero_asks_for_no_noise_but_x_t() -> None:
    asked: list[int] = []

    def noise(address: int) -> Tensor:
        asked.append(address)
        return scalars(0.7)

    diffusion, network = GaussianDiffusion(LINEAR), GaussianData(LINEAR, 0.25).predictor()
    first = sample(diffusion, network, (1, 1, 1, 1), noise=noise, method="ddim", steps=20)
    assert asked == [1000]
    assert torch.equal(first, sample(diffusion, network, (1, 1, 1, 1), noise=scalars(0.7), method="ddim", steps=20))


def flow_error(method: Method, steps: int) -> float:
    """The relative error of x at the chain's last timestep against the exact probability flow.

    For x_0 ~ N(0, s^2) the flow scales x as its standard deviation: x_t = x_T sqrt(Var x_t / Var x_T). The schedule has
    20,000 fine steps after one of beta = 0.05, so that a step in t is a step in lambda ~ ln SNR that shrinks everywhere
    alike, and rounding t to whole numbers moves none by more than 1/20 of itself.
    """
    betas = torch.cat([torch.tensor([0.05], dtype=torch.float64), make_betas("linear", 20_000, 1e-4 / 4, 0.02 / 40)])
    data, diffusion = GaussianData(betas, 0.09), GaussianDiffusion(betas)
    *_, before, _ = sample_steps(
        diffusion,
        data.predictor(),
        (1, 1, 1, 1),
        noise=scalars(1.0),
        method=method,
        steps=steps + 1,
        clip_denoised=False,
    )
    # The last step leaves t = 0 for x_0; the one before it arrived at t = 0.
    return abs(before.x.item() / math.sqrt(data.marginal(0) / data.marginal(20_000)) - 1.0)


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_deterministic_samplers_reach_their_order(method: Method, order: int) -> None:
    errors = [flow_error(method, steps) for steps in (50, 100, 200, 400)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[-1] < 1e-2
    # An order shows as a slope that tends to it; at 200 to 400 steps the next order adds a few per cent.
    assert slopes[-1] == pytest.approx(order, abs=0.12), (errors, slopes)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "jsd"])  # of jsd the last abar is 0, its ln SNR infinite
@pytest.mark.parametrize("method", ["ddim", "dpmpp_2m"])
def test_deterministic_samplers_are_exact_where_x_0_is_known(method: Method, schedule: Schedule) -> None:
    """Data at a single point: every prediction is that point, and so is the sample, from any noise in any steps."""
    point = scalars(0.4)
    diffusion = GaussianDiffusion(make_betas(schedule), mean_type="xstart")
    for steps in (1, 2, 7):
        x = sample(diffusion, lambda x, t: point, (1, 1, 1, 1), noise=scalars(-2.3), method=method, steps=steps)
        assert x.item() == pytest.approx(0.4, abs=1e-15)


def test_dpmpp_follows_its_published_update() -> None:
    """Lu et al. 2022, Algorithm 2, over four steps with a network that is neither linear nor autonomous."""
    diffusion = GaussianDiffusion(LINEAR, mean_type="xstart")

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x + t.to(x.dtype).reshape(-1, 1, 1, 1) / 300)

    times = [999, 749, 500, 250, 0]
    assert select_timesteps(1000, 5) == times[::-1]
    abar = {t: float(diffusion.alphas_cumprod[t]) for t in times}
    alpha = {t: math.sqrt(abar[t]) for t in times}
    sigma = {t: math.sqrt(1 - abar[t]) for t in times}
    lam = {t: math.log(alpha[t] / sigma[t]) for t in times}
    x, old, h_last = 0.8, None, None
    for s, t in itertools.pairwise(times):
        x0, h = math.sin(x + s / 300), lam[t] - lam[s]
        if old is None or h_last is None or t == 0:  # lower_order_final
            d = x0
        else:
            r = h_last / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old
        x, old, h_last = sigma[t] / sigma[s] * x - alpha[t] * (math.exp(-h) - 1) * d, x0, h
    expected = math.sin(x + 0.0)
    got = sample(diffusion, network, (1, 1, 1, 1), noise=scalars(0.8), method="dpmpp_2m", steps=5, clip_denoised=False)
    assert got.item() == pytest.approx(expected, rel=1e-12)


MODES, SPREAD = (-0.55, 0.35), 0.12


def mixture_eps(x: Tensor, t: Tensor) -> Tensor:
    """E[eps|x_t] for x_0 of 0.3 N(-0.55, 0.12^2) + 0.7 N(0.35, 0.12^2): minus sqrt(1 - abar) times the exact score."""
    abar = torch.cumprod(1 - LINEAR, 0)[t].reshape(-1, 1, 1, 1)
    x64 = x.double()
    variance = abar * SPREAD**2 + 1 - abar
    distance = [x64 - abar.sqrt() * mode for mode in MODES]
    weight = torch.stack([w * torch.exp(-d.square() / 2 / variance) for w, d in zip((0.3, 0.7), distance, strict=True)])
    weight = weight / weight.sum(0)
    mean_distance = weight[0] * distance[0] + weight[1] * distance[1]
    return ((1 - abar).sqrt() * mean_distance / variance).to(x.dtype)


def mixture_cdf(x: Any) -> Any:
    return 0.3 * scipy.stats.norm.cdf(x, MODES[0], SPREAD) + 0.7 * scipy.stats.norm.cdf(x, MODES[1], SPREAD)


@pytest.mark.parametrize(
    ("method", "steps", "eta", "var_type"),
    [
        ("ancestral", 1000, 0.0, "fixedlarge"),
        ("ancestral", 1000, 0.0, "fixedsmall"),
        ("ddim", 200, 0.0, "fixedlarge"),
        ("ddim", 200, 1.0, "fixedlarge"),
        ("dpmpp_2m", 200, 0.0, "fixedlarge"),
    ],
)
def test_samples_of_a_mixture_follow_its_distribution(
    method: Method, steps: int, eta: float, var_type: VarType
) -> None:
    """A Kolmogorov-Smirnov test at 1e-4: of 10,000 seeds one would fail; this one is fixed. With 2500 samples it sees
    0.045 in the distribution function, a shift of a mode by a fifth of its width; discretisation is a tenth of that."""
    n = 2500
    noise = SampleNoise(seed=5, indices=torch.arange(n), shape=(1, 1, 1))
    diffusion = GaussianDiffusion(LINEAR, var_type=var_type)
    images = sample(
        diffusion, mixture_eps, (n, 1, 1, 1), noise=noise, method=method, steps=steps, eta=eta, clip_denoised=True
    )
    assert scipy.stats.kstest(images.flatten().numpy(), mixture_cdf).pvalue > 1e-4


def test_the_distribution_test_would_see_a_wrong_sampler() -> None:
    """Without noise at each step the ancestral chain collapses."""
    n = 500
    x_T = SampleNoise(seed=5, indices=torch.arange(n), shape=(1, 1, 1))
    frozen = lambda address: x_T(1000) if address == 1000 else torch.zeros(n, 1, 1, 1)  # noqa: E731
    images = sample(GaussianDiffusion(LINEAR), mixture_eps, (n, 1, 1, 1), noise=frozen, steps=100)
    assert scipy.stats.kstest(images.flatten().numpy(), mixture_cdf).pvalue < 1e-4


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_few_steps_of_dpmpp_stay_near_the_data(steps: int) -> None:
    """The step down to timestep 0 spans most of the way in ln SNR: extrapolating over it would throw the samples out (at 20
    steps to a distance of 0.43). Not worse than twice DDIM, which is of first order all along."""
    n = 2000
    noise = SampleNoise(seed=5, indices=torch.arange(n), shape=(1, 1, 1))
    distance = {}
    for method in ("ddim", "dpmpp_2m"):
        images = sample(GaussianDiffusion(LINEAR), mixture_eps, (n, 1, 1, 1), noise=noise, method=method, steps=steps)
        distance[method] = scipy.stats.kstest(images.flatten().numpy(), mixture_cdf).statistic
    assert distance["dpmpp_2m"] < 2 * distance["ddim"]


@given(data=st.data(), T=st.integers(1, 2000))
@settings(max_examples=150, deadline=None)
def test_uniform_timesteps_ascend_evenly_from_the_first_to_the_last(data: st.DataObject, T: int) -> None:
    steps = data.draw(st.integers(1, T))
    times = select_timesteps(T, steps)
    assert len(times) == steps
    assert times[-1] == T - 1
    assert all(a < b for a, b in itertools.pairwise(times))
    if steps > 1:
        assert times[0] == 0
        gaps = np.diff(times)
        assert gaps.max() - gaps.min() <= 1


@given(data=st.data(), T=st.integers(1, 2000))
@settings(max_examples=150, deadline=None)
def test_quadratic_timesteps_ascend_and_widen(data: st.DataObject, T: int) -> None:
    steps = data.draw(st.integers(1, T))
    times = select_timesteps(T, steps, "quadratic")
    assert len(times) == steps
    assert times[0] >= 0
    assert times[-1] < T
    assert all(a < b for a, b in itertools.pairwise(times))
    if 1 < steps <= math.sqrt(T) / 4:
        assert times == [int(0.8 * T * (i / (steps - 1)) ** 2) for i in range(steps)]


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 400, 999])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "const"])
def test_logsnr_timesteps_are_even_in_the_logarithm_of_the_snr(schedule: Schedule, steps: int) -> None:
    abar = torch.cumprod(1 - make_betas(schedule, 1000, 1e-4, 0.02), 0)
    times = select_timesteps(1000, steps, "logsnr", abar)
    assert len(times) == steps
    assert times[-1] == 999
    assert all(a < b for a, b in itertools.pairwise([-1, *times]))
    if 1 < steps <= 20:
        lam = torch.log(abar / (1 - abar)) / 2
        even = torch.linspace(float(lam[0]), float(lam[-1]), steps, dtype=torch.float64)
        for t, value in zip(times, even, strict=True):  # no other timestep is nearer, but one that is taken
            nearer = [other for other in range(1000) if abs(lam[other] - value) < abs(lam[t] - value) - 1e-12]
            assert set(nearer) <= set(times)


@pytest.mark.parametrize(("T", "steps"), [(1000, 50), (1000, 10), (1000, 300), (7, 3), (1000, 1)])
def test_leading_timesteps_are_multiples_as_in_the_code_of_ddim(T: int, steps: int) -> None:
    assert select_timesteps(T, steps, "leading") == list(range(0, T, T // steps))[:steps]


def test_all_steps_are_all_timesteps_in_any_spacing() -> None:
    for spacing in get_args(Spacing):
        assert select_timesteps(20, 20, spacing) == list(range(20))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers with NumPy 2
@pytest.mark.parametrize("steps", [4, 20, 100])
def test_second_order_throughout_is_the_scheduler_of_diffusers(steps: int) -> None:
    from diffusers import DPMSolverMultistepScheduler

    times = select_timesteps(1000, steps)
    # It takes no list of timesteps: it gets the process that is seen at these alone, and visits all of that.
    process = GaussianDiffusion(LINEAR).strided(times)
    scheduler = DPMSolverMultistepScheduler(steps, trained_betas=process.betas.numpy(), timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    # The same in float64: its own are float32, which alone moves a sample by up to 1e-5.
    sigmas = (1 / process.alphas_cumprod.flip(0) - 1).sqrt()
    scheduler.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    x_T = SampleNoise(seed=5, indices=torch.arange(8), shape=(1, 1, 1))(1000).double()
    x = x_T
    for i in scheduler.timesteps:
        x = scheduler.step(mixture_eps(x, torch.full((8,), times[int(i)])), i, x).prev_sample
    options: dict[str, Any] = {"noise": x_T, "steps": steps, "clip_denoised": False}
    ours = sample(GaussianDiffusion(LINEAR), mixture_eps, (8, 1, 1, 1), method="dpmpp_2m_second_order", **options)
    assert (ours - x).abs().max() < 5e-6
    first = sample(GaussianDiffusion(LINEAR), mixture_eps, (8, 1, 1, 1), method="dpmpp_2m", **options)
    assert (first - x).abs().max() > 1e-3


def test_few_ancestral_steps_leave_noise_under_fixedlarge_alone() -> None:
    n = 2000
    noise = SampleNoise(seed=5, indices=torch.arange(n), shape=(1, 1, 1))
    apart = {}
    for var_type in ("fixedlarge", "fixedsmall"):
        diffusion = GaussianDiffusion(LINEAR, var_type=var_type)
        images = sample(diffusion, mixture_eps, (n, 1, 1, 1), noise=noise, steps=20).flatten()
        apart[var_type] = torch.stack([(images - mode).abs() for mode in MODES]).amin(0).mean()
    truth = SPREAD * math.sqrt(2 / math.pi)  # the mean of |N(0, s^2)|
    assert apart["fixedlarge"] > 1.2 * truth
    assert apart["fixedsmall"] < truth


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_does_not_fit_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps is {steps}: it must lie in 1..1000"):
        select_timesteps(1000, steps)


@pytest.mark.parametrize(("method", "eta"), [("ancestral", 0.0), ("ddim", 0.5)])
@pytest.mark.parametrize("steps", [10, 4, 1])
def test_noise_is_asked_for_x_t_then_once_a_step_but_the_last(method: Method, eta: float, steps: int) -> None:
    asked: list[int] = []

    def noise(address: int) -> Tensor:
        asked.append(address)
        return scalars(0.1)

    diffusion = GaussianDiffusion(make_betas("linear", 10, 1e-3, 0.2))
    sample(diffusion, lambda x, t: x, (1, 1, 1, 1), noise=noise, method=method, eta=eta, steps=steps)
    assert asked == [10, *reversed(select_timesteps(10, steps)[1:])]


@pytest.mark.parametrize(
    ("method", "eta", "steps"), [("ancestral", 0.0, 40), ("ancestral", 0.0, 8), ("ddim", 0.0, 40), ("ddim", 1.0, 8)]
)
def test_a_start_in_the_middle_is_the_tail_of_the_whole_chain(method: Method, eta: float, steps: int) -> None:
    diffusion = GaussianDiffusion(make_betas("linear", 40, 1e-3, 0.2))
    noise = SampleNoise(seed=1, indices=torch.tensor([3, 8]), shape=(1, 4, 4))
    network = lambda x, t: torch.sin(x + t.reshape(-1, 1, 1, 1))  # noqa: E731
    options: dict[str, Any] = {"noise": noise, "method": method, "eta": eta, "steps": steps}
    whole = list(sample_steps(diffusion, network, (2, 1, 4, 4), **options))
    middle = steps // 2
    tail = list(sample_steps(diffusion, network, (2, 1, 4, 4), start=(whole[middle].x, whole[middle + 1].t), **options))
    assert [step.t for step in tail] == [step.t for step in whole[middle + 1 :]]
    for a, b in zip(tail, whole[middle + 1 :], strict=True):
        # The tail's betas are ratios of alphas_cumprod: equal to float64 rounding, the states to float32's.
        torch.testing.assert_close(a.x, b.x, rtol=1e-5, atol=1e-6)


def test_a_start_between_the_chosen_timesteps_is_visited_itself() -> None:
    diffusion = GaussianDiffusion(LINEAR)
    steps = sample_steps(
        diffusion, lambda x, t: x, (1, 1, 1, 1), noise=scalars(0.0), method="ddim", steps=11, start=(scalars(0.5), 250)
    )
    assert [step.t for step in steps] == [250, 200, 100, 0]


@pytest.mark.parametrize("choice", [{"mean_type": "xprev"}, {"var_type": "learned", "loss_type": "kl"}])
def test_networks_of_single_steps_sample_all_of_them_and_start_anywhere(choice: dict[str, Any]) -> None:
    diffusion = GaussianDiffusion(make_betas("linear", 20, 1e-3, 0.3), **choice)
    learned = "var_type" in choice
    network = lambda x, t: torch.cat([x, x], 1) if learned else x  # noqa: E731
    noise = SampleNoise(seed=0, indices=torch.arange(2), shape=(1, 2, 2))
    whole = list(sample_steps(diffusion, network, (2, 1, 2, 2), noise=noise))
    tail = sample(diffusion, network, (2, 1, 2, 2), noise=noise, start=(whole[9].x, 9))
    torch.testing.assert_close(tail, whole[-1].x, rtol=1e-5, atol=1e-6)  # float32
    with pytest.raises(ValueError, match="take steps=20"):
        sample(diffusion, network, (2, 1, 2, 2), noise=noise, steps=10)


def test_each_step_reports_the_prediction_it_was_made_from() -> None:
    diffusion = GaussianDiffusion(make_betas("linear", 12, 1e-3, 0.3))
    data = GaussianData(diffusion.betas, 0.25)
    noise = lambda address: scalars(1.4 if address == 12 else 0.3)  # noqa: E731
    x = 1.4
    for step in sample_steps(diffusion, data.predictor(), (1, 1, 1, 1), noise=noise, clip_denoised=False):
        assert step.pred_xstart.item() == pytest.approx(data.xstart_gain(step.t) * x, rel=1e-10)
        x = step.x.item()
    assert step.t == 0
    assert x == pytest.approx(step.pred_xstart.item(), rel=1e-12)


def test_clipping_bounds_every_prediction_and_can_be_turned_off() -> None:
    diffusion = GaussianDiffusion(make_betas("linear", 30, 1e-3, 0.3))
    wild = lambda x, t: -5 * torch.ones_like(x)  # noqa: E731
    noise = SampleNoise(seed=0, indices=torch.arange(3), shape=(1, 2, 2))
    for method in ("ancestral", "ddim", "dpmpp_2m"):
        options: dict[str, Any] = {"noise": noise, "method": method}
        clipped = [s.pred_xstart.abs().max() for s in sample_steps(diffusion, wild, (3, 1, 2, 2), **options)]
        free = [
            s.pred_xstart.abs().max()
            for s in sample_steps(diffusion, wild, (3, 1, 2, 2), clip_denoised=False, **options)
        ]
        assert max(clipped) <= 1.0
        assert max(free) > 1.0


def test_sampling_keeps_no_graph_and_leaves_gradients_as_they_were() -> None:
    weight = torch.ones(1, requires_grad=True)
    diffusion = GaussianDiffusion(make_betas("linear", 5, 1e-3, 0.3))
    noise = SampleNoise(seed=0, indices=torch.arange(2), shape=(1, 2, 2))
    for step in sample_steps(diffusion, lambda x, t: weight * x, (2, 1, 2, 2), noise=noise):
        assert not step.x.requires_grad
        assert torch.is_grad_enabled()  # between two steps the caller's own setting holds


def test_an_image_does_not_depend_on_its_batch() -> None:
    diffusion = GaussianDiffusion(make_betas("linear", 20, 1e-3, 0.3))
    network = lambda x, t: torch.sin(3 * x)  # noqa: E731

    def run(*indices: int) -> Tensor:
        noise = SampleNoise(seed=9, indices=torch.tensor(indices), shape=(1, 3, 3))
        return sample(diffusion, network, (len(indices), 1, 3, 3), noise=noise)

    assert torch.equal(run(5, 31_337, 2)[1], run(31_337)[0])  # elementwise arithmetic: bit for bit


BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": "euler"}, "method is 'euler': it must be one of ancestral, ddim, dpmpp_2m"),
    ({"method": "ancestral", "eta": 0.5}, "eta is 0.5 with method 'ancestral'"),
    ({"method": "ddim", "eta": 1.5}, r"eta is 1.5 with method 'ddim': .* lies in \[0, 1\]"),
    ({"method": "ddim", "eta": math.nan}, "eta is nan"),
    ({"noise": scalars(0.0).float()}, "noise is a tensor, but method 'ancestral'"),
    (
        {"noise": scalars(0.0).float(), "method": "ddim", "eta": 0.5},
        "noise is a tensor, but method 'ddim' with eta 0.5",
    ),
    (
        {"noise": torch.zeros(2, 1, 1, 1), "method": "ddim"},
        r"the initial noise is \[2, 1, 1, 1\]: shape \[1, 1, 1, 1\]",
    ),
    ({"noise": torch.zeros(1, 1, 1, 1, dtype=torch.uint8), "method": "ddim"}, "the initial noise is torch.uint8"),
    ({"noise": scalars(math.nan), "method": "ddim"}, "the initial noise holds NaN"),
    ({"spacing": "cubic", "steps": 3}, "spacing is 'cubic': it must be one of uniform, quadratic"),
    ({"steps": 11}, r"steps is 11: it must lie in 1\.\.10"),
    ({"start": (scalars(0.0), 10)}, r"start is at timestep 10: it must lie in 0\.\.9"),
    ({"start": (scalars(0.0), -1)}, r"start is at timestep -1: it must lie in 0\.\.9"),
    ({"start": (scalars(math.inf), 3)}, "start holds NaN or infinity"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD)
@unchecked()
def test_arguments_that_do_not_fit_are_refused_by_name(options: dict[str, Any], sentence: str) -> None:
    diffusion = GaussianDiffusion(make_betas("linear", 10, 1e-3, 0.3))
    arguments: dict[str, Any] = {"noise": lambda address: torch.zeros(1, 1, 1, 1), **options}
    with pytest.raises(ValueError, match=sentence):
        sample(diffusion, lambda x, t: x, (1, 1, 1, 1), **arguments)
