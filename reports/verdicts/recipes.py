"""The presets' values as MLflow holds them, for telling what a run changed: `ddpm_core.presets` needs torch, which a report
is made without. A test holds the two together."""

from collections.abc import Mapping

from ddpm_core.records import PRESET_TAG
from reports.records.entities import TrainingRun

_COMMON = {
    "unet.in_channels": "3",
    "unet.out_channels": "None",
    "unet.num_res_blocks": "2",
    "unet.attn_resolutions": "16",
    "diffusion.schedule": "linear",
    "diffusion.num_timesteps": "1000",
    "diffusion.beta_start": "0.0001",
    "diffusion.beta_end": "0.02",
    "diffusion.mean_type": "eps",
    "diffusion.loss_type": "mse",
    "optim.warmup_steps": "5000",
    "optim.adam_betas": "0.9, 0.999",
    "optim.adam_eps": "1e-08",
    "optim.adam_eps_hat": "False",
    "optim.grad_clip": "1.0",
    "optim.clip_replicas": "1",
    "optim.ema_decay": "0.9999",
    "optim.ema_start": "copy",
}
_CIFAR10 = {
    **_COMMON,
    "unet.image_size": "32",
    "unet.ch": "128",
    "unet.ch_mult": "1, 2, 2, 2",
    "unet.dropout": "0.1",
    "diffusion.var_type": "fixedlarge",
    "optim.batch_size": "128",
    "optim.lr": "0.0002",
    "horizontal_flip": "True",
    "steps": "800000",
}
_CELEBAHQ256 = {
    **_COMMON,
    "unet.image_size": "256",
    "unet.ch": "128",
    "unet.ch_mult": "1, 1, 2, 2, 4, 4",
    "unet.dropout": "0.0",
    "diffusion.var_type": "fixedsmall",
    "optim.batch_size": "64",
    "optim.lr": "2e-05",
    "horizontal_flip": "True",
    "steps": "500000",
}
_LSUN_BEDROOM = {**_CELEBAHQ256, "horizontal_flip": "False", "steps": "2400000"}
_TINY = {
    **_COMMON,
    "unet.image_size": "8",
    "unet.in_channels": "1",
    "unet.ch": "32",
    "unet.ch_mult": "1, 2",
    "unet.num_res_blocks": "1",
    "unet.attn_resolutions": "4",
    "unet.dropout": "0.0",
    "diffusion.var_type": "fixedlarge",
    "optim.batch_size": "64",
    "optim.lr": "0.002",
    "optim.warmup_steps": "50",
    "optim.ema_decay": "0.995",
    "horizontal_flip": "False",
    "steps": "1200",
}

RECIPES: Mapping[str, Mapping[str, str]] = {
    "cifar10": _CIFAR10,
    "celebahq256": _CELEBAHQ256,
    "lsun_church": {**_CELEBAHQ256, "steps": "1200000"},
    "lsun_bedroom": _LSUN_BEDROOM,
    "lsun_bedroom_large": {**_LSUN_BEDROOM, "unet.ch": "192", "steps": "1150000"},
    "lsun_cat": {**_CELEBAHQ256, "steps": "1800000"},
    "tiny": _TINY,
}


def preset_of(run: TrainingRun) -> str:
    """The preset that a run started from, "" where that is not recorded."""
    return run.tags.get(PRESET_TAG, "")


def changes(run: TrainingRun) -> dict[str, str] | None:
    """What a run changed of its preset: parameter -> the preset's value. None where the preset is not known here."""
    recipe = RECIPES.get(preset_of(run))
    if recipe is None:
        return None
    return {name: value for name, value in recipe.items() if run.params.get(name, value) != value}
