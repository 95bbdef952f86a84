"""Weights in and out in the layout of Hugging Face diffusers' UNet2DModel, as in google/ddpm-cifar10-32 and -church-256.

With the config those models carry, UNet2DModel is Ho's network: sin before cos (flip_sin_to_cos false), frequencies down
to 1e-4 (freq_shift 1: half - 1 in the exponent), downsampling padded below and at the right only (downsample_padding 0),
one attention head (attention_head_dim null), GroupNorm eps 1e-6. Any other value is a different function of the same
weights and is refused. One difference remains: diffusers computes the frequencies in float32, an error of up to 3e-5 in
the embedding, where ours are float64.

Not in the files: the diffusion process, and (in the published ones) dropout, which only training needs.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_core import typed
from ddpm_core.commit import committed_file, write_json
from ddpm_core.errors import InputError, one_line
from ddpm_core.unet import Block, Downsample, UNet, UNetConfig, Upsample

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
OLDER_WEIGHTS = "diffusion_pytorch_model.bin"

# (what UNet2DModel takes if config.json does not say, what our network is); the two differ in the first five.
_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "attention_head_dim": (8, (None,)),
    "downsample_padding": (1, (0,)),
    "flip_sin_to_cos": (True, (False,)),
    "freq_shift": (0, (1,)),
    "norm_eps": (1e-5, (1e-6,)),
    "act_fn": ("silu", ("silu", "swish")),
    "add_attention": (True, (True,)),
    "attn_norm_num_groups": (None, (None, 32)),
    "center_input_sample": (False, (False,)),
    "class_embed_type": (None, (None,)),
    "downsample_type": ("conv", ("conv",)),
    "mid_block_scale_factor": (1, (1,)),
    "mid_block_type": ("UNetMidBlock2D", ("UNetMidBlock2D",)),
    "norm_num_groups": (32, (32,)),
    "num_class_embeds": (None, (None,)),
    "resnet_time_scale_shift": ("default", ("default",)),
    "time_embedding_dim": (None, (None,)),
    "time_embedding_type": ("positional", ("positional",)),
    "upsample_type": ("conv", ("conv",)),
}
# Those of them that `to_diffusers` writes.
_WRITTEN = """
act_fn attention_head_dim center_input_sample downsample_padding flip_sin_to_cos freq_shift mid_block_scale_factor norm_eps
norm_num_groups time_embedding_type
"""
# The keys that `_unet_config` reads, and one that matters to learned time embeddings only.
_READ_KEYS = """
sample_size in_channels out_channels block_out_channels down_block_types up_block_types layers_per_block dropout
num_train_timesteps
"""
_READ = frozenset(_READ_KEYS.split())
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLDER_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_RESIDUAL = {"temb_proj": "time_emb_proj", "shortcut": "conv_shortcut"}


def from_diffusers(folder: Path) -> tuple[UNetConfig, dict[str, Tensor]]:
    """(configuration, state dict in float32 for UNet(configuration)) from config.json and the weights beside it.

    Reads diffusion_pytorch_model.safetensors, or the older .bin (tensors only: nothing in it is executed), with new or
    old names of the attention layers. Raises InputError if a file is missing or damaged, the network is not the paper's,
    or a tensor is missing, surplus or of another shape.
    """
    config = _read_config(folder)
    path, tensors = _read_weights(folder)
    for new, old in _OLDER_ATTENTION.items():
        for name in [name for name in tensors if f".{old}." in name and ".attentions." in name]:
            tensors[name.replace(f".{old}.", f".{new}.")] = tensors.pop(name)
    state_dict = {}
    for name, diffusers_name, shape in _names(config):
        tensor = tensors.pop(diffusers_name, None)
        if tensor is None:
            raise InputError(
                f"weights {str(path)!r} lack the tensor {diffusers_name!r}: they do not fit the {CONFIG} beside them"
            )
        if tensor.shape != shape:
            raise InputError(
                f"weights {str(path)!r} hold {diffusers_name!r} as {list(tensor.shape)}: the {CONFIG} beside them wants "
                f"{list(shape)}"
            )
        state_dict[name] = tensor.to(torch.float32)
    if tensors:
        raise InputError(
            f"weights {str(path)!r} hold {len(tensors)} tensors that the {CONFIG} beside them has no place for, such as "
            f"{min(tensors)!r}: they belong to another network"
        )
    return config, state_dict


def to_diffusers(folder: Path, config: UNetConfig, state_dict: Mapping[str, Tensor]) -> None:
    """Write config.json and diffusion_pytorch_model.safetensors, which UNet2DModel.from_pretrained(folder) reads.

    The configuration is written last. Raises ValueError if the state dict is not that of UNet(config).
    """
    shapes = {(name, tensor.shape) for name, tensor in state_dict.items()}
    if wrong := sorted(shapes ^ {(name, shape) for name, _, shape in _names(config)}):
        raise ValueError(f"state_dict does not fit {config}: its tensors differ, first in {wrong[0][0]!r}")
    # A fresh copy of each: safetensors refuses tensors that share storage.
    tensors = {
        diffusers_name: state_dict[name].detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, diffusers_name, _ in _names(config)
    }
    with committed_file(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / CONFIG, _diffusers_config(config))


def _diffusers_config(config: UNetConfig) -> dict[str, Any]:
    attention = [config.image_size // 2**level in config.attn_resolutions for level in range(len(config.ch_mult))]
    return {
        **{name: _FIXED[name][1][0] for name in _WRITTEN.split()},
        "_class_name": "UNet2DModel",
        "block_out_channels": [config.ch * factor for factor in config.ch_mult],
        "down_block_types": ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention],
        "dropout": config.dropout,
        "in_channels": config.in_channels,
        "layers_per_block": config.num_res_blocks,
        "out_channels": config.out_channels or config.in_channels,
        "sample_size": config.image_size,
        "up_block_types": ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)],
    }


def _read_config(folder: Path) -> UNetConfig:
    path = folder / CONFIG
    if not path.is_file():
        inner = " (its network is in the folder 'unet')" if (folder / "unet" / CONFIG).is_file() else ""
        raise InputError(
            f"{str(folder)!r} has no {CONFIG}{inner}: give the folder of a diffusers UNet2DModel, with {CONFIG} and "
            f"{WEIGHTS}"
        )
    model = typed.JsonObject
    values = cast(dict[str, Any], typed.read_json(path, model, what="configuration", advice="fetch it again"))
    if values.get("_class_name") != "UNet2DModel":
        raise InputError(
            f"{str(path)!r} is the configuration of {typed.shown(values.get('_class_name'))}: one of 'UNet2DModel' is wanted"
        )
    if unknown := sorted(name for name in values.keys() - _FIXED.keys() - _READ if not name.startswith("_")):
        raise InputError(
            f"{str(path)!r} has {unknown[0][:80]} = {typed.shown(values[unknown[0]])}, which the paper's network does not "
            "have: take one with the layout of google/ddpm-cifar10-32"
        )
    for name, (default, wanted) in _FIXED.items():
        value = values.get(name, default)
        if value not in wanted:
            raise InputError(
                f"{str(path)!r} has {name} = {typed.shown(value)}: the paper's network has {wanted[0]!r}, and another value "
                "makes another function of the same weights"
            )
    try:
        return _unet_config(values)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"{str(path)!r} does not describe a network of the paper's form ({type(error).__name__}: {one_line(error)}): "
            "take one with the layout of google/ddpm-cifar10-32"
        ) from error


def _unet_config(values: Mapping[str, Any]) -> UNetConfig:
    widths, size, channels = values["block_out_channels"], values["sample_size"], values.get("in_channels", 3)
    if isinstance(size, list):
        if len(set(size)) != 1:
            raise ValueError(f"sample_size is {size}: a square is wanted")
        size = size[0]
    ch = widths[0]
    if any(width % ch for width in widths):
        raise ValueError(f"block_out_channels are {widths}: multiples of the first are wanted")
    down = list(values["down_block_types"])
    kinds = {"DownBlock2D": "UpBlock2D", "AttnDownBlock2D": "AttnUpBlock2D"}
    if len(down) != len(widths) or not set(down) <= kinds.keys():
        raise ValueError(f"down_block_types are {down}: one of {', '.join(kinds)} for each width is wanted")
    up = [kinds[kind] for kind in reversed(down)]
    if list(values["up_block_types"]) != up:
        raise ValueError(f"up_block_types are {values['up_block_types']}: the mirror image of the way down, {up}")
    out = values.get("out_channels", 3)
    config = {
        "image_size": size,
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "ch": ch,
        "ch_mult": [width // ch for width in widths],
        "num_res_blocks": values.get("layers_per_block", 2),
        "attn_resolutions": [size // 2**level for level, kind in enumerate(down) if kind == "AttnDownBlock2D"],
        "dropout": values.get("dropout", 0.0),
    }
    return typed.build(UNetConfig, config)


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    path = folder / WEIGHTS
    if not path.is_file():
        path = folder / OLDER_WEIGHTS
    if not path.is_file():
        raise InputError(f"{str(folder)!r} has neither {WEIGHTS} nor {OLDER_WEIGHTS}: give the folder of a UNet2DModel")
    try:
        tensors = load_file(path) if path.name == WEIGHTS else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"weights {str(path)!r} cannot be read as tensors alone ({type(error).__name__}): fetch them again, or take "
            f"{WEIGHTS}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"weights {str(path)!r} are not a dictionary of tensors: give the file of a UNet2DModel")
    return path, dict(tensors)


def _names(config: UNetConfig) -> Iterator[tuple[str, str, torch.Size]]:
    """(our name, diffusers' name, shape) of every tensor."""
    with torch.device("meta"):  # no storage, and no random numbers drawn
        unet = UNet(config)
    prefixes = _prefixes(unet)
    for name, weight in unet.state_dict().items():
        path, tensor = name.rsplit(".", 1)
        if path in prefixes:
            yield name, f"{prefixes[path]}.{tensor}", weight.shape
        else:
            block, layer_name = path.rsplit(".", 1)
            table = _ATTENTION if block.endswith("attn") else _RESIDUAL
            yield name, f"{prefixes[block]}.{table.get(layer_name, layer_name)}.{tensor}", weight.shape


def _prefixes(unet: UNet) -> dict[str, str]:
    """What diffusers calls each block, and each layer that stands outside the blocks: there, blocks are numbered within
    their level, and a level's resampling comes after them."""
    prefixes = {
        "temb.0": "time_embedding.linear_1",
        "temb.2": "time_embedding.linear_2",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
        "mid1.res": "mid_block.resnets.0",
        "mid1.attn": "mid_block.attentions.0",
        "mid2.res": "mid_block.resnets.1",
    }
    for side, sampler in (("down", "downsamplers"), ("up", "upsamplers")):
        level, number = 0, 0
        for index, layer in enumerate(getattr(unet, side)):
            if isinstance(layer, Downsample | Upsample):
                prefixes[f"{side}.{index}.conv"] = f"{side}_blocks.{level}.{sampler}.0.conv"
                level, number = level + 1, 0
            else:
                assert isinstance(layer, Block)
                prefixes[f"{side}.{index}.res"] = f"{side}_blocks.{level}.resnets.{number}"
                prefixes[f"{side}.{index}.attn"] = f"{side}_blocks.{level}.attentions.{number}"
                number += 1
    return prefixes
