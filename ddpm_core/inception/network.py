"""The FID network: Inception-v3 with the weights of 2015-12-05, as TTUR and every paper's FID use it.

It differs from torchvision's inception_v3 in its weights, its 1008 classes, its input (TensorFlow 1's resize,
then (x - 128) / 128), average pools that leave the padding out of the mean, and a max pool in the last block.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from ddpm_core.errors import InputError
from ddpm_core.inception.blocks import BlockA, BlockB, BlockC, BlockD, BlockE, ConvNormReLU, halve
from ddpm_core.inception.weights import CLASSES, FEATURES, WEIGHTS_NAME, find_inception_weights
from ddpm_core.precision import full_float32

INPUT_SIZE = 299


def tf1_resize_bilinear(x: Float[Tensor, "n c h w"], size: tuple[int, int]) -> Float32[Tensor, "n c new_h new_w"]:
    """TensorFlow 1's ResizeBilinear with align_corners=False, float32 throughout, in its order of operations.

    Output pixel i reads the input at i * (in / out), without the half-pixel shift of every later resize, and
    without antialiasing: it is what the published FIDs went through. Size is (height, width).
    """
    x = x.float()
    left, right, fraction = _taps(x.shape[3], size[1], x.device)
    x_left = x[..., left]
    x = x_left + (x[..., right] - x_left) * fraction
    top, bottom, fraction = _taps(x.shape[2], size[0], x.device)
    x_top = x[..., top, :]
    return x_top + (x[..., bottom, :] - x_top) * fraction[:, None]


def _taps(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(left neighbour, right neighbour, fraction of the way between) in the input of each pixel of the output."""
    position = torch.arange(new, device=device, dtype=torch.float32) * (
        torch.tensor(old, dtype=torch.float32) / torch.tensor(new, dtype=torch.float32)
    ).to(device)
    low = position.floor()
    return low.long(), (low.long() + 1).clamp(max=old - 1), position - low


class InceptionV3(nn.Module):
    """uint8 [N, 3, H, W] -> (features float32 [N, 2048], logits without the bias float32 [N, 1008]).

    The features are `pool_3`, of which FID takes mean and covariance. The Inception score takes the softmax
    of the logits *without* the bias, as TTUR's graph does: the bias is in the weight file alone. It never
    trains: it stays in eval mode and its parameters do not require gradients. Until `load_state_dict` its
    weights are random, from a fixed seed. Images that are not uint8 [N, 3, H, W] get a ValueError.
    """

    def __init__(self) -> None:
        super().__init__()
        # Built without storage: torch's own initialisation would draw from the global generator.
        with torch.device("meta"):
            self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, 3, stride=2)
            self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, 3)
            self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, 3, padding=1)
            self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, 1)
            self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, 3)
            self.Mixed_5b = BlockA(192, pool=32)
            self.Mixed_5c = BlockA(256, pool=64)
            self.Mixed_5d = BlockA(288, pool=64)
            self.Mixed_6a = BlockB(288)
            self.Mixed_6b = BlockC(768, width=128)
            self.Mixed_6c = BlockC(768, width=160)
            self.Mixed_6d = BlockC(768, width=160)
            self.Mixed_6e = BlockC(768, width=192)
            self.Mixed_7a = BlockD(768)
            self.Mixed_7b = BlockE(1280, max_pool=False)
            self.Mixed_7c = BlockE(2048, max_pool=True)
            self.fc = nn.Linear(FEATURES, CLASSES)
        self.to_empty(device="cpu")
        self._initialise(torch.Generator().manual_seed(0))
        self.requires_grad_(False)
        self.eval()

    def _initialise(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        nn.init.normal_(self.fc.weight, std=FEATURES**-0.5, generator=generator)
        nn.init.zeros_(self.fc.bias)

    def train(self, mode: bool = True) -> "InceptionV3":
        """Stays in eval mode whatever is asked, also as a part of a module that trains."""
        super().train(False)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the weights of pytorch-fid's or torch-fidelity's file, unchanged; always strictly.

        Every name and shape must match, except that BatchNorm's `num_batches_tracked`, which plays no part in
        eval mode, may be missing. Raises InputError with one sentence otherwise.
        """
        own = self.state_dict()
        wanted = {name: value for name, value in own.items() if not name.endswith(".num_batches_tracked")}
        given = {name: value for name, value in state_dict.items() if not name.endswith(".num_batches_tracked")}
        faults = {
            "are missing": [name for name in wanted if name not in given],
            "do not belong": [name for name in given if name not in wanted],
            "have another shape": [
                name
                for name, value in wanted.items()
                if name in given and (not isinstance(given[name], Tensor) or given[name].shape != value.shape)
            ],
        }
        problems = [
            f"{len(names)} of its entries {what} (first: {names[0]!r})" for what, names in faults.items() if names
        ]
        if problems:
            raise InputError(
                f"these weights are not the FID Inception-v3 of 2015-12-05: {', '.join(problems)}; wanted is "
                f"the file {WEIGHTS_NAME!r} of pytorch-fid (torchvision's inception_v3 weights will not do)"
            )
        return super().load_state_dict({**own, **given}, strict=True, assign=assign)

    def forward(self, images: Tensor) -> tuple[Float32[Tensor, "n 2048"], Float32[Tensor, "n 1008"]]:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images must be uint8 [N, 3, H, W] in 0..255; they are {images.dtype} {list(images.shape)}"
            )
        with torch.no_grad(), full_float32(images.device):
            x = tf1_resize_bilinear(images.float(), (INPUT_SIZE, INPUT_SIZE))
            features = self._features((x - 128) / 128)
            return features, self.logits_unbiased(features)

    def _features(self, x: Tensor) -> Tensor:
        # float32 [N, 3, 299, 299] in [-1, 1) -> [N, 2048]
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = halve(x)  # [N, 64, 73, 73]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = halve(x)  # [N, 192, 35, 35]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # [N, 288, 35, 35]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # [N, 768, 17, 17]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [N, 2048, 8, 8]
        return x.mean((2, 3))

    def logits_unbiased(self, features: Float32[Tensor, "n 2048"]) -> Float32[Tensor, "n 1008"]:
        """The logits of the Inception score: the last layer without its bias."""
        return features @ self.fc.weight.T


def load_inception(path: Path | None = None) -> InceptionV3:
    """The FID network with its weights, found as `find_inception_weights` says. Nothing in the file executes.

    Raises InputError if the weights cannot be had or the file holds something else.
    """
    file = find_inception_weights(path)
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises whatever the bytes lead it to: KeyError, EOFError, ...
        raise InputError(
            f"the Inception weights {str(file)!r} cannot be read as a PyTorch weight file "
            f"({type(error).__name__}): give {WEIGHTS_NAME!r} of pytorch-fid"
        ) from error
    if not isinstance(weights, Mapping):
        raise InputError(
            f"the Inception weights {str(file)!r} hold a {type(weights).__name__}, not a state dict: "
            f"give {WEIGHTS_NAME!r} of pytorch-fid"
        )
    model = InceptionV3()
    model.load_state_dict(weights)
    return model
