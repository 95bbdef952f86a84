"""The presets are the paper's table (appendix B), value by value."""

from dataclasses import asdict, fields

import pytest
import torch

from ddpm_core.presets import PRESETS
from ddpm_core.unet import UNet

# name: size, width, multipliers, dropout, sigma^2, learning rate, batch, steps, flips
TABLE = {
    "cifar10": (32, 128, (1, 2, 2, 2), 0.1, "fixedlarge", 2e-4, 128, 800_000, True),
    "celebahq256": (256, 128, (1, 1, 2, 2, 4, 4), 0.0, "fixedsmall", 2e-5, 64, 500_000, True),
    "lsun_church": (256, 128, (1, 1, 2, 2, 4, 4), 0.0, "fixedsmall", 2e-5, 64, 1_200_000, True),
    "lsun_cat": (256, 128, (1, 1, 2, 2, 4, 4), 0.0, "fixedsmall", 2e-5, 64, 1_800_000, True),
    "lsun_bedroom": (256, 128, (1, 1, 2, 2, 4, 4), 0.0, "fixedsmall", 2e-5, 64, 2_400_000, False),
    "lsun_bedroom_large": (256, 192, (1, 1, 2, 2, 4, 4), 0.0, "fixedsmall", 2e-5, 64, 1_150_000, False),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_is_its_row_of_the_papers_table(name: str) -> None:
    p = PRESETS[name]
    row = (
        p.unet.image_size,
        p.unet.ch,
        p.unet.ch_mult,
        p.unet.dropout,
        p.diffusion.var_type,
        p.optim.lr,
        p.optim.batch_size,
        p.steps,
        p.horizontal_flip,
    )
    assert row == TABLE[name]


@pytest.mark.parametrize("name", TABLE)
def test_what_the_paper_keeps_the_same_is_the_same_in_every_preset(name: str) -> None:
    p = PRESETS[name]
    assert (p.unet.in_channels, p.unet.out_channels) == (3, None)
    assert (p.unet.num_res_blocks, p.unet.attn_resolutions) == (2, (16,))
    d = p.diffusion
    assert (d.schedule, d.num_timesteps, d.beta_start, d.beta_end) == ("linear", 1000, 1e-4, 0.02)
    assert (d.mean_type, d.loss_type) == ("eps", "mse")
    o = p.optim
    assert (o.adam_betas, o.adam_eps, o.warmup_steps, o.grad_clip) == ((0.9, 0.999), 1e-8, 5000, 1.0)
    assert o.ema_decay == 0.9999


def test_there_is_no_other_preset_but_the_laptops() -> None:
    assert set(PRESETS) == {*TABLE, "tiny"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_what_fits_together(name: str) -> None:
    p = PRESETS[name]
    assert len(p.diffusion.build().betas) == p.diffusion.num_timesteps
    with torch.device("meta"):
        assert sum(q.numel() for q in UNet(p.unet).parameters()) > 0
    assert p.description.endswith(".")


def test_the_tiny_preset_is_small() -> None:
    assert sum(q.numel() for q in UNet(PRESETS["tiny"].unet).parameters()) < 1_000_000
    assert PRESETS["tiny"].steps <= 5000


def test_presets_are_frozen() -> None:
    p = PRESETS["cifar10"]
    for owner in (p, p.unet, p.diffusion, p.optim):
        with pytest.raises(AttributeError, match="cannot assign"):
            setattr(owner, fields(owner)[0].name, None)
    assert asdict(p)["unet"]["ch"] == 128
