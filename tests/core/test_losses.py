"""The losses of Table 2 and the hybrid: what they average, what they weigh, whom their gradients reach."""

import math
from typing import Any, get_args

import pytest
import torch
from support.gaussian_case import GaussianData, constant, cumulative, scalars, unchecked
from torch import Tensor

from ddpm_core.configs import Cdf, LossType, MeanType, Schedule, VarType
from ddpm_core.diffusion import DiffusionConfig, GaussianDiffusion
from ddpm_core.schedules import make_betas

LINEAR = make_betas("linear")


def images(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "s2", "expected"),
    [
        ("linear", 1.0, 2.755132333968061e-01),
        ("linear", 0.25, 1.730534060836860e-01),
        ("linear", 65535 / (12 * 127.5**2), 1.927358535279365e-01),
        ("quad", 1.0, 4.226557285455062e-01),
        ("const", 1.0, 4.899999991753455e-02),
    ],
)
def test_expected_l_simple_of_gaussian_data_equals_the_closed_form(name: Schedule, s2: float, expected: float) -> None:
    """The error of a linear predictor is a x_0 + b eps, so its mean square is that of x_0 = s alone plus eps = 1 alone."""
    betas = make_betas(name)
    diffusion, predictor = GaussianDiffusion(betas), GaussianData(betas, s2).predictor()
    t, one, zero = torch.arange(1000), scalars(*[1.0] * 1000), scalars(*[0.0] * 1000)
    signal = diffusion.training_losses(predictor, math.sqrt(s2) * one, t, zero)
    noise = diffusion.training_losses(predictor, zero, t, one)
    assert float((signal + noise).mean()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mean_type", get_args(MeanType))
def test_mse_is_the_mean_square_distance_from_what_mean_type_names(mean_type: MeanType) -> None:
    diffusion = GaussianDiffusion(LINEAR, mean_type=mean_type)
    x_0, eps, output = images(0, 4, 3, 5, 2), images(1, 4, 3, 5, 2), images(2, 4, 3, 5, 2)
    t = torch.tensor([0, 1, 500, 999])
    expected = []
    abar = [1.0, *cumulative(LINEAR)]
    for i, step in enumerate(t.tolist()):
        a, before, beta = abar[step + 1], abar[step], float(LINEAR[step])
        x_t = math.sqrt(a) * x_0[i] + math.sqrt(1 - a) * eps[i]
        if step == 0:
            mu = x_0[i]
        else:  # the product of N(sqrt(before) x_0, 1 - before) and N(x_t; sqrt(1 - beta) ., beta)
            precision = 1 / (1 - before) + (1 - beta) / beta
            mu = (math.sqrt(before) * x_0[i] / (1 - before) + math.sqrt(1 - beta) * x_t / beta) / precision
        target = {"eps": eps[i], "xstart": x_0[i], "xprev": mu, "v": math.sqrt(a) * eps[i] - math.sqrt(1 - a) * x_0[i]}
        expected.append(float(((target[mean_type] - output[i]) ** 2).sum()) / 30)  # per dimension: 3 x 5 x 2
    losses = diffusion.training_losses(constant(output), x_0, t, eps)
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)


def test_a_network_that_says_zero_has_l_simple_one() -> None:
    """E eps^2 = 1. Of 100,000 numbers the mean has a standard error sqrt(2 / 1e5) = 0.0045; five of them: a false alarm in
    two million seeds, and the seed is fixed."""
    loss = GaussianDiffusion(LINEAR).training_losses(
        constant(scalars(0.0)), images(0, 1000, 1, 10, 10), torch.arange(1000), images(1, 1000, 1, 10, 10)
    )
    assert float(loss.mean()) == pytest.approx(1.0, abs=0.0225)


TABLE_2: list[tuple[MeanType, VarType, LossType]] = [
    ("xprev", "learned", "kl"),
    ("xprev", "fixedlarge", "kl"),
    ("xprev", "fixedlarge", "mse"),
    ("eps", "learned", "kl"),
    ("eps", "fixedlarge", "kl"),
    ("eps", "fixedlarge", "mse"),
]


@pytest.mark.parametrize(("mean_type", "var_type", "loss_type"), TABLE_2)
def test_every_cell_of_table_2_has_a_finite_loss_with_a_gradient(
    mean_type: MeanType, var_type: VarType, loss_type: LossType
) -> None:
    diffusion = DiffusionConfig(mean_type=mean_type, var_type=var_type, loss_type=loss_type).build()
    weight = torch.full((6 if var_type == "learned" else 3, 3, 1, 1), 0.1, requires_grad=True)
    t = torch.tensor([0, 1, 400, 999])
    x_0 = images(0, 4, 3, 4, 4).float().clamp(-1, 1)
    losses = diffusion.training_losses(
        lambda x, t: torch.nn.functional.conv2d(x, weight), x_0, t, images(1, 4, 3, 4, 4).float()
    )
    assert losses.shape == (4,)
    assert bool(losses.isfinite().all())
    (gradient,) = torch.autograd.grad(losses.sum(), weight)
    assert bool(gradient.isfinite().all())
    assert bool((gradient != 0).all())


@pytest.mark.parametrize("var_type", ["learned", "learned_range"])
def test_mse_with_a_learned_variance_is_refused_with_a_sentence(var_type: VarType) -> None:
    with pytest.raises(
        ValueError, match="the mean squared error does not train a variance; take loss_type 'kl' or 'hybrid'"
    ):
        GaussianDiffusion(LINEAR, var_type=var_type, loss_type="mse")


@pytest.mark.parametrize("var_type", ["fixedlarge", "fixedsmall"])
def test_hybrid_without_a_learned_variance_is_refused_with_a_sentence(var_type: VarType) -> None:
    with pytest.raises(ValueError, match="the hybrid loss adds a term for a learned variance"):
        GaussianDiffusion(LINEAR, var_type=var_type, loss_type="hybrid")


@pytest.mark.parametrize("cdf", ["exact", "tanh"])
@pytest.mark.parametrize(("mean_type", "var_type", "loss_type"), [cell for cell in TABLE_2 if cell[2] == "kl"])
def test_kl_is_the_term_of_the_bound_without_the_clip(
    mean_type: MeanType, var_type: VarType, loss_type: LossType, cdf: Cdf
) -> None:
    diffusion = GaussianDiffusion(LINEAR, mean_type, var_type, loss_type, cdf=cdf)
    x_0, eps, t = images(0, 4, 1, 3, 3), images(1, 4, 1, 3, 3), torch.tensor([0, 1, 500, 999])
    output = images(2, 4, 2 if var_type == "learned" else 1, 3, 3)
    network = lambda x, t: output  # noqa: E731
    losses = diffusion.training_losses(network, x_0, t, eps)
    x_t = diffusion.q_sample(x_0, t, eps)
    terms, other = (
        diffusion.vb_terms_bpd(network, x_0, x_t, t, clip_denoised=False, cdf=each)[0]
        for each in (cdf, "tanh" if cdf == "exact" else "exact")
    )
    assert torch.equal(losses, terms)
    assert torch.equal(losses[1:], other[1:])  # only the decoder has it
    assert losses[0] != other[0] or mean_type == "xprev"  # where this network is so wrong that both are at their floor
    assert diffusion.strided([0, 5]).cdf == cdf if mean_type == "eps" and var_type != "learned" else True
    clipped = diffusion.vb_terms_bpd(network, x_0, x_t, t, clip_denoised=True, cdf=cdf)[0]
    assert torch.equal(losses, clipped) == (mean_type == "xprev")  # whose mean no clip touches


def test_kl_is_a_single_term_in_bits_averaged_over_dimensions() -> None:
    """At t = 500, eps wrong by 1 everywhere: the weight of Eq. 12 plus the irreducible cost, over ln 2, for any shape."""
    diffusion = GaussianDiffusion(LINEAR, var_type="fixedsmall", loss_type="kl")
    for shape in [(1, 1, 1, 1), (2, 3, 4, 4)]:
        x, t = torch.full(shape, 0.25, dtype=torch.float64), torch.full((shape[0],), 499)
        losses = diffusion.training_losses(constant(scalars(2.0)), x, t, torch.ones_like(x))
        assert losses.tolist() == pytest.approx([5.508196510549459e-03 / math.log(2)] * shape[0], rel=1e-10)


def test_a_fresh_learned_variance_costs_what_the_paper_data_says() -> None:
    """log-variance 0 and no error in the mean: 2811.9 bits/dim over the 999 terms but L_0 (paper.md, 1.2)."""
    diffusion = GaussianDiffusion(LINEAR, var_type="learned", loss_type="kl")
    x_0, eps, t = scalars(*[0.25] * 1000), scalars(*[0.5] * 1000), torch.arange(1000)
    output = torch.cat([eps, torch.zeros_like(eps)], 1)
    losses = diffusion.training_losses(lambda x, t: output, x_0, t, eps)
    assert float(losses[1:].sum()) == pytest.approx(2811.9, abs=0.05)  # printed with one decimal


def hybrid_parts(var_type: VarType) -> dict[str, Any]:
    """Losses and their gradients at one network with a parameter for the mean and one for the variance."""
    x_0, eps, t = images(0, 4, 2, 3, 3).clamp(-1, 1), images(1, 4, 2, 3, 3), torch.tensor([0, 1, 500, 999])
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(-0.2, dtype=torch.float64, requires_grad=True)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([a * x, b * torch.ones_like(x)], 1)

    losses = {
        "hybrid": GaussianDiffusion(LINEAR, var_type=var_type, loss_type="hybrid").training_losses(
            network, x_0, t, eps
        ),
        "kl": GaussianDiffusion(LINEAR, var_type=var_type, loss_type="kl").training_losses(network, x_0, t, eps),
        "mse": GaussianDiffusion(LINEAR).training_losses(lambda x, t: network(x, t)[:, :2], x_0, t, eps),
    }
    gradients = {
        name: torch.autograd.grad(loss.sum(), (a, b), retain_graph=True, allow_unused=True)
        for name, loss in losses.items()
    }
    return {"losses": losses, "gradients": gradients}


@pytest.mark.parametrize("var_type", ["learned", "learned_range"])
def test_hybrid_is_l_simple_plus_a_thousandth_of_the_bound(var_type: VarType) -> None:
    losses = hybrid_parts(var_type)["losses"]
    # T terms stand for the whole bound: 0.001 * 1000 = 1.
    assert losses["hybrid"].tolist() == pytest.approx((losses["mse"] + losses["kl"]).tolist(), rel=1e-12)


@pytest.mark.parametrize("var_type", ["learned", "learned_range"])
def test_hybrids_bound_trains_the_variance_and_never_the_mean(var_type: VarType) -> None:
    gradients = hybrid_parts(var_type)["gradients"]
    mean, variance = gradients["hybrid"]
    assert mean.item() == pytest.approx(gradients["mse"][0].item(), rel=1e-12)
    assert variance.item() == pytest.approx(gradients["kl"][1].item(), rel=1e-12)
    assert gradients["kl"][0].item() != pytest.approx(gradients["mse"][0].item(), rel=0.01)  # it would show
    assert gradients["mse"][1].item() == 0.0


def test_hybrid_weighs_the_bound_by_the_number_of_steps() -> None:
    betas = make_betas("linear", 50, 2e-3, 0.3)
    x, t = scalars(0.2, 0.2), torch.tensor([0, 30])
    output = torch.cat([scalars(0.1, 0.1), scalars(0.0, 0.5)], 1)
    network = lambda x, t: output  # noqa: E731
    hybrid, kl = (
        GaussianDiffusion(betas, var_type="learned_range", loss_type=loss).training_losses(network, x, t, x)
        for loss in ("hybrid", "kl")
    )
    mse = [0.1**2] * 2
    assert hybrid.tolist() == pytest.approx([m + 0.05 * k for m, k in zip(mse, kl.tolist(), strict=True)], rel=1e-12)


@unchecked()
def test_bytes_are_refused_where_minus_one_to_one_is_wanted() -> None:
    diffusion, t = GaussianDiffusion(LINEAR), torch.tensor([3])
    pixels = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^x_start is torch.uint8 .* ddpm_core.images.to_float makes them from 8-bit"):
        diffusion.training_losses(lambda x, t: x, pixels, t, torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"^noise is torch.int64"):
        diffusion.training_losses(lambda x, t: x, torch.zeros(1, 3, 4, 4), t, pixels.long())
