"""Raw data in: which kind of source lies at a path, recognised by its content."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_core.commit import MANIFEST
from ddpm_core.errors import InputError
from pipelines.preprocess.plan import PLAN
from pipelines.preprocess.sources import cifar, lsun, parquet_images, tfrecords
from pipelines.preprocess.sources.image_files import FolderSource, TarSource, ZipSource, open_zip
from pipelines.preprocess.sources.items import Item, Source, byte_size, choose_split, open_bytes
from pipelines.runtime.locations import Location, forget_listings
from pipelines.runtime.progress import Say

ACCEPTED = (
    "give LSUN's LMDB folder or zip, StyleGAN's TFRecords, CIFAR-10's tar.gz, Parquet with a column of images, "
    "or a folder, zip or tar of images"
)
# The first bytes of a compressed file, and the command that decompresses it.
DECOMPRESSORS = {
    b"\x1f\x8b": "gunzip -k",
    b"BZh": "bunzip2 -k",
    b"\xfd7zXZ\x00": "unxz -k",
    b"\x28\xb5\x2f\xfd": "unzstd",
}


def open_source(
    path: Location, *, split: str | None = None, scratch: Path | None = None, say: Say = lambda line: None
) -> Source:
    """The source at a path.

    split: one of those it has, by default train. scratch: a local folder for what must be unpacked to be read. say: gets
    the progress lines of that. Raises InputError if nothing is there, or it is of no known kind, or damaged.
    """
    forget_listings(path)
    if path.is_file():
        return _open_file(path, split, scratch, say)
    if path.is_dir():
        return _open_folder(path, split)
    raise InputError(f"source {str(path)!r} does not exist: {ACCEPTED}")


def source_facts(path: Location, split: str | None) -> dict[str, Any]:
    """What open_source(...).facts() says, without unpacking anything."""
    if path.is_file() and path.name.endswith(".zip"):
        with open_zip(path) as archive:
            databases = lsun.find_databases(archive)
        if databases:
            return lsun.lmdb_facts(databases[0].file_size)
    return open_source(path, split=split).facts()


def _open_folder(path: Location, split: str | None) -> Source:
    names = sorted(child.name for child in path.iterdir())
    parquet = [name for name in names if name.endswith(".parquet") and not name.startswith(".")]
    records = [name for name in names if name.endswith(tfrecords.SUFFIX) and not name.startswith(".")]
    layout = cifar.layout_of_files(names)
    # Before the others: a data set's own output would pass for a folder of Parquet, or of one image, its contact sheet.
    if {PLAN, MANIFEST} & set(names) and (parquet or "shards" in names):
        raise InputError(
            f"source {str(path)!r} is a data set of shards, made or begun by jobs/preprocess.py: train on it as it is, or "
            "give the images it was made from"
        )
    if layout is not None:
        return cifar.open_folder(path, layout, split)
    if parquet:
        return parquet_images.open_folder(path, parquet, split)
    choose_split(split, (), path)  # the other kinds have none
    if lsun.DATABASE in names:
        if not isinstance(path, Path):
            raise InputError(
                f"source {str(path)!r} is an LMDB in an object store, where it cannot be mapped into memory: "
                "copy the folder to a local disk"
            )
        return lsun.LmdbSource(path)
    return tfrecords.open_folder(path, records) if records else FolderSource(path)


def _open_file(path: Location, split: str | None, scratch: Path | None, say: Say) -> Source:
    with open_bytes(path) as file:
        head = file.read(tarfile.BLOCKSIZE)
    decompressor = next((command for magic, command in DECOMPRESSORS.items() if head.startswith(magic)), None)
    if decompressor is not None:
        layout = cifar.layout_of_tar(path)
        if layout is not None:
            return cifar.open_tar(path, layout, split)
        raise InputError(
            f"source {str(path)!r} is compressed, so that its files cannot be read one by one, and is no CIFAR-10: "
            f"decompress it ({decompressor}) and give the tar, or unpack it"
        )
    if head.startswith(b"PAR1"):
        return parquet_images.open_file(path, split)
    choose_split(split, (), path)  # the other kinds have none
    if path.name.endswith(tfrecords.SUFFIX) or tfrecords.is_tfrecord(head):
        return tfrecords.open_file(path)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):  # a zip's first member; the end of an empty zip
        with open_zip(path) as archive:
            if lsun.find_databases(archive):
                return lsun.unpack(path, archive, scratch, say)
        return ZipSource(path, byte_size(path))
    if _is_tar(head):
        return TarSource(path, byte_size(path))
    raise InputError(f"source {str(path)!r} is a file of {byte_size(path):,} bytes of another kind: {ACCEPTED}")


def _is_tar(head: bytes) -> bool:
    """Whether a file's first block is a tar's header with a right checksum."""
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def list_items(source: Source, path: Location) -> list[Item]:
    """The source's items. Raises InputError if there are none or the first value is no image. path: what errors name."""
    items = source.items()
    if not items:
        raise InputError(f"source {str(path)!r} holds no images: {ACCEPTED}")
    reason = _why_no_image(source, items[:1])
    if reason is not None:
        raise InputError(
            f"source {str(path)!r} holds no images (its first value, {items[0].key!r}, {reason}): {ACCEPTED}"
        )
    return items


def _why_no_image(source: Source, items: Sequence[Item]) -> str | None:
    """What is wrong with the value of the one item; None if it is an image."""
    ((_, value),) = source.read(items)
    if isinstance(value, np.ndarray):
        return None
    if isinstance(value, Exception):
        return f"cannot be read: {value}"
    try:
        with Image.open(io.BytesIO(value)) as image:
            image.verify()
    except Exception:  # Pillow's decoders raise many kinds
        return f"is {len(value)} bytes that decode as none"
    return None
