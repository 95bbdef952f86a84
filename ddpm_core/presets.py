"""The paper's models and recipes as frozen values (appendix B), and one small enough for a laptop.

Where paper and released code disagree, each preset follows: x_0 clipped while sampling (code), sigma^2 = beta_t for
CIFAR-10 and beta-tilde_t at 256 pixels (code), flips everywhere but on Bedroom (paper), the learning rate's first step 0
and EMA's first update a copy (code). Gradients are clipped to norm 1 after they are averaged over workers, so that a run
does not depend on how many there are; the released code clips each replica's before.
"""

from dataclasses import dataclass, replace

from ddpm_core.diffusion import DiffusionConfig
from ddpm_core.training import OptimConfig
from ddpm_core.unet import UNetConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model, its diffusion process and its training recipe."""

    description: str  # what it is, the paper's hardware and hours, the score to expect
    unet: UNetConfig
    diffusion: DiffusionConfig
    optim: OptimConfig
    steps: int
    horizontal_flip: bool


_CIFAR10 = Preset(
    description="CIFAR-10 at 32x32, 35.7M parameters. Paper: 800k steps, 10.6 h on a TPU v3-8; FID 3.17, IS 9.46.",
    unet=UNetConfig(image_size=32, ch=128, ch_mult=(1, 2, 2, 2), attn_resolutions=(16,), dropout=0.1),
    diffusion=DiffusionConfig(var_type="fixedlarge"),
    optim=OptimConfig(batch_size=128, lr=2e-4),
    steps=800_000,
    horizontal_flip=True,
)

_AT_256 = Preset(
    description="CelebA-HQ at 256x256, 114M parameters. Paper: 500k steps, 2.6 days on a TPU v3-8; no FID reported.",
    unet=UNetConfig(image_size=256, ch=128, ch_mult=(1, 1, 2, 2, 4, 4), attn_resolutions=(16,)),
    diffusion=DiffusionConfig(var_type="fixedsmall"),
    optim=OptimConfig(batch_size=64, lr=2e-5),
    steps=500_000,
    horizontal_flip=True,
)

PRESETS: dict[str, Preset] = {
    "cifar10": _CIFAR10,
    "celebahq256": _AT_256,
    "lsun_church": replace(
        _AT_256,
        description="LSUN Church at 256x256, 114M parameters. Paper: 1.2M steps, 6.3 days on a TPU v3-8; FID 7.89.",
        steps=1_200_000,
    ),
    "lsun_bedroom": replace(
        _AT_256,
        description="LSUN Bedroom at 256x256, 114M parameters. Paper: 2.4M steps, 12.6 days on a TPU v3-8; FID 6.36.",
        steps=2_400_000,
        horizontal_flip=False,
    ),
    "lsun_bedroom_large": replace(
        _AT_256,
        description="LSUN Bedroom at 256x256, 256M parameters (width 192). Paper: 1.15M steps; FID 4.90.",
        unet=replace(_AT_256.unet, ch=192),
        steps=1_150_000,
        horizontal_flip=False,
    ),
    "lsun_cat": replace(
        _AT_256,
        description="LSUN Cat at 256x256, 114M parameters. Paper: 1.8M steps, 9.5 days on a TPU v3-8; FID 19.75.",
        steps=1_800_000,
    ),
    "tiny": Preset(
        description="Grey images at 8x8: minutes on two CPU cores, to see the whole workflow. Not in the paper.",
        unet=UNetConfig(image_size=8, in_channels=1, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,)),
        diffusion=DiffusionConfig(var_type="fixedlarge"),
        optim=OptimConfig(batch_size=64, lr=2e-3, warmup_steps=50, ema_decay=0.995),
        steps=1200,
        horizontal_flip=False,
    ),
}
