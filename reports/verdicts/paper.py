"""The tables of Ho, Jain & Abbeel 2020 (arXiv:2006.11239v2) and its in-text numbers as data, with their places.

FID and IS are those of the Inception network of 2015-12-05 over 50,000 samples; NLL is in bits/dim, RMSE on the 0..255
scale. None stands for a blank cell: not reported, or, in Table 2, too unstable to be scored.
"""

from dataclasses import dataclass
from typing import Literal

SAMPLES = 50_000
SAMPLER_STEPS = 1_000


@dataclass(frozen=True)
class Cifar10Row:
    """A row of Table 1. `nll` is of the test set, and an upper bound if `nll_is_bound`."""

    model: str
    inception_score: float | None = None
    inception_score_std: float | None = None
    fid: float | None = None
    nll: float | None = None
    nll_train: float | None = None
    nll_is_bound: bool = False
    conditional: bool = False
    is_ddpm: bool = False


TABLE_1 = (
    Cifar10Row("EBM", 8.30, fid=37.9, conditional=True),
    Cifar10Row("JEM", 8.76, fid=38.4, conditional=True),
    Cifar10Row("BigGAN", 9.22, fid=14.73, conditional=True),
    Cifar10Row("StyleGAN2 + ADA (v1)", 10.06, fid=2.67, conditional=True),
    Cifar10Row("Diffusion (original)", nll=5.40, nll_is_bound=True),
    Cifar10Row("Gated PixelCNN", 4.60, fid=65.93, nll=3.03, nll_train=2.90),
    Cifar10Row("Sparse Transformer", nll=2.80),
    Cifar10Row("PixelIQN", 5.29, fid=49.46),
    Cifar10Row("EBM", 6.78, fid=38.2),
    Cifar10Row("NCSNv2", fid=31.75),
    Cifar10Row("NCSN", 8.87, 0.12, 25.32),
    Cifar10Row("SNGAN", 8.22, 0.05, 21.7),
    Cifar10Row("SNGAN-DDLS", 9.09, 0.10, 15.42),
    Cifar10Row("StyleGAN2 + ADA (v1)", 9.74, 0.05, 3.26),
    Cifar10Row("DDPM (L, fixed isotropic Σ)", 7.67, 0.13, 13.51, 3.70, 3.69, nll_is_bound=True, is_ddpm=True),
    Cifar10Row("DDPM (L_simple)", 9.46, 0.11, 3.17, 3.75, 3.72, nll_is_bound=True, is_ddpm=True),
)


@dataclass(frozen=True)
class AblationRow:
    """A row of Table 2: what the network predicts and which objective it is trained by, in this project's words."""

    mean_type: Literal["xprev", "eps"]
    objective: str
    loss_type: Literal["kl", "mse"]
    learned_variance: bool
    inception_score: float | None = None
    inception_score_std: float | None = None
    fid: float | None = None


TABLE_2 = (
    AblationRow("xprev", "L, learned diagonal Σ", "kl", True, 7.28, 0.10, 23.69),
    AblationRow("xprev", "L, fixed isotropic Σ", "kl", False, 8.06, 0.09, 13.22),
    AblationRow("xprev", "‖μ̃ − μ̃_θ‖²", "mse", False),
    AblationRow("eps", "L, learned diagonal Σ", "kl", True),
    AblationRow("eps", "L, fixed isotropic Σ", "kl", False, 7.67, 0.13, 13.51),
    AblationRow("eps", "‖ε − ε_θ‖² (L_simple)", "mse", False, 9.46, 0.11, 3.17),
)


@dataclass(frozen=True, kw_only=True)
class LsunRow:
    """A row of Table 3: FID on LSUN at 256 x 256."""

    model: str
    bedroom: float | None = None
    church: float | None = None
    cat: float | None = None
    is_ddpm: bool = False


TABLE_3 = (
    LsunRow(model="ProgressiveGAN", bedroom=8.34, church=6.42, cat=37.52),
    LsunRow(model="StyleGAN", bedroom=2.65, church=4.21, cat=8.53),
    LsunRow(model="StyleGAN2", church=3.86, cat=6.93),
    LsunRow(model="DDPM (L_simple)", bedroom=6.36, church=7.89, cat=19.75, is_ddpm=True),
    LsunRow(model="DDPM (L_simple, large)", bedroom=4.90, is_ddpm=True),
)


@dataclass(frozen=True)
class RateDistortionRow:
    """A row of Table 4 (CIFAR-10 test set): after `steps_sent` = T - t + 1 steps, `rate` bits/dim were sent and the
    progressive estimate of the image is off by `rmse`."""

    steps_sent: int
    rate: float
    rmse: float


TABLE_4 = (
    RateDistortionRow(1000, 1.77581, 0.95136),
    RateDistortionRow(900, 0.11994, 12.02277),
    RateDistortionRow(800, 0.05415, 18.47482),
    RateDistortionRow(700, 0.02866, 24.43656),
    RateDistortionRow(600, 0.01507, 30.80948),
    RateDistortionRow(500, 0.00716, 38.03236),
    RateDistortionRow(400, 0.00282, 46.12765),
    RateDistortionRow(300, 0.00081, 54.18826),
    RateDistortionRow(200, 0.00013, 60.97170),
    RateDistortionRow(100, 0.00000, 67.60125),
)

SIMPLE = TABLE_1[-1]  # the model that the paper samples from, trained by L_simple

# In the text of sections 4.1 to 4.3.
CIFAR10_TEST_FID = 5.24  # against the test set; the headline 3.17 is against the training set
CIFAR10_RATE = 1.78  # L_1 + ... + L_T, bits/dim
CIFAR10_DISTORTION = 1.97  # L_0, bits/dim
CIFAR10_RMSE = 0.95  # of L_0's reconstruction, on the 0..255 scale
CIFAR10_PRIOR_BPD = 1e-5  # L_T, about


@dataclass(frozen=True)
class Reported:
    """The FID the paper reports for its own model on a data set."""

    data: str
    fid: float
    place: str
    resolution: int
    reference_images: int


CIFAR10 = Reported("CIFAR-10", 3.17, "Table 1, against the training set", 32, 50_000)
CIFAR10_TEST = Reported("CIFAR-10", CIFAR10_TEST_FID, "section 4.1, against the test set", 32, 10_000)
LSUN_BEDROOM = Reported("LSUN Bedroom", 6.36, "Table 3", 256, 50_000)
LSUN_CHURCH = Reported("LSUN Church", 7.89, "Table 3", 256, 50_000)
LSUN_CAT = Reported("LSUN Cat", 19.75, "Table 3", 256, 50_000)
