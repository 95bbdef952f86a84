"""The diffusion process of Ho, Jain & Abbeel 2020: q, its posterior, p_theta and every loss of Table 2.

Time: the paper's t runs 1..T; here `t` is 0..T-1, the paper's t minus one, and it is what the network receives.
Coefficients are float64 [T] buffers on the module's device; they are cast to the images' dtype when gathered.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from ddpm_core.checks import check_images, check_timesteps
from ddpm_core.configs import LEARNED, Cdf, LossType, MeanType, VarType, check_choice, check_objective
from ddpm_core.configs import DiffusionConfig as DiffusionConfig
from ddpm_core.gaussian import discretized_gaussian_log_likelihood, normal_kl

DenoiseFn = Callable[[Tensor, Tensor], Tensor]  # (x_t [B,C,H,W], t [B]) -> [B,C or 2C,H,W]


class Gaussian(NamedTuple):
    """A diagonal Gaussian: mean [B,C,H,W], variance and log-variance that broadcast against it."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class Prediction(NamedTuple):
    """p_theta(x_{t-1}|x_t) and the x_0 it was made from, all [B,C,H,W]."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_xstart: Tensor


def _tables(betas: Tensor) -> dict[str, Tensor]:
    """The coefficients of a schedule by name, float64 [T] each. Raises ValueError unless betas are variances in (0, 1]."""
    if betas.dtype != torch.float64 or betas.ndim != 1 or len(betas) < 1:
        raise ValueError(f"betas are {betas.dtype} {list(betas.shape)}: a float64 vector [T] is wanted")
    if not bool(((betas > 0) & (betas <= 1)).all()):
        raise ValueError(f"betas run from {betas.min():g} to {betas.max():g}: each must lie in (0, 1]")
    # Eq. 4: abar_t = product of alpha_s = 1 - beta_s for s <= t; abar_0 = 1.
    abar = torch.cumprod(1.0 - betas, 0)
    abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
    # Eq. 7: beta-tilde_t = beta_t (1 - abar_{t-1}) / (1 - abar_t)
    posterior_variance = betas * (1.0 - abar_prev) / (1.0 - abar)
    # beta-tilde_1 is 0. Ho's code takes beta-tilde_2 in its place, for both fixed choices: the first (log-)
    # variance only enters the decoder L_0, and samples are returned without noise.
    first = posterior_variance[1:2] if len(betas) > 1 else betas
    return {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": abar_prev,
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1.0 - abar).sqrt(),
        "sqrt_recip_alphas_cumprod": abar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1.0 / abar - 1.0).sqrt(),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": torch.cat([first, posterior_variance[1:]]).log(),
        # Eq. 7: mu-tilde_t = sqrt(abar_{t-1}) beta_t / (1 - abar_t) x_0 + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t
        "posterior_mean_coef1": betas * abar_prev.sqrt() / (1.0 - abar),
        "posterior_mean_coef2": (1.0 - betas).sqrt() * (1.0 - abar_prev) / (1.0 - abar),
        "fixedlarge_log_variance": torch.cat([first, betas[1:]]).log(),
    }


class GaussianDiffusion(nn.Module):
    """q(x_t|x_0), q(x_{t-1}|x_t,x_0), p_theta(x_{t-1}|x_t) and their losses for one variance schedule.

    betas: float64 [T], each in (0, 1].
    mean_type: what the network predicts (section 3.2): eps; xstart = x_0; xprev = mu-tilde; v = sqrt(abar) eps -
        sqrt(1-abar) x_0 (Salimans & Ho 2022).
    var_type: sigma_t^2 of p_theta: fixedlarge = beta_t; fixedsmall = beta-tilde_t (section 3.2); learned = the network's
        second C channels, taken raw as log-variance (Table 2); learned_range = those channels, in [-1, 1], interpolate
        between log beta-tilde_t and log beta_t (Nichol & Dhariwal 2021, Eq. 15).
    loss_type: mse = L_simple (Eq. 14); kl = one term of the bound (Eq. 5) in bits/dim; hybrid = L_simple + 0.001 T times
        that term, whose gradient reaches the variance alone (Nichol & Dhariwal 2021, Eq. 16).
    timesteps: int64 [T], what to tell the network at each t; 0..T-1 unless this is a strided chain.
    cdf: of the decoder's normal distribution in a loss that has the bound.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    timesteps: Tensor

    def __init__(
        self,
        betas: Float64[Tensor, " T"],
        mean_type: MeanType = "eps",
        var_type: VarType = "fixedlarge",
        loss_type: LossType = "mse",
        timesteps: Int[Tensor, " T"] | None = None,
        cdf: Cdf = "exact",
    ) -> None:
        super().__init__()
        check_objective(mean_type, var_type, loss_type)
        check_choice("cdf", cdf, Cdf)
        self.mean_type, self.var_type, self.loss_type, self.cdf = mean_type, var_type, loss_type, cdf
        tables = _tables(torch.as_tensor(betas))
        self.num_timesteps = T = len(tables["betas"])
        tables["timesteps"] = torch.arange(T) if timesteps is None else torch.as_tensor(timesteps)
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        self._eps_determines_xstart = bool(self.alphas_cumprod[-1] > 0)

    def strided(self, timesteps: Sequence[int]) -> "GaussianDiffusion":
        """The same process seen only at `timesteps` (ascending, in 0..T-1), with the posterior that follows from its betas.
        Raises ValueError if steps are left out and the network's output has a meaning for single ones alone (mean_type
        xprev, var_type learned)."""
        chosen = torch.as_tensor(timesteps, dtype=torch.int64)
        if chosen.ndim != 1 or len(chosen) < 1 or bool((chosen.diff() <= 0).any()):
            raise ValueError(f"timesteps are {list(timesteps)}: they must be ascending, each once")
        if chosen[0] < 0 or chosen[-1] >= self.num_timesteps:
            raise ValueError(
                f"timesteps run from {chosen[0]} to {chosen[-1]}: they must lie in 0..{self.num_timesteps - 1}"
            )
        if len(chosen) == self.num_timesteps:
            return self
        leaves_out = bool(chosen[-1] >= len(chosen))  # 0..t without a gap is the full chain's own tail
        if leaves_out and (self.mean_type == "xprev" or self.var_type == "learned"):
            raise ValueError(
                f"mean_type is {self.mean_type!r} and var_type is {self.var_type!r}: a network that predicts the previous "
                f"step or its variance fits only the full chain; take steps={self.num_timesteps}"
            )
        # beta'_i = 1 - abar(t_i) / abar(t_{i-1}): the chain's q(x_t|x_0) is that of the whole process.
        abar = self.alphas_cumprod.cpu()[chosen]
        betas = 1.0 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
        steps = self.timesteps.cpu()[chosen]
        chain = GaussianDiffusion(betas, self.mean_type, self.var_type, self.loss_type, steps, self.cdf)
        return chain.to(self.betas.device)

    def _at(self, table: str, t: Int[Tensor, " b"], like: Tensor) -> Tensor:
        """Coefficients at t, in the dtype of `like`, shaped to broadcast over its pixels."""
        check_timesteps(t, len(like), self.num_timesteps)
        values: Tensor = getattr(self, table)[t]
        return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))

    def _network(self, denoise_fn: DenoiseFn, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output at t, its channel count checked against var_type."""
        check_images("x_t", x_t)
        check_timesteps(t, len(x_t), self.num_timesteps)
        output = denoise_fn(x_t, self.timesteps[t])
        channels = x_t.shape[1] * (2 if self.var_type in LEARNED else 1)
        if output.shape != (x_t.shape[0], channels, *x_t.shape[2:]):
            raise ValueError(
                f"denoise_fn returned {list(output.shape)} for x_t {list(x_t.shape)}: var_type {self.var_type!r} wants "
                f"{channels} channels and the same height and width"
            )
        return output

    def q_mean_variance(self, x_start: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]) -> Gaussian:
        """q(x_t|x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), Eq. 4."""
        check_images("x_start", x_start)
        # Not 1 - abar from the table of abar: in float32 that is wrong by 1.7e-4 of itself at t = 0.
        std = self._at("sqrt_one_minus_alphas_cumprod", t, x_start)
        return Gaussian(self._at("sqrt_alphas_cumprod", t, x_start) * x_start, std.square(), 2.0 * std.log())

    def q_sample(
        self, x_start: Float[Tensor, "b c h w"], t: Int[Tensor, " b"], noise: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """x_t = sqrt(abar_t) x_0 + sqrt(1-abar_t) eps, Eq. 4."""
        check_images("x_start", x_start, finite=True)
        check_images("noise", noise, like=x_start, finite=True)
        # Eq. 4
        return (
            self._at("sqrt_alphas_cumprod", t, x_start) * x_start
            + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean_variance(
        self, x_start: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Gaussian:
        """q(x_{t-1}|x_t,x_0), Eq. 6 and Eq. 7. At t = 0 the variance is 0 and the log-variance that of t = 1."""
        check_images("x_start", x_start)
        check_images("x_t", x_t, like=x_start)
        # Eq. 7
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start + self._at("posterior_mean_coef2", t, x_t) * x_t
        return Gaussian(
            mean,
            self._at("posterior_variance", t, x_t),
            self._at("posterior_log_variance_clipped", t, x_t),
        )

    def predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 = x_t / sqrt(abar_t) - sqrt(1/abar_t - 1) eps, Eq. 15."""
        if not self._eps_determines_xstart:
            raise ValueError(
                "alphas_cumprod ends at 0 in this schedule (jsd), where eps does not determine x_0: "
                "take mean_type 'xstart' or 'v', or another schedule"
            )
        return (
            self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps
        )

    def predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """eps = (x_t - sqrt(abar_t) x_0) / sqrt(1-abar_t), Eq. 4 solved for eps."""
        signal = self._at("sqrt_alphas_cumprod", t, x_t) * x_start
        return (x_t - signal) / self._at("sqrt_one_minus_alphas_cumprod", t, x_t)

    def predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        """x_0 from mu-tilde, Eq. 7 solved for x_0."""
        return (xprev - self._at("posterior_mean_coef2", t, x_t) * x_t) / self._at("posterior_mean_coef1", t, x_t)

    def predict_xstart_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 = sqrt(abar_t) x_t - sqrt(1-abar_t) v."""
        return self._at("sqrt_alphas_cumprod", t, x_t) * x_t - self._at("sqrt_one_minus_alphas_cumprod", t, x_t) * v

    def target(self, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network's mean output should be, for this mean_type."""
        if self.mean_type == "eps":
            return noise
        if self.mean_type == "xstart":
            return x_start
        if self.mean_type == "xprev":
            return self.q_posterior_mean_variance(x_start, x_t, t).mean
        return (
            self._at("sqrt_alphas_cumprod", t, x_t) * noise
            - self._at("sqrt_one_minus_alphas_cumprod", t, x_t) * x_start
        )

    def p_mean_variance(
        self,
        denoise_fn: DenoiseFn,
        x_t: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
        clip_denoised: bool = True,
    ) -> Prediction:
        """p_theta(x_{t-1}|x_t). The mean is that of q(x_{t-1}|x_t, x_0) at the predicted x_0, clipped to [-1, 1] if
        `clip_denoised`; without the clip it equals Eq. 11. With mean_type xprev it is the network's output itself,
        and the clip only touches the reported x_0."""
        return self._p_from_output(self._network(denoise_fn, x_t, t), x_t, t, clip_denoised)

    def _p_from_output(self, output: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool) -> Prediction:
        mean_output, variance_output = output.split(x_t.shape[1], dim=1) if self.var_type in LEARNED else (output, None)
        log_variance = self._log_variance(variance_output, x_t, t)
        pred_xstart = self._predict_xstart(mean_output, x_t, t)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1.0, 1.0)
        # Eq. 11: mu_theta = mu-tilde(x_t, predicted x_0)
        mean = mean_output if self.mean_type == "xprev" else self.q_posterior_mean_variance(pred_xstart, x_t, t).mean
        return Prediction(mean, log_variance.exp(), log_variance, pred_xstart)

    def _log_variance(self, output: Tensor | None, x_t: Tensor, t: Tensor) -> Tensor:
        """ln sigma_t^2 [B,C,H,W]; `output`: the network's channels for it, if it is learned."""
        if output is None:
            table = "fixedlarge_log_variance" if self.var_type == "fixedlarge" else "posterior_log_variance_clipped"
            return self._at(table, t, x_t).expand_as(x_t)
        if self.var_type == "learned":
            return output
        low = self._at("posterior_log_variance_clipped", t, x_t)
        high = self._at("betas", t, x_t).log()
        # Nichol & Dhariwal 2021, Eq. 15: ln sigma_t^2 = v ln beta_t + (1 - v) ln beta-tilde_t
        fraction = (output + 1.0) / 2.0
        return fraction * high + (1.0 - fraction) * low

    def _predict_xstart(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_0 that the network's output says, not clipped."""
        if self.mean_type == "eps":
            return self.predict_xstart_from_eps(x_t, t, output)
        if self.mean_type == "xstart":
            return output
        if self.mean_type == "xprev":
            return self.predict_xstart_from_xprev(x_t, t, output)
        return self.predict_xstart_from_v(x_t, t, output)

    def p_sample(
        self,
        denoise_fn: DenoiseFn,
        x_t: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
        noise: Float[Tensor, "b c h w"],
        clip_denoised: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """One step of Algorithm 2: (x_{t-1}, predicted x_0). No noise is added at t = 0."""
        check_images("noise", noise, like=x_t)
        p = self.p_mean_variance(denoise_fn, x_t, t, clip_denoised)
        # Algorithm 2: x_{t-1} = mu_theta + sigma_t z, z = 0 in the last step.
        noised = p.mean + (0.5 * p.log_variance).exp() * noise
        return torch.where((t > 0).reshape(-1, 1, 1, 1), noised, p.mean), p.pred_xstart

    def training_losses(
        self,
        denoise_fn: DenoiseFn,
        x_start: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
        noise: Float[Tensor, "b c h w"],
    ) -> Float[Tensor, " b"]:
        """One loss an image: mse per dimension (Eq. 14; 1 for a network that says 0), kl in bits/dim (one term of Eq. 5,
        x_0 not clipped; for an error in eps it weighs as in Eq. 12), or hybrid."""
        x_t = self.q_sample(x_start, t, noise)
        output = self._network(denoise_fn, x_t, t)
        if self.loss_type == "kl":
            return self._vb_from_output(output, x_start, x_t, t, clip_denoised=False, cdf=self.cdf)[0]
        mean_output = output[:, : x_t.shape[1]]
        # Eq. 14, as a mean over dimensions
        mse = (self.target(x_start, x_t, t, noise) - mean_output).square().flatten(1).mean(1)
        if self.loss_type == "mse":
            return mse
        # Nichol & Dhariwal 2021, Eq. 16: the bound trains the variance alone, L_simple the mean.
        frozen = torch.cat([mean_output.detach(), output[:, x_t.shape[1] :]], dim=1)
        vb = self._vb_from_output(frozen, x_start, x_t, t, clip_denoised=False, cdf=self.cdf)[0]
        return mse + 0.001 * self.num_timesteps * vb

    def vb_terms_bpd(
        self,
        denoise_fn: DenoiseFn,
        x_start: Float[Tensor, "b c h w"],
        x_t: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
        clip_denoised: bool = True,
        cdf: Cdf = "exact",
    ) -> tuple[Tensor, Tensor]:
        """(term t of the bound, Eq. 5, in bits/dim [B], predicted x_0 [B,C,H,W]): L_0 at t = 0, with the decoder's `cdf`,
        else the paper's L_t."""
        check_images("x_start", x_start, finite=True)
        check_images("x_t", x_t, like=x_start, finite=True)
        return self._vb_from_output(self._network(denoise_fn, x_t, t), x_start, x_t, t, clip_denoised, cdf)

    def _vb_from_output(
        self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool, cdf: Cdf
    ) -> tuple[Tensor, Tensor]:
        q = self.q_posterior_mean_variance(x_start, x_t, t)
        p = self._p_from_output(output, x_t, t, clip_denoised)
        # Eq. 5: L_{t-1} = KL(q(x_{t-1}|x_t,x_0) || p_theta(x_{t-1}|x_t)), and L_0 = -log p_theta(x_0|x_1) at t = 0
        kl = normal_kl(q.mean, q.log_variance, p.mean, p.log_variance).flatten(1).mean(1)
        nll = -discretized_gaussian_log_likelihood(x_start, p.mean, 0.5 * p.log_variance, cdf).flatten(1).mean(1)
        return torch.where(t == 0, nll, kl) / math.log(2.0), p.pred_xstart

    def prior_bpd(self, x_start: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """L_T = KL(q(x_T|x_0) || N(0, I)) in bits/dim for each image (Eq. 5), in float64: it is a difference of
        nearly equal numbers, 1e-5 for the linear schedule."""
        check_images("x_start", x_start, finite=True)
        x = x_start.to(torch.float64)
        t = torch.full((len(x),), self.num_timesteps - 1, device=x.device)
        q = self.q_mean_variance(x, t)
        log_variance = torch.log1p(-self._at("alphas_cumprod", t, x))  # keeps the digits of 1 - abar_T near 1
        zero = torch.zeros_like(x)
        return normal_kl(q.mean, log_variance, zero, zero).flatten(1).mean(1) / math.log(2.0)
