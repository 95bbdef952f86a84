"""Raw data in: which source of images lies at a place, told by what is there."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_core.commit import MANIFEST
from ddpm_core.errors import InputError
from pipelines.preprocess.sources import cifar, lsun, parquet_images, tfrecords
from pipelines.preprocess.sources.image_files import FolderSource, TarSource, ZipSource, open_zip
from pipelines.preprocess.sources.items import Item, Source, Value, byte_size, choose_split, open_bytes
from pipelines.runtime.locations import Location, forget_listings
from pipelines.runtime.progress import Say

__all__ = ["Item", "Source", "Value", "list_items", "open_source", "source_facts"]

ACCEPTED = (
    "give LSUN's LMDB folder or zip, StyleGAN's TFRecords, CIFAR-10's tar.gz, Parquet with a column of images, "
    "or a folder, zip or tar of images"
)
# What a compressed file begins with, and what decompresses it.
COMPRESSED = {b"\x1f\x8b": "gunzip -k", b"BZh": "bunzip2 -k", b"\xfd7zXZ\x00": "unxz -k", b"\x28\xb5\x2f\xfd": "unzstd"}


def open_source(
    place: Location, *, split: str | None = None, scratch: Path | None = None, say: Say = lambda line: None
) -> Source:
    """The source at a place. `split` is one of those it has, by default train; `scratch` is a local folder for what
    must be unpacked to be read, of which `say` gets progress lines.

    InputError where nothing is, nothing known, or something damaged.
    """
    forget_listings(place)
    if place.is_file():
        return _open_file(place, split, scratch, say)
    if place.is_dir():
        return _open_folder(place, split)
    raise InputError(f"source {str(place)!r} does not exist: {ACCEPTED}")


def source_facts(place: Location, split: str | None) -> dict[str, Any]:
    """What open_source(...).facts() says, without unpacking anything."""
    if place.is_file() and place.name.endswith(".zip"):
        with open_zip(place) as archive:
            found = lsun.databases(archive)
        if found:
            return lsun.facts(found[0].file_size)
    return open_source(place, split=split).facts()


def _open_folder(place: Location, split: str | None) -> Source:
    names = sorted(child.name for child in place.iterdir())
    parquet = [name for name in names if name.endswith(".parquet") and not name.startswith(".")]
    records = [name for name in names if name.endswith(tfrecords.SUFFIX) and not name.startswith(".")]
    layout = cifar.layout_of_files(names)
    if {"plan.json", MANIFEST} & set(names) and (parquet or "shards" in names):  # its contact sheet is no source
        raise InputError(
            f"source {str(place)!r} is a data set of shards, made or begun by jobs/preprocess.py: train on it as it is, or "
            "give the images it was made from"
        )
    if layout is not None:
        return cifar.open_folder(place, layout, split)
    if parquet:
        return parquet_images.open_folder(place, parquet, split)
    choose_split(split, (), place)
    if lsun.DATABASE in names:
        if not isinstance(place, Path):
            raise InputError(
                f"source {str(place)!r} is an LMDB in an object store, where it cannot be mapped into memory: "
                "copy the folder to a local disk"
            )
        return lsun.LmdbSource(place)
    return tfrecords.open_folder(place, records) if records else FolderSource(place)


def _open_file(place: Location, split: str | None, scratch: Path | None, say: Say) -> Source:
    with open_bytes(place) as file:
        head = file.read(512)
        packed_by = next((tool for magic, tool in COMPRESSED.items() if head.startswith(magic)), None)
        is_tar = packed_by is None and _is_tar(head)
    if packed_by is not None:
        layout = cifar.layout_of_tar(place)
        if layout is not None:
            return cifar.open_tar(place, layout, split)
        raise InputError(
            f"source {str(place)!r} is compressed, so that its files cannot be read one by one, and is no CIFAR-10: "
            f"decompress it ({packed_by}) and give the tar, or unpack it"
        )
    if head.startswith(b"PAR1"):
        return parquet_images.open_file(place, split)
    choose_split(split, (), place)
    if place.name.endswith(tfrecords.SUFFIX) or tfrecords.is_tfrecord(head):
        return tfrecords.open_file(place)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        with open_zip(place) as archive:
            if lsun.databases(archive):
                return lsun.unpacked(place, archive, scratch, say)
        return ZipSource(place, byte_size(place))
    if is_tar:
        return TarSource(place, byte_size(place))
    raise InputError(f"source {str(place)!r} is a file of {byte_size(place):,} bytes of another kind: {ACCEPTED}")


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def list_items(source: Source, place: Location) -> list[Item]:
    """The source's items. InputError where there are none or the first value is no image."""
    items = source.items()
    if not items:
        raise InputError(f"source {str(place)!r} holds no images: {ACCEPTED}")
    reason = _why_no_image(source, items[:1])
    if reason is not None:
        raise InputError(
            f"source {str(place)!r} holds no images (its first value, {items[0].key!r}, {reason}): {ACCEPTED}"
        )
    return items


def _why_no_image(source: Source, items: Sequence[Item]) -> str | None:
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
