"""The tables of Ho, Jain & Abbeel 2020 (arXiv:2006.11239v2) and its in-text numbers as data, with their places.

FID and IS are those of the Inception network of 2015-12-05 over 50,000 samples; NLL is in bits/dim, RMSE on the 0..255
scale. None stands for a blank cell: not reported, or, in Table 2, too unstable to be scored.
"""

from dataclasses import dataclass
from typing import Literal

SAMPLES = 50_000
SAMPLER_STEPS = 1_000

Group = Literal["conditional", "unconditional"]


@dataclass(frozen=True, kw_only=True)
class Cifar10Row:
    """A row of Table 1. `nll` is of the test set, and an upper bound if `nll_is_bound`."""

    group: Group
    model: str
    inception_score: float | None = None
    inception_score_std: float | None = None
    fid: float | None = None
    nll: float | None = None
    nll_train: float | None = None
    nll_is_bound: bool = False
    is_ddpm: bool = False


TABLE_1 = (
    Cifar10Row(group="conditional", model="EBM", inception_score=8.30, fid=37.9),
    Cifar10Row(group="conditional", model="JEM", inception_score=8.76, fid=38.4),
    Cifar10Row(group="conditional", model="BigGAN", inception_score=9.22, fid=14.73),
    Cifar10Row(group="conditional", model="StyleGAN2 + ADA (v1)", inception_score=10.06, fid=2.67),
    Cifar10Row(group="unconditional", model="Diffusion (original)", nll=5.40, nll_is_bound=True),
    Cifar10Row(
        group="unconditional",
        model="Gated PixelCNN",
        inception_score=4.60,
        fid=65.93,
        nll=3.03,
        nll_train=2.90,
    ),
    Cifar10Row(group="unconditional", model="Sparse Transformer", nll=2.80),
    Cifar10Row(group="unconditional", model="PixelIQN", inception_score=5.29, fid=49.46),
    Cifar10Row(group="unconditional", model="EBM", inception_score=6.78, fid=38.2),
    Cifar10Row(group="unconditional", model="NCSNv2", fid=31.75),
    Cifar10Row(group="unconditional", model="NCSN", inception_score=8.87, inception_score_std=0.12, fid=25.32),
    Cifar10Row(group="unconditional", model="SNGAN", inception_score=8.22, inception_score_std=0.05, fid=21.7),
    Cifar10Row(group="unconditional", model="SNGAN-DDLS", inception_score=9.09, inception_score_std=0.10, fid=15.42),
    Cifar10Row(
        group="unconditional",
        model="StyleGAN2 + ADA (v1)",
        inception_score=9.74,
        inception_score_std=0.05,
        fid=3.26,
    ),
    Cifar10Row(
        group="unconditional",
        model="DDPM (L, fixed isotropic Σ)",
        inception_score=7.67,
        inception_score_std=0.13,
        fid=13.51,
        nll=3.70,
        nll_train=3.69,
        nll_is_bound=True,
        is_ddpm=True,
    ),
    Cifar10Row(
        group="unconditional",
        model="DDPM (L_simple)",
        inception_score=9.46,
        inception_score_std=0.11,
        fid=3.17,
        nll=3.75,
        nll_train=3.72,
        nll_is_bound=True,
        is_ddpm=True,
    ),
)


@dataclass(frozen=True, kw_only=True)
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
    AblationRow(
        mean_type="xprev",
        objective="L, learned diagonal Σ",
        loss_type="kl",
        learned_variance=True,
        inception_score=7.28,
        inception_score_std=0.10,
        fid=23.69,
    ),
    AblationRow(
        mean_type="xprev",
        objective="L, fixed isotropic Σ",
        loss_type="kl",
        learned_variance=False,
        inception_score=8.06,
        inception_score_std=0.09,
        fid=13.22,
    ),
    AblationRow(mean_type="xprev", objective="‖μ̃ − μ̃_θ‖²", loss_type="mse", learned_variance=False),
    AblationRow(mean_type="eps", objective="L, learned diagonal Σ", loss_type="kl", learned_variance=True),
    AblationRow(
        mean_type="eps",
        objective="L, fixed isotropic Σ",
        loss_type="kl",
        learned_variance=False,
        inception_score=7.67,
        inception_score_std=0.13,
        fid=13.51,
    ),
    AblationRow(
        mean_type="eps",
        objective="‖ε − ε_θ‖² (L_simple)",
        loss_type="mse",
        learned_variance=False,
        inception_score=9.46,
        inception_score_std=0.11,
        fid=3.17,
    ),
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


@dataclass(frozen=True, kw_only=True)
class RateDistortionRow:
    """A row of Table 4 (CIFAR-10 test set): after `steps_sent` = T - t + 1 steps, `rate` bits/dim were sent and the
    progressive estimate of the image is off by `rmse`."""

    steps_sent: int
    rate: float
    rmse: float


TABLE_4 = tuple(
    RateDistortionRow(steps_sent=steps, rate=rate, rmse=rmse)
    for steps, rate, rmse in (
        (1000, 1.77581, 0.95136),
        (900, 0.11994, 12.02277),
        (800, 0.05415, 18.47482),
        (700, 0.02866, 24.43656),
        (600, 0.01507, 30.80948),
        (500, 0.00716, 38.03236),
        (400, 0.00282, 46.12765),
        (300, 0.00081, 54.18826),
        (200, 0.00013, 60.97170),
        (100, 0.00000, 67.60125),
    )
)

# In the text of sections 4.1 to 4.3.
CIFAR10_TEST_FID = 5.24  # against the test set; the headline 3.17 is against the training set
CIFAR10_RATE = 1.78  # L_1 + ... + L_T, bits/dim
CIFAR10_DISTORTION = 1.97  # L_0, bits/dim
CIFAR10_RMSE = 0.95  # of L_0's reconstruction, on the 0..255 scale
CIFAR10_PRIOR_BPD = 1e-5  # L_T, about


@dataclass(frozen=True, kw_only=True)
class Reported:
    """The FID the paper reports for its own model on a data set."""

    data: str
    fid: float
    place: str
    resolution: int
    reference_images: int


CIFAR10 = Reported(
    data="CIFAR-10",
    fid=3.17,
    place="Table 1, against the training set",
    resolution=32,
    reference_images=50_000,
)
CIFAR10_TEST = Reported(
    data="CIFAR-10",
    fid=CIFAR10_TEST_FID,
    place="section 4.1, against the test set",
    resolution=32,
    reference_images=10_000,
)
LSUN_BEDROOM = Reported(data="LSUN Bedroom", fid=6.36, place="Table 3", resolution=256, reference_images=50_000)
LSUN_CHURCH = Reported(data="LSUN Church", fid=7.89, place="Table 3", resolution=256, reference_images=50_000)
LSUN_CAT = Reported(data="LSUN Cat", fid=19.75, place="Table 3", resolution=256, reference_images=50_000)
