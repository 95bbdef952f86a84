"""Images to files of the coded format and back, with a checkpoint as the model (ddpm_core.codec.codec)."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.codec import DEFAULT_STEPS, Codec
from ddpm_core.codec.format import model_digest
from ddpm_core.commit import committed_file
from ddpm_core.errors import InputError
from ddpm_core.images import encode_png
from ddpm_core.unet import UNet
from pipelines.checkpoints.select import find_checkpoints
from pipelines.preprocess.sources.image_files import is_image_name
from pipelines.runtime.locations import absolute
from pipelines.runtime.progress import Progress, Say
from pipelines.tracking.tracker import default_uri

SUFFIX = ".x0"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which checkpoint codes, and how many images at once."""

    run: str
    """A training run, by its name, its MLflow run id or its folder; or the folder of one checkpoint."""
    checkpoint: str = "latest"
    """Which of the run's: latest, or a step."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged weights, or the last ones."""
    batch_size: int = 16
    """Images the network sees at once; files do not depend on it."""
    storage: str = "runs"
    """The folder in which runs are looked for."""
    tracking_uri: str | None = None
    """MLflow's; by default MLFLOW_TRACKING_URI, or an SQLite file in the storage folder."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"--batch-size is {self.batch_size}: give a positive number")

    def load(self) -> tuple[Codec, Checkpoint, UNet]:
        """The checkpoint as a codec, and its network, in float64. InputError where it is not one checkpoint."""
        storage = absolute(self.storage, option="--storage")
        uri = self.tracking_uri or default_uri(storage)
        name, found = find_checkpoints(self.run, self.checkpoint, storage, uri)
        if len(found) != 1:
            raise InputError(
                f"--checkpoint {self.checkpoint} of run {name!r} is {len(found)} checkpoints: give one step"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        checkpoint, config = found[0], found[0].unet_config()
        network = UNet(config)
        network.load_state_dict(checkpoint.weights(self.weights))
        network.to(device, torch.float64).eval()
        process = checkpoint.diffusion_config()
        facts = [json.dumps(asdict(each), sort_keys=True) for each in (config, process)]
        digest = model_digest(checkpoint.weights_sha256(self.weights), *facts)
        shape = (config.in_channels, config.image_size, config.image_size)
        return Codec(process.build().to(device), network, shape, digest), checkpoint, network


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(ModelConfig):
    """Images to coded files."""

    images: tuple[str, ...]
    """Image files of the network's size, grey or RGB, or folders of them."""
    output: str
    """The folder for the coded files, which are called as the images are, with the ending .x0."""
    steps: int = DEFAULT_STEPS
    """How many of the model's timesteps to visit: more make smaller files up to a point, each is a network pass."""
    seed: int = 0
    """Of the shared noise; it is written into the file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"--seed is {self.seed}: give a number from 0 to 2^32 - 1")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(ModelConfig):
    """Coded files to images."""

    files: tuple[str, ...]
    """Coded files, or folders of them."""
    output: str
    """The folder for the images, PNG."""
    partial: bool = False
    """Decode files that were cut to the image that was predicted there; otherwise they are refused."""
    frames: bool = False
    """Write besides how each image sharpened: NAME-BYTES.png, what the first so many bytes are worth."""


@dataclass(frozen=True)
class Coding:
    """What a call did."""

    files: tuple[Path, ...]
    coded_bytes: int
    values: int  # pixels times channels
    seconds: float

    def describe(self) -> str:
        rate = 8 * self.coded_bytes / self.values
        return (
            f"{len(self.files):,} images, {self.coded_bytes:,} bytes, {rate:.3f} bits/dim, "
            f"{len(self.files) / self.seconds:.3g} images/s"
        )


def encode_files(config: EncodeConfig, say: Say = lambda line: None) -> Coding:
    """Code every image. InputError, before the first is coded, for one that is not of the network's size and mode."""
    codec, checkpoint, _ = config.load()
    paths = _named(config.images, "--images", "images", is_image_name)
    pixels = [_read(path, checkpoint) for path in paths]
    output, started, size = absolute(config.output, option="--output"), time.monotonic(), 0
    targets = [output / f"{path.stem}{SUFFIX}" for path in paths]
    progress = Progress("encode", len(paths), "images", say)
    for start in range(0, len(paths), config.batch_size):
        part = slice(start, start + config.batch_size)
        for target, coded in zip(
            targets[part], codec.encode(torch.stack(pixels[part]), steps=config.steps, seed=config.seed), strict=True
        ):
            _write(target, coded.data)
            size += len(coded.data)
        progress.at(min(part.stop, len(paths)))
    return Coding(tuple(targets), size, sum(each.numel() for each in pixels), time.monotonic() - started)


def decode_files(config: DecodeConfig, say: Say = lambda line: None) -> Coding:
    """Decode every file. InputError for one that is not whole, not undamaged or not of this model."""
    codec, _, _ = config.load()
    paths = _named(config.files, "--files", "coded files", lambda name: name.endswith(SUFFIX))
    output, started, size, values = absolute(config.output, option="--output"), time.monotonic(), 0, 0
    targets = [output / f"{path.stem}.png" for path in paths]
    progress = Progress("decode", len(paths), "images", say)
    for start in range(0, len(paths), config.batch_size):
        part = slice(start, start + config.batch_size)
        files, names = [path.read_bytes() for path in paths[part]], [f"file {str(path)!r}" for path in paths[part]]
        for target, data, image in zip(
            targets[part], files, codec.decode(files, names, whole=not config.partial), strict=True
        ):
            _write(target, encode_png(image.pixels))
            for frame in image.frames if config.frames else ():
                _write(target.with_name(f"{target.stem}-{frame.nbytes}.png"), encode_png(frame.pixels))
            size, values = size + len(data), values + image.pixels.numel()
        progress.at(min(part.stop, len(paths)))
    return Coding(tuple(targets), size, values, time.monotonic() - started)


def _named(given: Sequence[str], option: str, what: str, belongs: Callable[[str], bool]) -> list[Path]:
    """Files as they are given, and those of folders that belong. InputError for none, a missing one, and two of a name."""
    paths = list(_expanded(given, option, belongs))
    if not paths:
        raise InputError(f"{option} {' '.join(given)!r} holds no {what}: give some, or folders of them")
    seen: dict[str, Path] = {}
    for path in paths:
        if path.stem in seen:
            raise InputError(
                f"{str(seen[path.stem])!r} and {str(path)!r} would both be written as {path.stem!r}: give one of them"
            )
        seen[path.stem] = path
    return paths


def _expanded(given: Sequence[str], option: str, belongs: Callable[[str], bool]) -> Iterator[Path]:
    for name in given:
        path = absolute(name, option=option)
        if path.is_dir():
            yield from sorted(each for each in path.iterdir() if belongs(each.name) and each.is_file())
        elif path.is_file():
            yield path
        else:
            raise InputError(f"{option} {name!r} does not exist: give a file or a folder")


def _read(path: Path, checkpoint: Checkpoint) -> Tensor:
    """uint8 [H,W,C]. InputError where it would not come back the same."""
    network = checkpoint.unet_config()
    size, mode = network.image_size, {1: "L", 3: "RGB"}.get(network.in_channels)
    try:
        with Image.open(path) as image:
            found, its_mode = image.size, image.mode
            pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"image {str(path)!r} cannot be read ({error}): give an image file") from error
    if found != (size, size) or its_mode != mode:
        raise InputError(
            f"image {str(path)!r} is {found[0]}x{found[1]} of mode {its_mode}, but this network codes {size}x{size} of mode "
            f"{mode}: convert it, or take another network"
        )
    return torch.from_numpy(pixels.copy()).reshape(size, size, -1)


def _write(path: Path, content: bytes) -> None:
    with committed_file(path) as temporary:
        temporary.write_bytes(content)
