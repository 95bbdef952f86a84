"""Interpolation, shared latents and progressive generation: what must agree with what, whatever the network."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.gaussian_case import GaussianData
from torch import Tensor

from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.latents import (
    capture,
    decode,
    draw_latent,
    encode,
    interpolate,
    mix_latents,
    share_latent,
)
from ddpm_core.rng import SampleNoise
from ddpm_core.samplers import SamplerOptions, Step, sample, sample_steps
from ddpm_core.schedules import make_betas
from ddpm_core.timesteps import coarse_to_fine_depths

T = 40
DIFFUSION = GaussianDiffusion(make_betas("linear", T, beta_end=0.3))
SHAPE = (2, 1, 4, 4)
ITEM = SHAPE[1:]


def network(x: Tensor, t: Tensor) -> Tensor:
    """Nonlinear, and different at every t, so that nothing agrees by linearity."""
    return torch.tanh(1.5 * x + 0.02 * t.reshape(-1, 1, 1, 1))


def reconstruct(x_start: Tensor, depth: int, encoder_noise: Tensor, noise: SampleNoise, **options: Any) -> Tensor:
    """What an interpolation's ends are: an image noised to `depth` and sampled back ("Rec." of Fig. 8 and 9)."""
    return decode(DIFFUSION, network, encode(DIFFUSION, x_start, depth, encoder_noise), depth, noise, **options)


def stream(purpose: str, count: int = 2) -> SampleNoise:
    return SampleNoise(11, torch.arange(count), ITEM, purpose)


def images(purpose: str) -> Tensor:
    return stream(purpose)(0).clamp(-1, 1)


SOURCES = (images("first image"), images("second image"))
ENCODER = (stream("first encoder")(0), stream("second encoder")(0))
NOISE = stream("reverse")
ANCESTRAL: SamplerOptions = {}
METHODS: list[SamplerOptions] = [
    ANCESTRAL,
    {"steps": 14},
    {"method": "ddim", "steps": 14, "eta": 1.0},
    {"method": "ddim", "eta": 0.0},
    {"method": "dpmpp_2m", "steps": 14},
]


def test_depth_is_the_papers_t() -> None:
    x_t = encode(DIFFUSION, SOURCES[0], 7, ENCODER[0])
    abar = math.prod(1 - beta for beta in DIFFUSION.betas.tolist()[:7])
    # float32 arithmetic on numbers of order 1
    torch.testing.assert_close(x_t, math.sqrt(abar) * SOURCES[0] + math.sqrt(1 - abar) * ENCODER[0], rtol=0, atol=1e-6)


def test_depth_0_is_the_image_itself() -> None:
    assert torch.equal(encode(DIFFUSION, SOURCES[0], 0, ENCODER[0]), SOURCES[0])
    assert torch.equal(reconstruct(SOURCES[0], 0, ENCODER[0], NOISE), SOURCES[0])


def test_depth_beyond_the_process_is_refused() -> None:
    with pytest.raises(ValueError, match=r"depth is 41: it must lie in 0\.\.40"):
        encode(DIFFUSION, SOURCES[0], 41, ENCODER[0])
    with pytest.raises(ValueError, match="depth is -1"):
        decode(DIFFUSION, network, SOURCES[0], -1, NOISE)


def test_decoding_is_the_chain_from_its_depth_on_the_noised_image() -> None:
    visited: list[int] = []
    x_t = encode(DIFFUSION, SOURCES[0], 9, ENCODER[0])

    def listening(x: Tensor, t: Tensor) -> Tensor:
        if not visited:
            assert torch.equal(x, x_t)
        visited.append(int(t[0]))
        return network(x, t)

    decode(DIFFUSION, listening, x_t, 9, NOISE)
    assert visited == [8, 7, 6, 5, 4, 3, 2, 1, 0]


def test_reconstruction_of_gaussian_data_has_its_posterior_moments() -> None:
    # With the optimal network and the exact reverse variance, x_0' given x_0 is Gaussian with mean
    # gain sqrt(abar) x_0, gain = sqrt(abar) s^2/v, and a return trip keeps the marginal variance s^2.
    s2, depth, count = 0.25, 12, 20_000
    data = GaussianData(DIFFUSION.betas, s2)
    diffusion = GaussianDiffusion(DIFFUSION.betas, "eps", "learned", "kl")
    # The last step returns the mean, without noise: all variances but the last step's.
    predictor = data.predictor("eps", lambda t: math.log(data.xprev_variance(t)))
    indices = torch.arange(count)
    x_start = math.sqrt(s2) * SampleNoise(1, indices, (1, 1, 1), "data")(0)
    x_t = encode(diffusion, x_start, depth, SampleNoise(1, indices, (1, 1, 1), "encoder")(0))
    reverse = SampleNoise(1, indices, (1, 1, 1), "reverse")
    result = decode(diffusion, predictor, x_t, depth, reverse, clip_denoised=False)
    abar, v = data.abar[depth - 1], data.marginal(depth - 1)
    # Four standard errors of a covariance and a variance from 20,000 draws.
    covariance = float((result * x_start).mean())
    assert covariance == pytest.approx(abar * s2 / v * s2, abs=4 * s2 / math.sqrt(count))
    assert float(result.var()) == pytest.approx(s2 - data.xprev_variance(0), rel=4 * math.sqrt(2 / count))


@pytest.mark.parametrize("options", METHODS)
@pytest.mark.parametrize("depth", [0, 1, 20, T])
def test_ends_of_an_interpolation_are_the_sources_reconstructions(options: SamplerOptions, depth: int) -> None:
    row = interpolate(
        DIFFUSION, network, SOURCES, [0.0, 0.5, 1.0], depth, encoder_noise=ENCODER, noise=NOISE, **options
    )
    assert row.shape == (3, *SHAPE)
    for end, which in (0, 0), (2, 1):
        expected = reconstruct(SOURCES[which], depth, ENCODER[which], NOISE, **options)
        # Elementwise arithmetic: the batch around an image may only change vectorised tanh by rounding.
        torch.testing.assert_close(row[end], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", [0, 20])
def test_swapping_the_sources_mirrors_the_weights(depth: int) -> None:
    weights = [0.0, 0.25, 0.5, 0.75, 1.0]
    row = interpolate(DIFFUSION, network, SOURCES, weights, depth, encoder_noise=ENCODER, noise=NOISE)
    mirrored = interpolate(DIFFUSION, network, SOURCES[::-1], weights, depth, encoder_noise=ENCODER[::-1], noise=NOISE)
    torch.testing.assert_close(mirrored.flip(0), row, rtol=0, atol=1e-5)


def test_linear_mix_is_of_the_noised_latents() -> None:
    x_t = [
        encode(DIFFUSION, *pair, noise=noise) for pair, noise in zip(((s, 20) for s in SOURCES), ENCODER, strict=True)
    ]
    mixed = mix_latents(DIFFUSION, SOURCES, 0.3, 20, encoder_noise=ENCODER)
    torch.testing.assert_close(mixed, 0.7 * x_t[0] + 0.3 * x_t[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("weight", "share"), [(0.1, 0.82), (0.5, 0.5), (0.8, 0.68)])
def test_noise_variance_of_the_mix_is_the_sum_of_squared_weights(weight: float, share: float) -> None:
    count, depth = 2000, 20
    indices = torch.arange(count)
    noises = tuple(SampleNoise(2, indices, ITEM, name)(0) for name in ("a", "b"))
    sources = (torch.full_like(noises[0], 0.4), torch.full_like(noises[0], -0.8))
    mixed = mix_latents(DIFFUSION, sources, weight, depth, encoder_noise=(noises[0], noises[1]))
    abar = math.prod(1 - beta for beta in DIFFUSION.betas.tolist()[:depth])
    # 32,000 normals: four standard errors are 4 sqrt(2/32000) = 3.2 % of a variance, and 0.022 of a mean.
    assert float(mixed.var()) == pytest.approx((1 - abar) * share, rel=0.032)
    assert float(mixed.mean()) == pytest.approx(math.sqrt(abar) * ((1 - weight) * 0.4 - weight * 0.8), abs=0.022)


def test_all_weights_share_every_noise() -> None:
    asked: list[int] = []

    def noise(address: int) -> Tensor:
        asked.append(address)
        return NOISE(address)

    row = interpolate(DIFFUSION, network, SOURCES, [0.5, 0.5, 0.5], 20, encoder_noise=ENCODER, noise=noise)
    assert asked == list(range(19, 0, -1))  # once a step, for the whole row
    assert torch.equal(row[0], row[1])
    assert torch.equal(row[0], row[2])


def test_coarse_to_fine_goes_from_nothing_of_the_sources_to_their_pixels() -> None:
    depths = coarse_to_fine_depths(T)
    assert coarse_to_fine_depths(1000) == (1000, 875, 750, 625, 500, 375, 250, 125, 0)  # as Fig. 9 is labelled
    assert coarse_to_fine_depths(2) == (2, 1, 0)
    latents = [mix_latents(DIFFUSION, SOURCES, 0.5, depth, encoder_noise=ENCODER) for depth in depths]
    mean, noise = 0.5 * SOURCES[0] + 0.5 * SOURCES[1], 0.5 * ENCODER[0] + 0.5 * ENCODER[1]
    shares = [float((x * mean).mean() / mean.square().mean()) for x in latents]
    torch.testing.assert_close(latents[-1], mean)
    assert shares[-1] == pytest.approx(1.0)
    # abar_T is 0.0016: 4 % of the sources' amplitude is left.
    torch.testing.assert_close(latents[0], noise, rtol=0, atol=0.05)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_weights_beyond_the_sources_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        mix_latents(DIFFUSION, SOURCES, weight, 20, encoder_noise=ENCODER)


@pytest.mark.parametrize("options", [{}, {"steps": 14}, {"method": "ddim", "steps": 14, "eta": 1.0}])
def test_stopping_and_going_on_is_the_undivided_chain(options: SamplerOptions) -> None:
    whole = sample(DIFFUSION, network, SHAPE, noise=NOISE, **options)
    x_t = draw_latent(DIFFUSION, network, SHAPE, 19, noise=NOISE, **options)
    divided = decode(DIFFUSION, network, x_t, 19, NOISE, **options)
    # The two halves take their betas from ratios of the same abar: float64 rounding, then float32 arithmetic.
    torch.testing.assert_close(divided, whole, rtol=0, atol=1e-5)


def test_at_full_depth_only_the_prior_draw_is_shared() -> None:
    assert torch.equal(draw_latent(DIFFUSION, network, SHAPE, T, noise=NOISE), NOISE(T))


def test_samples_that_share_a_latent_differ_only_after_it() -> None:
    latent_noise, own = stream("shared"), stream("own", 2 * 32)
    spread = {}
    for depth in (T, 20, 5, 1):
        entered: list[Tensor] = []

        def listening(x: Tensor, t: Tensor, depth: int = depth, entered: list[Tensor] = entered) -> Tensor:
            if int(t[0]) == depth - 1 and len(x) == 64:
                entered.append(x)
            return network(x, t)

        x_t, samples = share_latent(DIFFUSION, listening, SHAPE, depth, 32, latent_noise=latent_noise, noise=own)
        assert x_t.shape == SHAPE
        assert samples.shape == (2, 32, *ITEM)
        assert torch.equal(entered[0].unflatten(0, (2, 32)), x_t[:, None].expand(2, 32, *ITEM))
        spread[depth] = float(samples.var(1).mean())
        other = stream("other", 64)
        again = share_latent(DIFFUSION, network, SHAPE, depth, 32, latent_noise=latent_noise, noise=other)
        assert torch.equal(again[0], x_t)
        assert depth == 1 or not torch.equal(again[1], samples)
    # Less noise follows a later split; at depth 1 none does, and all samples are one.
    assert spread[20] > spread[5] > spread[1]
    assert spread[1] == pytest.approx(0.0, abs=1e-12)


def test_a_depth_the_strided_chain_does_not_visit_is_refused() -> None:
    visited = [1, 4, 7, 10]
    chain = [step.t + 1 for step in sample_steps(DIFFUSION, network, SHAPE, noise=NOISE, steps=14)]
    assert set(visited) <= set(chain)
    with pytest.raises(
        ValueError, match=r"depth is 5: a chain of 14 steps does not stop there; take one of 1, 4, 7, 10"
    ):
        draw_latent(DIFFUSION, network, SHAPE, 5, noise=NOISE, steps=14)
    with pytest.raises(ValueError, match="depth is 0"):
        draw_latent(DIFFUSION, network, SHAPE, 0, noise=NOISE)


def test_captured_predictions_are_the_chains_own_and_the_rest_is_let_go() -> None:
    steps = list(sample_steps(DIFFUSION, network, SHAPE, noise=NOISE))
    chosen = [39, 20, 1, 0]
    alive: list[Any] = []

    def chain() -> Iterator[Step]:
        import weakref

        for step in sample_steps(DIFFUSION, network, SHAPE, noise=NOISE):
            alive.append(weakref.ref(step.pred_xstart))
            yield step

    progression = capture(chain(), chosen)
    assert list(progression.predictions) == chosen
    for step in steps:
        if step.t in chosen:
            assert torch.equal(progression.predictions[step.t], step.pred_xstart)
    assert torch.equal(progression.sample, steps[-1].x)
    assert sum(reference() is not None for reference in alive) == len(chosen)


def test_timesteps_that_are_not_visited_are_named() -> None:
    chain = sample_steps(DIFFUSION, network, SHAPE, noise=NOISE, steps=14)
    with pytest.raises(ValueError, match=r"timesteps \[5, 7\] are not visited"):
        capture(chain, [0, 5, 7])
    with pytest.raises(ValueError, match="not visited"):
        capture(itertools.chain(), [0])
