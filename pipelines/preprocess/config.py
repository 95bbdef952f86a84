"""The options of preprocessing."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ddpm_core.errors import InputError
from ddpm_core.ranges import LARGEST, FilePath, Name, Positive, Range, Seed, up_to
from pipelines.preprocess.transform import MAX_PIXELS, Filter
from pipelines.runtime.options import Checked
from pipelines.shards.format import PixelStorage


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(Checked):
    """Which images to read, what to do with them, and where to write them."""

    source: FilePath
    """LMDB folder or zip as LSUN publishes it, CIFAR-10 archive, CelebA-HQ TFRecords, Parquet with an image column, or a
    folder, zip or tar of images; a local path, or a URL such as s3://bucket/images.zip."""
    output: FilePath
    """The folder of shards to write; a local path or a URL."""
    image_size: Annotated[int, up_to(4096)]
    """Height and width after the centre crop and the resize."""
    channels: Literal[1, 3] = 3
    """3 for RGB, 1 for grey."""
    filter: Filter = "lanczos"
    """The filter of the resize; StyleGAN's LSUN recipe has Lanczos."""
    split: Name | None = None
    """The part of a source that has parts, such as CIFAR-10's test; train by default."""
    images: Annotated[int, up_to(LARGEST)] | None = None
    """So many of the source's images: the first by key, as StyleGAN2 takes its 50,000 of an LSUN database for the FID; all by
    default."""
    images_seed: Seed | None = None
    """With --images: images drawn at random with this seed, instead of the first."""
    name: Name | None = None
    """What the data set is called; the source's name by default."""
    storage: PixelStorage = "uint8"
    """How pixels are stored: a byte each, or the scaled float32 values themselves, for other tools."""
    images_per_shard: Positive[int] = 1024
    """How many of the source's images a file takes."""
    undecodable: Literal["skip", "fail"] = "skip"
    """What to do with an image that does not decode: leave it out and list it in the manifest, or stop."""
    max_pixels: Annotated[int, Range("a number of pixels from 1 to 4,294,967,295", low=1.0, high=2.0**32 - 1)] = (
        MAX_PIXELS
    )
    """An image of more pixels than this counts as undecodable: a small file can hold an image that fills the memory."""
    too_small: Literal["skip", "fail", "enlarge"] = "skip"
    """What to do with an image whose shorter side is below the image size."""
    duplicates: Literal["keep", "skip", "fail"] = "keep"
    """What to do with an image whose pixels, after the resize, equal those of an earlier one; by default data sets are
    kept as published."""
    max_skipped: Annotated[float, Range("a share from 0 to 1", low=0.0, high=1.0)] = 0.01
    """Stop when more than this share of the images is undecodable or too small."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is None and self.images_seed is not None:
            raise InputError("--images-seed chooses among the images: give their number with --images, or leave it out")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        return (self.image_size, self.image_size, self.channels)
