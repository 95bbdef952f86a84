"""DINOv2 ViT-L/14 (Oquab et al. 2023), whose class token FD-DINOv2 is measured on (Stein et al. 2023), and where its weights are.

The file is that of facebook/dinov2-large, known by its sha256. Images go through what the code of Stein et al., dgm-eval, does
by default: Pillow's bicubic resize of 8-bit RGB to 224x224, whatever their shape, then ImageNet's mean and deviation.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_core.commit import sha256_file
from ddpm_core.errors import InputError, one_line
from ddpm_core.precision import full_float32

WEIGHTS_SHA256 = "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23"
WEIGHTS_VARIABLE = "DDPM_DINOV2_WEIGHTS"
WEIGHTS_URL = "https://huggingface.co/facebook/dinov2-large/resolve/main/model.safetensors"
CACHED = "models--facebook--dinov2-large/snapshots/*/model.safetensors"  # in the hub's cache
PATCH, INPUT_SIZE = 14, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]


@dataclass(frozen=True)
class Size:
    """width: of a token, 64 for each head. grid: patches a side of the images it was trained on, 518 / 14."""

    width: int = 1024
    depth: int = 24
    grid: int = 37


VITL14 = Size()


class DinoV2(nn.Module):
    """float32 [N, 3, 224, 224], normalised -> the class token after the last norm, float32 [N, width]. Never trains."""

    def __init__(self, size: Size = VITL14) -> None:
        super().__init__()
        width = size.width
        self.patches = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + size.grid**2, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(size.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.requires_grad_(False)

    def forward(self, x: Float32[Tensor, "n 3 224 224"]) -> Float32[Tensor, "n d"]:
        patches = self.patches(x).flatten(2).transpose(1, 2)  # [N, 256, width]
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), patches], 1) + self._positions()
        for block in self.blocks:
            tokens = block(tokens)
        features: Tensor = self.norm(tokens[:, 0])
        return features

    def _positions(self) -> Float32[Tensor, "1 tokens d"]:
        """Those of the patches of 224 pixels, interpolated as in the authors' code: its scale is (16 + 0.1) / grid, a guard
        against rounding that moves the points it reads at, and with them the features."""
        grid, side = round((self.positions.shape[1] - 1) ** 0.5), INPUT_SIZE // PATCH
        if grid == side:
            return self.positions
        square = self.positions[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        resized = F.interpolate(square, scale_factor=(side + 0.1) / grid, mode="bicubic")
        return torch.cat([self.positions[:, :1], resized.flatten(2).transpose(1, 2)], 1)


class _Block(nn.Module):
    """x + scale1 attention(norm1 x), then the same with an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.scale1, self.scale2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(2, (self.heads, 64)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + self.scale1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return y


# What the file calls what is called here; in it, a block is encoder.layer.N.
_NAMES = {
    r"embeddings\.patch_embeddings\.projection": "patches",
    r"embeddings\.cls_token": "class_token",
    r"embeddings\.position_embeddings": "positions",
    r"encoder\.layer\.(\d+)": r"blocks.\1",
    r"attention\.attention\.(query|key|value)": r"\1",
    r"attention\.output\.dense": "out",
    r"layer_scale([12])\.lambda1": r"scale\1",
    r"mlp\.(fc[12])": r"\1",
    r"^layernorm": "norm",
}
_UNUSED = "embeddings.mask_token"  # of the training


def own_name(name: str) -> str:
    """A weight of the file, as this network calls it.

    >>> own_name("encoder.layer.7.attention.output.dense.bias")
    'blocks.7.out.bias'
    """
    for pattern, own in _NAMES.items():
        name = re.sub(pattern, own, name)
    return name


def find_dinov2_weights() -> Path:
    """The weight file: what DDPM_DINOV2_WEIGHTS names, else the hub's cached one. Raises InputError if there is none, or it is
    not the published one."""
    named = os.environ.get(WEIGHTS_VARIABLE)
    path = Path(named) if named else next(iter(sorted(hub_cache().glob(CACHED))), None)
    if path is None or not path.is_file():
        place = f"a file {named!r}" if named else f"in the cache {str(hub_cache())!r}"
        raise InputError(
            f"the DINOv2 weights are not {place}: fetch {WEIGHTS_URL} (1.2 GB) and name the file with {WEIGHTS_VARIABLE}"
        )
    digest = sha256_file(path)
    if digest != WEIGHTS_SHA256:
        raise InputError(
            f"the DINOv2 weights {str(path)!r} have a sha256 that begins {digest[:8]}, not {WEIGHTS_SHA256[:8]}: fetch "
            f"{WEIGHTS_URL} again, for FD-DINOv2 is measured with these alone"
        )
    return path


def hub_cache() -> Path:
    """Where Hugging Face's libraries keep files."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()


def load_dinov2(path: Path, size: Size = VITL14) -> DinoV2:
    """The network with the weights of a safetensors file. Raises InputError if the file is damaged or of something else."""
    what = f"the DINOv2 weights {str(path)!r}"
    try:
        weights = {own_name(name): tensor for name, tensor in load_file(path).items() if name != _UNUSED}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{what} cannot be read as safetensors ({one_line(error)}): fetch {WEIGHTS_URL}") from error
    with torch.device("meta"):  # no storage, and nothing drawn from the global generator
        network = DinoV2(size)
    wanted = network.state_dict()
    given = {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
    differing = sorted(name for name in {*wanted, *given} if given.get(name) != shape_of(wanted.get(name)))
    if differing:
        raise InputError(
            f"{what} are not those of ViT-L/14 in the layout of facebook/dinov2-large: {len(differing)} of its entries are "
            f"missing, do not belong or are of another shape or type (first: {differing[0]!r}); fetch {WEIGHTS_URL}"
        )
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False).eval()


def shape_of(tensor: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def prepared(images: Tensor) -> Float32[Tensor, "n 3 224 224"]:
    """uint8 [N, 3, H, W] as the network takes it, on the same device: resized by Pillow on the CPU, which rounds to 8 bits and
    averages if images get smaller."""
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    resized = np.stack(
        [
            np.asarray(Image.fromarray(each).resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC))
            for each in pixels
        ]
    )
    x = torch.from_numpy(resized).to(images.device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(each, device=x.device).view(3, 1, 1) for each in (MEAN, STD))
    return (x - mean) / std


class DinoFeatures:
    """The class token of DINOv2 ViT-L/14; grey images count as RGB with three equal channels. There are no classes, so no
    Inception score. Raises InputError if the weights cannot be had, or are others than the published ones."""

    name = "dinov2-vitl14"  # with a dash, which no file's name gives
    resize = "pil-bicubic-224"
    num_logits: int | None = None

    def __init__(self) -> None:
        path = find_dinov2_weights()
        self.sha256 = WEIGHTS_SHA256
        self.dim = VITL14.width
        self._network = load_dinov2(path, VITL14)

    def __call__(self, images: Tensor) -> tuple[Float32[Tensor, "n d"], None]:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images must be uint8 [N, 1 or 3, H, W] in 0..255; they are {images.dtype} {list(images.shape)}"
            )
        x = prepared(images.expand(-1, 3, -1, -1))
        with torch.no_grad(), full_float32(images.device):
            return self._network(x), None

    def to(self, device: torch.device | str) -> "DinoFeatures":
        self._network.to(device)
        return self
