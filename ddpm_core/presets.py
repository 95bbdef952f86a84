"""The paper's models and recipes as frozen values (Ho, Jain & Abbeel 2020, appendix B), and one for a laptop.

Where the paper and its released code disagree, or the code does what a data-parallel run cannot do alike, every preset
follows the side named here; the other is an option:

    x_0 while sampling         clipped to [-1, 1]: code (Algorithm 2 has no clip)
    sigma_t^2                  beta_t for CIFAR-10, beta-tilde_t at 256 pixels: code; --diffusion.var-type
    flips                      all but Bedroom: paper. The code's commands flip Bedroom and not Cat; --horizontal-flip
    gradient clip              of the whole batch's gradient to norm 1, so that a run does not depend on how many workers
                               there are. Code: each of 8 TPU cores' before the average; --optim.clip-replicas 8. The
                               paper names no clip
    Adam's epsilon             after the bias correction: Adam's Algorithm 1. Code: before it, as TensorFlow;
                               --optim.adam-eps-hat
    warm-up                    5,000 steps from a learning rate of 0: code (the paper names none)
    EMA's first update         copies the weights: code; --optim.ema-start
    steps                      the paper's. The released checkpoints are of 790,000 (CIFAR-10), 4,432,000 (Church),
                               2,388,000 (Bedroom) and 1,761,000 (Cat); --steps

Hours are the paper's on its hardware, a TPU v3-8: 21 steps a second for CIFAR-10, 2.2 at 256 pixels. ddpm_core.costs.plan
gives those of other hardware. Scores are FIDs of 50,000 samples with EMA weights against the training images.
"""

from dataclasses import dataclass, replace

from ddpm_core.configs import DiffusionConfig, OptimConfig, UNetConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model, its diffusion process and its training recipe."""

    description: str  # what it is, the paper's hardware and hours, the score to expect
    unet: UNetConfig
    diffusion: DiffusionConfig
    optim: OptimConfig
    steps: int
    horizontal_flip: bool


CIFAR10 = Preset(
    description="CIFAR-10 at 32x32, 35.7M parameters. Paper: 800k steps, 10.6 h on a TPU v3-8; FID 3.17, IS 9.46.",
    unet=UNetConfig(image_size=32, ch=128, ch_mult=(1, 2, 2, 2), attn_resolutions=(16,), dropout=0.1),
    diffusion=DiffusionConfig(var_type="fixedlarge"),
    optim=OptimConfig(batch_size=128, lr=2e-4),
    steps=800_000,
    horizontal_flip=True,
)
"""python jobs/train_cifar10.py --shards <shards> --workers 8

10.6 hours on a TPU v3-8. FID 3.17 (5.24 against the test images), IS 9.46, at most 3.75 bits/dim on test images (Tables 1
and 2). On the way a reproduction, tqch/ddpm-torch, reports FID 9.2 after 47,000 steps, 5.8 after 94,000, 4.1 after 187,000
and 3.2 at the end, with a training loss of 0.0295 falling to 0.0277.
"""

CELEBAHQ256 = Preset(
    description="CelebA-HQ at 256x256, 114M parameters. Paper: 500k steps, 2.6 days on a TPU v3-8; no FID reported.",
    unet=UNetConfig(image_size=256, ch=128, ch_mult=(1, 1, 2, 2, 4, 4), attn_resolutions=(16,)),
    diffusion=DiffusionConfig(var_type="fixedsmall"),
    optim=OptimConfig(batch_size=64, lr=2e-5),
    steps=500_000,
    horizontal_flip=True,
)
"""python jobs/train_celebahq.py --shards <shards> --workers 8

63 hours on a TPU v3-8. The paper reports no score; tqch/ddpm-torch, with the same recipe, reports FID 19.7 after 56,000
steps, 12.0 after 225,000, 8.9 after 393,000, with a training loss of about 0.010.
"""

LSUN_CHURCH = replace(
    CELEBAHQ256,
    description="LSUN Church at 256x256, 114M parameters. Paper: 1.2M steps, 6.3 days on a TPU v3-8; FID 7.89.",
    steps=1_200_000,
)
"""python jobs/train_lsun.py church --shards <shards> --workers 8

152 hours on a TPU v3-8. FID 7.89 (Table 3).
"""

LSUN_BEDROOM = replace(
    CELEBAHQ256,
    description="LSUN Bedroom at 256x256, 114M parameters. Paper: 2.4M steps, 12.6 days on a TPU v3-8; FID 6.36.",
    steps=2_400_000,
    horizontal_flip=False,
)
"""python jobs/train_lsun.py bedroom --shards <shards> --workers 8

303 hours on a TPU v3-8. FID 6.36 (Table 3).
"""

LSUN_BEDROOM_LARGE = replace(
    LSUN_BEDROOM,
    description="LSUN Bedroom at 256x256, 256M parameters (width 192). Paper: 1.15M steps; FID 4.90.",
    unet=replace(CELEBAHQ256.unet, ch=192),
    steps=1_150_000,
)
"""python jobs/train_lsun.py bedroom-large --shards <shards> --workers 8

The paper gives no hours: 2.25 times the FLOPs a step of the model of 114M parameters. FID 4.90 (Table 3). Width 192 is
inferred: of the multiples of 32 it alone comes near the paper's 256M parameters.
"""

LSUN_CAT = replace(
    CELEBAHQ256,
    description="LSUN Cat at 256x256, 114M parameters. Paper: 1.8M steps, 9.5 days on a TPU v3-8; FID 19.75.",
    steps=1_800_000,
)
"""python jobs/train_lsun.py cat --shards <shards> --workers 8

227 hours on a TPU v3-8. FID 19.75 (Table 3).
"""

TINY = Preset(
    description="Grey images at 8x8: minutes on two CPU cores, to see the whole workflow. Not in the paper.",
    unet=UNetConfig(image_size=8, in_channels=1, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,)),
    diffusion=DiffusionConfig(var_type="fixedlarge"),
    optim=OptimConfig(batch_size=64, lr=2e-3, warmup_steps=50, ema_decay=0.995),
    steps=1200,
    horizontal_flip=False,
)
"""python jobs/train_lsun.py tiny --shards <shards> --workers 2

Minutes on two CPU cores: the recipe of the demo, whose images are digits.
"""

PRESETS: dict[str, Preset] = {
    "cifar10": CIFAR10,
    "celebahq256": CELEBAHQ256,
    "lsun_church": LSUN_CHURCH,
    "lsun_bedroom": LSUN_BEDROOM,
    "lsun_bedroom_large": LSUN_BEDROOM_LARGE,
    "lsun_cat": LSUN_CAT,
    "tiny": TINY,
}
