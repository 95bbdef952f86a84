"""The options of coding, decoding and measuring."""

from dataclasses import dataclass
from typing import Annotated

from ddpm_core.configs import CODEC_STEPS, Weights
from ddpm_core.ranges import FilePath, Name, Positive, Range, Seed
from pipelines.runtime.options import StorageOptions


@dataclass(frozen=True, kw_only=True)
class ModelConfig(StorageOptions):
    """Which checkpoint codes, and how many images at once."""

    run: FilePath
    """A training run, by its name, its MLflow run id or its folder; or the folder of one checkpoint."""
    checkpoint: Name = "latest"
    """Which of the run's checkpoints: latest, or a step."""
    weights: Weights = "ema"
    """Averaged weights, or the last ones."""
    batch_size: Positive[int] = 16
    """Images the network sees at once; files do not depend on it."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(ModelConfig):
    """Images to coded files."""

    images: tuple[FilePath, ...]
    """Image files of the network's size, grey or RGB, or folders of them."""
    output: FilePath
    """The folder for the coded files, named after the images with the suffix .x0."""
    steps: Positive[int] = CODEC_STEPS
    """How many of the model's timesteps to visit: more make smaller files up to a point, each is a network pass."""
    seed: Annotated[int, Range("a number from 0 to 2^32 - 1", low=0.0, high=2.0**32 - 1)] = 0
    """Decides the shared noise; it is written into the file."""


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(ModelConfig):
    """Coded files to images."""

    files: tuple[FilePath, ...]
    """Coded files, or folders of them."""
    output: FilePath
    """The folder for the images, PNG."""
    partial: bool = False
    """Decode files that were cut, to the image predicted where they end; otherwise they are refused."""
    frames: bool = False
    """Also write how each image sharpened: NAME-BYTES.png, the image that the first BYTES bytes give."""


@dataclass(frozen=True, kw_only=True)
class CurveConfig(ModelConfig):
    """Files of a data set's images, their rate and distortion, and what others do with the same images."""

    data: FilePath
    """The shards whose images are coded: the first of a permutation that the seed decides."""
    output: FilePath
    """The folder for curve.json and curve.svg."""
    images: Positive[int] = 16
    """How many images."""
    steps: Positive[int] = CODEC_STEPS
    """How many of the model's timesteps the files visit."""
    theory_steps: Positive[int] | None = None
    """Timesteps of the theory's chain: all by default, as in the paper; fewer are quicker and give a looser bound."""
    seed: Seed = 0
    """Decides the choice of images, the shared noise and the theory's noise."""
