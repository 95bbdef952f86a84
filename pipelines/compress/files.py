"""Images to files of the coded format and back, with a checkpoint as the model (ddpm_core.codec)."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.errors import InputError, one_line
from ddpm_core.png import encode_png
from pipelines.compress.config import DecodeConfig, EncodeConfig
from pipelines.compress.model import load_model
from pipelines.runtime.progress import Progress, Say
from pipelines.runtime.recipe import keep_recipe
from pipelines.storage.lease import sole_writer
from pipelines.storage.locations import Location, commit_bytes, entries, location

SUFFIX = ".x0"


@dataclass(frozen=True)
class CodingResult:
    """What a call wrote. coded_bytes: of the coded files. values: pixels times channels of the images."""

    files: tuple[Location, ...]
    coded_bytes: int
    values: int
    seconds: float

    def describe(self) -> str:
        rate = 8 * self.coded_bytes / self.values
        return (
            f"{len(self.files):,} images, {self.coded_bytes:,} bytes, {rate:.3f} bits/dim, "
            f"{len(self.files) / self.seconds:.3g} images/s"
        )


def encode_files(config: EncodeConfig, say: Say = lambda line: None) -> CodingResult:
    """Code every image. Raises InputError, before the first is coded, for one that is not of the network's size and mode."""
    model = load_model(config)
    suffixes = Image.registered_extensions()
    paths = find_files(config.images, "--images", "images", lambda name: Path(name).suffix.lower() in suffixes)
    pixels = [_read_pixels(path, model.checkpoint) for path in paths]  # all before the first is coded
    output, started, size = location(config.output, option="--output"), time.monotonic(), 0
    targets = [output / f"{path.stem}{SUFFIX}" for path in paths]
    progress = Progress("encode", len(paths), "images", say)
    with sole_writer(output, "output", say):
        for start in range(0, len(paths), config.batch_size):
            batch = slice(start, start + config.batch_size)
            coded = model.codec.encode(torch.stack(pixels[batch]), steps=config.steps, seed=config.seed)
            for target, file in zip(targets[batch], coded, strict=True):
                commit_bytes(target, file.data)
                size += len(file.data)
            progress.advance(len(coded))
        images = tuple(str(location(name, option="--images")) for name in config.images)
        keep_recipe(output, replace(config, images=images, output=str(output), storage=model.storage))
    return CodingResult(tuple(targets), size, sum(image.numel() for image in pixels), time.monotonic() - started)


def decode_files(config: DecodeConfig, say: Say = lambda line: None) -> CodingResult:
    """Decode every file to a PNG. Raises InputError for one that is cut, damaged or of another model."""
    model = load_model(config)
    paths = find_files(config.files, "--files", "coded files", lambda name: name.endswith(SUFFIX))
    output, started, size, values = location(config.output, option="--output"), time.monotonic(), 0, 0
    targets = [output / f"{path.stem}.png" for path in paths]
    progress = Progress("decode", len(paths), "images", say)
    with sole_writer(output, "output", say):
        for start in range(0, len(paths), config.batch_size):
            batch = slice(start, start + config.batch_size)
            files = [path.read_bytes() for path in paths[batch]]
            names = [f"file {str(path)!r}" for path in paths[batch]]  # what errors call them
            decoded = model.codec.decode(files, names, whole=not config.partial)
            for target, data, image in zip(targets[batch], files, decoded, strict=True):
                commit_bytes(target, encode_png(image.pixels.cpu().numpy()))
                for frame in image.frames if config.frames else ():
                    commit_bytes(
                        target.with_name(f"{target.stem}-{frame.nbytes}.png"), encode_png(frame.pixels.cpu().numpy())
                    )
                size, values = size + len(data), values + image.pixels.numel()
            progress.advance(len(decoded))
        given = tuple(str(location(name, option="--files")) for name in config.files)
        keep_recipe(output, replace(config, files=given, output=str(output), storage=model.storage))
    return CodingResult(tuple(targets), size, values, time.monotonic() - started)


def find_files(given: Sequence[str], option: str, what: str, is_wanted: Callable[[str], bool]) -> list[Location]:
    """The files that are given, and those in given folders whose names are wanted.

    Raises InputError if there are none, one is missing, or two have the same name without its suffix.
    """
    paths = list(_expand_folders(given, option, is_wanted))
    if not paths:
        raise InputError(f"{option} {' '.join(given)!r} holds no {what}: give some, or folders of them")
    by_stem: dict[str, Location] = {}
    for path in paths:
        other = by_stem.setdefault(path.stem, path)
        if other is not path:
            raise InputError(
                f"{str(other)!r} and {str(path)!r} would both be written as {path.stem!r}: give one of them"
            )
    return paths


def _expand_folders(given: Sequence[str], option: str, is_wanted: Callable[[str], bool]) -> Iterator[Location]:
    for name in given:
        path = location(name, option=option)
        if path.is_dir():
            yield from (child for child in entries(path) if is_wanted(child.name) and child.is_file())
        elif path.is_file():
            yield path
        else:
            raise InputError(f"{option} {name!r} does not exist: give a file or a folder")


def _read_pixels(path: Location, checkpoint: Checkpoint) -> Tensor:
    """An image file as uint8 [H,W,C]. Raises InputError if the decoded image would not be the same."""
    network = checkpoint.unet_config()
    side, network_mode = network.image_size, {1: "L", 3: "RGB"}.get(network.in_channels)
    try:
        with path.open("rb") as file, Image.open(file) as image:
            (width, height), mode = image.size, image.mode
            fits = (width, height) == (side, side) and mode == network_mode
            pixels = np.asarray(image) if fits else None  # a small file can hold an image that fills the memory
    except Exception as error:  # Pillow's decoders raise many kinds
        raise InputError(f"image {str(path)!r} cannot be read ({one_line(error)}): give an image file") from error
    if pixels is None:
        raise InputError(
            f"image {str(path)!r} is {width}x{height} of mode {mode}, but this network codes {side}x{side} of mode "
            f"{network_mode}: convert it, or take another network"
        )
    return torch.from_numpy(pixels.copy()).reshape(side, side, -1)
