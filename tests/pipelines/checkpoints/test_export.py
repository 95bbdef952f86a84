"""What is exported samples in diffusers as it does here."""

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import NETWORK

from ddpm_core.checkpoint import checkpoint_name, open_checkpoint, write_checkpoint
from ddpm_core.configs import DiffusionConfig
from ddpm_core.errors import InputError
from ddpm_core.samplers import sample
from ddpm_core.unet import UNet
from pipelines.checkpoints import export_checkpoint
from pipelines.checkpoints.config import ExportConfig
from pipelines.checkpoints.foreign import scheduler_of

CONFIG = replace(NETWORK, dropout=0.0)
SHAPE = (2, 1, 8, 8)


def trained(storage: Path, diffusion: DiffusionConfig) -> str:
    """A run with one checkpoint of random weights, whose output layer is none of zeros."""
    torch.manual_seed(0)
    weights = {name: torch.randn_like(value) * 0.05 for name, value in UNet(CONFIG).state_dict().items()}
    folder = storage / "train" / "run"
    folder.mkdir(parents=True)
    config = {"unet": asdict(CONFIG), "diffusion": asdict(diffusion)}
    write_checkpoint(folder, {"step": 7, "model": weights, "ema": weights, "optimizer": {}}, config, [])
    return "run"


@pytest.mark.parametrize(
    "diffusion",
    [
        DiffusionConfig(num_timesteps=12, beta_end=0.4),
        DiffusionConfig(num_timesteps=12, beta_end=0.4, schedule="quad", var_type="fixedsmall"),
        DiffusionConfig(num_timesteps=12, beta_end=0.2, schedule="const", mean_type="xstart"),
        DiffusionConfig(num_timesteps=12, schedule="cosine", mean_type="v", var_type="fixedsmall"),
    ],
    ids=lambda diffusion: f"{diffusion.schedule}-{diffusion.mean_type}-{diffusion.var_type}",
)
def test_diffusers_samples_what_we_sample_from_an_export(tmp_path: Path, diffusion: DiffusionConfig) -> None:
    run = trained(tmp_path, diffusion)
    output = tmp_path / "exported"
    export_checkpoint(ExportConfig(run=run, output=str(output), storage=str(tmp_path)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import DDPMPipeline

        pipeline = DDPMPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    drawn = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(step)) for step in range(13)]
    noises = iter(drawn)
    x = next(noises)
    pipeline.scheduler.set_timesteps(12)
    for t in pipeline.scheduler.timesteps:
        with torch.no_grad():
            prediction = pipeline.unet(x, t).sample
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(noises))
            x = pipeline.scheduler.step(prediction, t, x).prev_sample
    checkpoint = open_checkpoint(tmp_path / "train" / "run" / checkpoint_name(7))
    network = UNet(checkpoint.unet_config())
    network.load_state_dict(checkpoint.weights("ema"))
    of_step = {12: drawn[0], **{11 - number: noise for number, noise in enumerate(drawn[1:])}}  # x_T's, then t = 11, ..
    ours = sample(diffusion.build(), network.eval(), SHAPE, noise=lambda t: of_step[t])
    # float32 schedules and embeddings there, float64 here, over twelve steps.
    torch.testing.assert_close(x, ours, rtol=1e-4, atol=1e-4)


def test_an_export_comes_back_as_the_process_it_was(tmp_path: Path) -> None:
    diffusion = DiffusionConfig(schedule="quad", var_type="fixedsmall")
    output = tmp_path / "exported"
    export_checkpoint(ExportConfig(run=trained(tmp_path, diffusion), output=str(output), storage=str(tmp_path)))
    assert scheduler_of(output / "unet") == diffusion


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mean_type": "xprev"}, "predicts 'xprev' with variance 'fixedlarge', which diffusers does not have"),
        ({"var_type": "learned_range", "loss_type": "hybrid"}, "with variance 'learned_range', which diffusers"),
    ],
)
def test_a_process_that_diffusers_lacks_is_refused_and_leaves_nothing(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    run = trained(tmp_path, DiffusionConfig(**changes))
    with pytest.raises(InputError, match=sentence):
        export_checkpoint(ExportConfig(run=run, output=str(tmp_path / "exported"), storage=str(tmp_path)))
    assert not (tmp_path / "exported").exists()


def test_an_export_overwrites_an_export_and_nothing_else(tmp_path: Path) -> None:
    config = ExportConfig(
        run=trained(tmp_path, DiffusionConfig()), output=str(tmp_path / "exported"), storage=str(tmp_path)
    )
    first = export_checkpoint(config)
    assert export_checkpoint(config) == first
    assert json.loads((first / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="a folder with other files in it"):
        export_checkpoint(replace(config, output=str(tmp_path / "mine")))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
