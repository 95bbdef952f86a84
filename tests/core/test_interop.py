"""Weights in diffusers' layout: the same function there and here, either way, and a sentence for anything else."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: nothing is fetched

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_core.errors import InputError
from ddpm_core.interop import CONFIG, OLDER_WEIGHTS, WEIGHTS, from_diffusers, to_diffusers
from ddpm_core.presets import PRESETS
from ddpm_core.unet import UNet, UNetConfig

# config.json of google/ddpm-cifar10-32 as published; google/ddpm-church-256 differs in the four values below it.
CIFAR10: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
CHURCH: dict[str, Any] = CIFAR10 | {
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "sample_size": 256,
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}
# The same network at a width that takes no time.
NARROW = CIFAR10 | {"block_out_channels": [32, 64, 64, 64], "sample_size": 16}
SMALL = UNetConfig(image_size=8, in_channels=1, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))


def diffusers_model(config: dict[str, Any]) -> UNet2DModel:
    """A UNet2DModel of this config with random weights, none of them near zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet2DModel.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # diffusers starts norms at 1 and some biases at 0: move them all
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def relative_difference(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def compare(model: UNet2DModel, folder: Path, t: list[int]) -> float:
    config, weights = from_diffusers(folder)
    unet = UNet(config).eval()
    unet.load_state_dict(weights, strict=True)
    shape = (len(t), config.in_channels, config.image_size, config.image_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor(t)
    return relative_difference(unet(x, timesteps), model(x, timesteps).sample)


def rename_attention_to_older_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    older = {}
    for name, tensor in weights.items():
        for new, old in ("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"):
            name = name.replace(f".{new}.", f".{old}.")
        older[name] = tensor
    return older


def test_cifar10_layout_is_our_network(tmp_path: Path) -> None:
    model = diffusers_model(CIFAR10)
    model.save_pretrained(tmp_path)
    assert from_diffusers(tmp_path)[0] == replace(PRESETS["cifar10"].unet, dropout=0.0)
    # float32 through 60 layers in another order of summation, and diffusers' frequencies in float32 (2e-5 in the
    # embedding at large t): measured 1e-6.
    assert compare(model, tmp_path, [0, 1, 500, 999]) < 1e-5


def test_the_church_layout_at_a_quarter_of_its_width_is_our_network(tmp_path: Path) -> None:
    model = diffusers_model(CHURCH | {"block_out_channels": [32, 32, 64, 64, 128, 128]})
    model.save_pretrained(tmp_path)
    assert from_diffusers(tmp_path)[0] == replace(PRESETS["lsun_church"].unet, ch=32)
    assert compare(model, tmp_path, [700]) < 1e-5


@pytest.mark.slow
def test_church_layout_at_full_width_is_our_network(tmp_path: Path) -> None:
    model = diffusers_model(CHURCH)
    assert sum(parameter.numel() for parameter in model.parameters()) == 113_673_219
    model.save_pretrained(tmp_path)
    assert from_diffusers(tmp_path)[0] == PRESETS["lsun_church"].unet
    assert compare(model, tmp_path, [999]) < 1e-5


def test_older_attention_names_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    model = diffusers_model(NARROW)
    (tmp_path / CONFIG).write_text(json.dumps(NARROW))
    torch.save(rename_attention_to_older_names(model.state_dict()), tmp_path / OLDER_WEIGHTS)
    loaded = UNet2DModel.from_pretrained(tmp_path, use_safetensors=False).eval()
    assert compare(loaded, tmp_path, [10, 900]) < 1e-5
    assert compare(model, tmp_path, [10, 900]) < 1e-5
    save_file(rename_attention_to_older_names(model.state_dict()), tmp_path / WEIGHTS)
    (tmp_path / OLDER_WEIGHTS).unlink()
    assert compare(model, tmp_path, [10]) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, out_channels=2, dropout=0.1, num_res_blocks=2),
        replace(SMALL, ch_mult=(1, 2, 2), attn_resolutions=(8, 2)),
        replace(SMALL, attn_resolutions=()),
    ],
)
def test_what_we_write_diffusers_reads_as_the_same_function(config: UNetConfig, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        unet = UNet(config).eval()
        for parameter in unet.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)  # a new network's output is about 0
    to_diffusers(tmp_path, config, unet.state_dict())
    model = UNet2DModel.from_pretrained(tmp_path).eval()
    assert compare(model, tmp_path, [3, 999]) < 1e-5
    read, weights = from_diffusers(tmp_path)
    assert read == config
    assert all(torch.equal(weights[name], tensor) for name, tensor in unet.state_dict().items())
    assert not list(tmp_path.glob(".*"))  # nothing half-written stays


def test_written_config_is_the_published_one(tmp_path: Path) -> None:
    config = PRESETS["cifar10"].unet
    with torch.device("meta"):
        meta = UNet(config).state_dict()
    to_diffusers(tmp_path, config, {name: torch.zeros(tensor.shape) for name, tensor in meta.items()})
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written == {name: value for name, value in CIFAR10.items() if name != "_diffusers_version"} | {
        "dropout": 0.1
    }


def test_half_precision_files_come_back_as_float32(tmp_path: Path) -> None:
    model = diffusers_model(NARROW).half()
    model.save_pretrained(tmp_path)
    weights = from_diffusers(tmp_path)[1]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert torch.equal(weights["conv_in.weight"], model.conv_in.weight.detach().float())


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    to_diffusers(tmp_path, SMALL, UNet(SMALL).state_dict())
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"downsample_padding": 1}, "downsample_padding = 1"),
        ({"flip_sin_to_cos": True}, "flip_sin_to_cos = True"),
        ({"freq_shift": 0}, "freq_shift = 0"),
        ({"attention_head_dim": 8}, "attention_head_dim = 8"),
        ({"norm_eps": 1e-5}, "norm_eps = 1e-05"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"num_class_embeds": 10}, "num_class_embeds"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "down_block_types"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "mirror"),
        ({"block_out_channels": [32, 48]}, "multiples of the first"),
        ({"block_out_channels": [48, 96]}, "ch is 48"),
        ({"sample_size": None}, "does not describe"),
        ({"sample_size": [8, 16]}, "a square is wanted"),
        ({"_class_name": "UNet2DConditionModel"}, "'UNet2DConditionModel': one of 'UNet2DModel' is wanted"),
        ({"layers_per_block": 2}, "lack the tensor"),
        ({"in_channels": 3}, "conv_in.weight"),
        ({"encoder_hid_dim": 768}, "has encoder_hid_dim = 768, which the paper's network does not have"),
    ],
)
def test_another_network_is_refused_in_one_sentence(exported: Path, changes: dict[str, Any], sentence: str) -> None:
    values = json.loads((exported / CONFIG).read_text())
    (exported / CONFIG).write_text(json.dumps(values | changes))
    with pytest.raises(InputError, match=sentence) as error:
        from_diffusers(exported)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field", ["downsample_padding", "flip_sin_to_cos", "freq_shift", "attention_head_dim", "norm_eps"]
)
def test_a_field_that_config_json_leaves_out_has_diffusers_default(exported: Path, field: str) -> None:
    values = json.loads((exported / CONFIG).read_text())
    del values[field]
    (exported / CONFIG).write_text(json.dumps(values))
    with pytest.raises(InputError, match=field):
        from_diffusers(exported)


def test_surplus_tensors_are_refused(exported: Path) -> None:
    weights = load_file(exported / WEIGHTS)
    save_file(weights | {"class_embedding.weight": torch.zeros(3, 3)}, exported / WEIGHTS)
    with pytest.raises(InputError, match=r"1 tensors .* 'class_embedding.weight'"):
        from_diffusers(exported)


def test_missing_and_damaged_files_are_named(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        from_diffusers(exported / "nowhere")
    pipeline = tmp_path_factory.mktemp("pipeline")
    (pipeline / "unet").mkdir()
    (pipeline / "unet" / CONFIG).write_text("{}")
    with pytest.raises(InputError, match="in the folder 'unet'"):
        from_diffusers(pipeline)
    content = (exported / WEIGHTS).read_bytes()
    (exported / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        from_diffusers(exported)
    (exported / WEIGHTS).unlink()
    with pytest.raises(InputError, match="has neither"):
        from_diffusers(exported)
    (exported / OLDER_WEIGHTS).write_bytes(b"not a file of tensors")
    with pytest.raises(InputError, match="cannot be read"):
        from_diffusers(exported)
    (exported / CONFIG).write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        from_diffusers(exported)


class Payload:
    """An object whose unpickling would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_nothing_in_an_older_file_is_executed(exported: Path) -> None:
    (exported / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Payload(exported / "executed")}, exported / OLDER_WEIGHTS)
    with pytest.raises(InputError, match="cannot be read as tensors alone"):
        from_diffusers(exported)
    assert not (exported / "executed").exists()


def test_state_dict_of_another_network_is_not_written(tmp_path: Path) -> None:
    weights = UNet(SMALL).state_dict()
    with pytest.raises(ValueError, match="does not fit"):
        to_diffusers(tmp_path, replace(SMALL, ch=64), weights)
    del weights["conv_out.bias"]
    with pytest.raises(ValueError, match=r"conv_out\.bias"):
        to_diffusers(tmp_path, SMALL, weights)
    assert not list(tmp_path.iterdir())
