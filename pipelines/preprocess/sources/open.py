"""Raw data in: which kind of source lies at a path, recognised by its content."""

import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError

from ddpm_core.commit import MANIFEST
from ddpm_core.errors import InputError
from pipelines.preprocess.plan import PLAN
from pipelines.preprocess.sources import cifar, lsun, parquet_images, tfrecords
from pipelines.preprocess.sources.folders import kinds_beside
from pipelines.preprocess.sources.image_files import FolderSource, TarSource, ZipSource, is_tar, open_zip
from pipelines.preprocess.sources.items import Item, Source, byte_size, choose_split, message_of, open_bytes, reason_of
from pipelines.preprocess.transform import MAX_PIXELS, decode
from pipelines.runtime.progress import Say
from pipelines.storage.locations import Location

ACCEPTED = (
    "give LSUN's LMDB folder or zip, StyleGAN's TFRecords, CIFAR-10's tar.gz, Parquet with a column of images, "
    "or a folder, zip or tar of images"
)
TRIED = 64  # how many values, from all over a source, are broken before it counts as one without images
# The first bytes of a compressed file, and the command that decompresses it.
DECOMPRESSORS = {
    b"\x1f\x8b": "gunzip -k",
    b"BZh": "bunzip2 -k",
    b"\xfd7zXZ\x00": "unxz -k",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
ZIP_HEADS = (b"PK\x03\x04", b"PK\x05\x06")  # a zip's first member; the end of an empty zip


def open_source(
    path: Location, *, split: str | None = None, scratch: Path | None = None, say: Say = lambda line: None
) -> Source:
    """The source at a path.

    split: one of those it has, by default train. scratch: a local folder for what must be unpacked to be read. say: gets
    the progress lines of that. Raises InputError if nothing is there, or it is of no known kind, or damaged.
    """
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


def describe_others(others: Mapping[str, int]) -> str:
    """What a source holds beside its images, in words: `3 .txt, 1 hidden`."""
    return ", ".join(f"{number:,} {kind}" for kind, number in others.items())


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
        batches = cifar.open_folder(path, layout, split)
        return replace(batches, beside=kinds_beside(path, batches.batches, batches.kind_beside))
    # A table of metadata beside image files is no column of images.
    if parquet and (parquet_images.holds_images(path, parquet) or not FolderSource(path).items()):
        table = parquet_images.open_folder(path, parquet, split)
        return replace(table, beside=kinds_beside(path, [name for name, _, _ in table.files], table.kind_beside))
    choose_split(split, (), path)  # the other kinds have none
    if lsun.DATABASE in names:
        if not isinstance(path, Path):
            raise InputError(
                f"source {str(path)!r} is an LMDB in an object store, where it cannot be mapped into memory: "
                "copy the folder to a local disk"
            )
        return lsun.LmdbSource(path, kinds_beside(path, [lsun.DATABASE, lsun.LOCK]))
    if records:
        record_files = tfrecords.open_folder(path, records)
        return replace(record_files, beside=kinds_beside(path, [name for name, _ in record_files.files]))
    return FolderSource(path)


def _open_file(path: Location, split: str | None, scratch: Path | None, say: Say) -> Source:
    with open_bytes(path) as file:
        head = file.read(tarfile.BLOCKSIZE)
    decompressor = next((command for magic, command in DECOMPRESSORS.items() if head.startswith(magic)), None)
    layout = cifar.layout_of_tar(path) if decompressor is not None or is_tar(head) else None
    if layout is not None:
        return cifar.open_tar(path, layout, split)
    if decompressor is not None:
        raise InputError(
            f"source {str(path)!r} is compressed, so that its files cannot be read one by one, and is no CIFAR-10: "
            f"decompress it ({decompressor}) and give the tar, or unpack it"
        )
    if head.startswith(b"PAR1"):
        return parquet_images.open_file(path, split)
    choose_split(split, (), path)  # the other kinds have none
    if path.name.endswith(tfrecords.SUFFIX) or tfrecords.is_tfrecord(head):
        return tfrecords.open_file(path)
    if _is_zip(path, head):
        with open_zip(path) as archive:
            if lsun.find_databases(archive):
                return lsun.unpack(path, archive, scratch, say)
        return ZipSource(path, byte_size(path))
    if is_tar(head):
        return TarSource(path, byte_size(path))
    if path.name in (lsun.DATABASE, lsun.LOCK):
        raise InputError(f"source {str(path)!r} is a file of an LMDB: give its folder, {str(path.parent)!r}")
    if cifar.layout_of_files([path.name]) is not None:
        raise InputError(f"source {str(path)!r} is one batch of CIFAR-10: give its folder, {str(path.parent)!r}")
    raise InputError(f"source {str(path)!r} is a file of {byte_size(path):,} bytes of another kind: {ACCEPTED}")


def _is_zip(path: Location, head: bytes) -> bool:
    """Whether a file begins as a zip does, or, if its first member is damaged, ends as one."""
    if head.startswith(ZIP_HEADS):
        return True
    with open_bytes(path) as file:
        return zipfile.is_zipfile(file) and not is_tar(head)


def list_items(source: Source, path: Location, max_pixels: int = MAX_PIXELS) -> list[Item]:
    """The source's items. Raises InputError if there are none, or if none of TRIED from all over it is an image; with
    fewer broken ones, the policies for single images decide. path: what errors name."""
    items = source.items()
    if not items:
        others = describe_others(source.others())
        raise InputError(f"source {str(path)!r} holds no images{f' but {others}' if others else ''}: {_advice(path)}")
    first_reason = ""
    last = len(items) - 1
    tried = [items[number * last // (TRIED - 1)] for number in range(TRIED)] if last >= TRIED else items
    for item in tried:
        reason = _why_no_image(source, item, max_pixels)
        if reason is None:
            return items
        first_reason = first_reason or reason
    alike = f", and none of {len(tried) - 1} others that were tried is one" if len(tried) > 1 else ""
    raise InputError(
        f"source {str(path)!r} holds no images (its first value, {items[0].key!r}, {first_reason}{alike}): {_advice(path)}"
    )


def _why_no_image(source: Source, item: Item, max_pixels: int) -> str | None:
    """What is wrong with the value of an item; None if it is an image."""
    ((_, value),) = source.read([item])
    if isinstance(value, np.ndarray):
        return None
    if isinstance(value, Exception):
        return f"cannot be read: {message_of(value)}"
    try:
        decode(value, max_pixels=max_pixels)
    except Exception as error:  # Pillow's decoders raise many kinds
        known = isinstance(error, UnidentifiedImageError) and "does not read" not in str(error)
        return f"is {len(value):,} bytes that decode as none" + ("" if known else f": {reason_of(error)}")
    return None


def _advice(path: Location) -> str:
    """What to give in place of a source without images: what lies in it and is a source of another kind, if anything."""
    if not path.is_dir():
        return ACCEPTED
    inside = [path / name for name in sorted(child.name for child in path.iterdir())]
    inside = [child for child in inside if _looks_like_source(child)]
    if not inside:
        return ACCEPTED
    more = f" (or one of {len(inside) - 1:,} others in it)" if len(inside) > 1 else ""
    return f"give {str(inside[0])!r}, which lies in it{more}"


def _looks_like_source(path: Location) -> bool:
    """Whether a folder has the files of a source that is no folder of images, or a file is a zip, a tar or
    Parquet, or is compressed."""
    if path.is_dir():
        names = [child.name for child in path.iterdir()]
        return (
            lsun.DATABASE in names
            or cifar.layout_of_files(names) is not None
            or any(name.endswith((".parquet", tfrecords.SUFFIX)) for name in names)
        )
    if not path.is_file():
        return False
    with open_bytes(path) as file:
        head = file.read(tarfile.BLOCKSIZE)
    return head.startswith((*ZIP_HEADS, *DECOMPRESSORS, b"PAR1")) or is_tar(head)
