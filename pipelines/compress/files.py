"""Images to files of the coded format and back, with a checkpoint as the model (ddpm_core.codec.codec)."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.commit import committed_file
from ddpm_core.errors import InputError
from ddpm_core.images import encode_png
from pipelines.compress.config import DecodeConfig, EncodeConfig
from pipelines.compress.model import load_model
from pipelines.runtime.locations import absolute
from pipelines.runtime.progress import Progress, Say

SUFFIX = ".x0"


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
    _, checkpoint, codec, _ = load_model(config)
    paths = _named(config.images, "--images", "images", _is_image_name)
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
    codec = load_model(config).codec
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


def _is_image_name(name: str) -> bool:
    """Whether a file's name ends as those of a format that Pillow reads."""
    return Path(name).suffix.lower() in Image.registered_extensions()


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
