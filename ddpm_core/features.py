"""Feature extractors: 8-bit images in, features and logits out, with the facts that a protocol records.

Only the network of 2015-12-05 makes a Frechet distance an FID; the others have names of their own, and a
metric over their features carries that name.
"""

import io
import re
import warnings
from dataclasses import astuple
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ddpm_core.commit import sha256_file
from ddpm_core.dinov2 import DinoFeatures
from ddpm_core.errors import InputError
from ddpm_core.extractors import RGB_OR_GREY, inception_facts, pixels_facts
from ddpm_core.inception.network import load_inception
from ddpm_core.inception.weights import find_inception_weights
from ddpm_core.precision import full_float32


@runtime_checkable
class FeatureExtractor(Protocol):
    """uint8 [N, C, H, W] -> (features float [N, dim], logits float [N, num_logits] or None)."""

    name: str  # in metric names: fd_<name>, such as fd_pixels; "fid" for the network of 2015-12-05
    sha256: str  # of the weights, or of what stands for them
    dim: int
    num_logits: int | None  # None: no logits, so no Inception score
    resize: str  # the resize that is part of the map, in words

    def __call__(self, images: Tensor) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k"] | None]:
        """Features and logits of a batch, on the extractor's device. They may depend on the batch size in the
        last digits of float32 (torch-fidelity#43): keep to one. Raises ValueError unless uint8 [N, C, H, W]."""
        ...

    def to(self, device: torch.device | str) -> "FeatureExtractor":
        """Move the network there; returns itself."""
        ...


class InceptionFeatures:
    """The FID network's pool_3 and unbiased logits; grey images count as RGB with three equal channels.

    Its name is "inception-2015-12-05" only if the weight file has the published sha256; any other file that
    fits the network is named after its own. Raises InputError if the weights cannot be had.
    """

    def __init__(self) -> None:
        path = find_inception_weights()
        self.name, self.sha256, self.dim, self.num_logits, self.resize = astuple(inception_facts(path))
        self._network = load_inception(path)

    def __call__(self, images: Tensor) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k"] | None]:
        _check_images(images)
        return self._network(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)

    def to(self, device: torch.device | str) -> "InceptionFeatures":
        self._network.to(device)
        return self


class PixelFeatures:
    """The image itself, area-averaged to 8x8, values in [0, 1]: a distance without a network, for trials.

    H and W that are multiples of 8 are averaged over equal cells; others over the cells of adaptive pooling.
    """

    def __init__(self, channels: int) -> None:
        self.name, self.sha256, self.dim, self.num_logits, self.resize = astuple(pixels_facts(channels))

    def __call__(self, images: Tensor) -> tuple[Float[Tensor, "n d"], None]:
        _check_images(images)
        return F.adaptive_avg_pool2d(images.float(), 8).flatten(1) / 255, None

    def to(self, device: torch.device | str) -> "PixelFeatures":
        return self


class TorchScriptFeatures:
    """Any TorchScript file that maps uint8 [N, C, H, W] to (features [N, D], logits [N, K]), or to features.

    A TorchScript archive is a program: loading and calling it runs what it contains (on torch's interpreter,
    without Python). It is the one exception to "nothing executes on load", and only for a file that the user
    names. The file is tried once on two images. Raises InputError if it is not TorchScript, does not take such
    images or returns something else.
    """

    resize = "none"

    def __init__(self, path: Path, image_shape: tuple[int, int, int]) -> None:
        what = f"the feature extractor {str(path)!r}"
        if not path.is_file():
            raise InputError(f"{what} is not a file: give the path of a TorchScript file")
        self.sha256 = sha256_file(path)
        self.name = re.sub(r"[^a-z0-9_]", "_", path.name.split(".")[0].lower())
        self._archive = path.read_bytes()
        try:
            self._network = _load_torchscript(self._archive, "cpu")
        except Exception as error:  # torch's reader raises whatever the bytes lead it to
            raise InputError(
                f"{what} cannot be read as TorchScript ({type(error).__name__}): save one with torch.jit.save"
            ) from error
        self.dim, self.num_logits = self._try(what, image_shape)

    def _try(self, what: str, image_shape: tuple[int, int, int]) -> tuple[int, int | None]:
        """(dim, num_logits) of what the program returns for two black images. Raises InputError if that is no features."""
        probe = torch.zeros(2, *image_shape, dtype=torch.uint8)
        try:
            features, logits = self._run(probe)
        except Exception as error:  # the program is the user's: anything can come out of it
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise InputError(
                f"{what} does not take uint8 images {list(probe.shape)} ({reason[0]}): it must map "
                "uint8 [N, C, H, W] to features [N, D], or to features and logits [N, K]"
            ) from error
        if not _is_matrix(features, 2) or not (logits is None or _is_matrix(logits, 2)):
            raise InputError(
                f"{what} returned {_describe(features)} and {_describe(logits)} for 2 images: it must return "
                "floating-point features [N, D], or a tuple of features [N, D] and logits [N, K], all finite"
            )
        return features.shape[1], None if logits is None else logits.shape[1]

    def __call__(self, images: Tensor) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k"] | None]:
        _check_images(images)
        return self._run(images)

    def _run(self, images: Tensor) -> tuple[Any, Any]:
        with torch.no_grad(), full_float32(images.device):
            output = self._network(images)
        return output if isinstance(output, tuple) and len(output) == 2 else (output, None)

    def to(self, device: torch.device | str) -> "TorchScriptFeatures":
        # Loaded again: a frozen archive holds its weights as constants, which Module.to does not move.
        self._network = _load_torchscript(self._archive, device)
        return self


def load_extractor(spec: str, image_shape: tuple[int, int, int]) -> FeatureExtractor:
    """The extractor named by `spec`: "inception", "dinov2", "pixels" or the path of a TorchScript file (*.pt).

    `image_shape` is (C, H, W) of the images to come. Raises InputError if the name is unknown or the extractor
    cannot be had or does not take such images.
    """
    channels = image_shape[0]
    if spec in ("inception", "dinov2"):
        if channels not in RGB_OR_GREY:
            raise InputError(
                f"the extractor {spec!r} takes images of 1 or 3 channels, and these have {channels}: "
                "choose 'pixels' or the path of a TorchScript file (*.pt)"
            )
        return InceptionFeatures() if spec == "inception" else DinoFeatures()
    if spec == "pixels":
        return PixelFeatures(channels)
    if spec.endswith(".pt"):
        return TorchScriptFeatures(Path(spec), image_shape)
    raise InputError(
        f"unknown feature extractor {spec!r}: choose 'inception', 'dinov2', 'pixels' or the path of a TorchScript file (*.pt)"
    )


def _load_torchscript(archive: bytes, device: torch.device | str) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        # torch 2.13 deprecates TorchScript in favour of torch.export, whose programs are bound to a device.
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(io.BytesIO(archive), map_location=device).eval()


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 [N, C, H, W] in 0..255; they are {images.dtype} {list(images.shape)}")


def _is_matrix(value: object, rows: int) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.ndim == 2
        and value.shape[0] == rows
        and value.shape[1] > 0
        and bool(torch.isfinite(value).all())
    )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {', '.join(map(_describe, value)) or 'nothing'}"
    return type(value).__name__
