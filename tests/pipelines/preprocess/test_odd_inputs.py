"""Odd inputs over every kind of source: each is read, or listed with its reason, or refused in one sentence, or counted
among what is not read, and the number of images accounted for is the number that is there."""

import io
import json
import os
import re
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms
from support.odd_images import ADOBE_RGB, colour_profile, exif, flipped, picture, png, readable, show, texts, unreadable
from support.source_images import encoded, random_image, read_all, write_lmdb, write_tar

from ddpm_core.errors import InputError
from pipelines.preprocess.card import describe_dataset
from pipelines.preprocess.config import PreprocessConfig
from pipelines.preprocess.driver import preprocess
from pipelines.preprocess.sources.items import LARGEST_FILE
from pipelines.preprocess.sources.names import key_of, name_of
from pipelines.preprocess.sources.open import list_items, open_source
from pipelines.preprocess.sources.tfrecords import Example, masked_crc
from pipelines.preprocess.transform import decode, transform
from pipelines.preprocess.worker import make_shard
from pipelines.shards.dataset import ShardedDataset

ORDINARY = {f"{name}.png": encoded(random_image(number, 16)) for number, name in enumerate(("a", "m", "z"))}


class Account(NamedTuple):
    """What becomes of a source: keys that are kept, reasons by key of those left out, and what is not read by kind."""

    kept: list[str]
    listed: dict[str, str]
    others: dict[str, int]
    profiles: dict[str, int]

    @property
    def total(self) -> int:
        return len(self.kept) + len(self.listed) + sum(self.others.values())


def account(path: Path, **options: Any) -> Account:
    """What the pipeline makes of a source, as a worker does it."""
    output = path.parent / f"{path.name}.out"
    config = PreprocessConfig(source=str(path), output=str(output), image_size=8, **options)
    source = open_source(path, split=config.split)
    record = make_shard(0, list_items(source, path, config.max_pixels), source, config, output, {})
    keys = [key for key, _ in ShardedDataset.digests(output / record["file"])]
    listed = {entry["key"]: entry["reason"] for entry in record["skipped"]}
    return Account(keys, listed, source.others(), record["colour_profiles"])


def write_folder(path: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_zip(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_parquet(path: Path, files: Mapping[str, bytes]) -> Path:
    """A row for each file, in the order of their names, which the rows' numbers keep."""
    images = [{"bytes": files[name], "path": name} for name in sorted(files)]
    pq.write_table(pa.table({"image": images}), path, row_group_size=2)
    return path


SOURCES: dict[str, Callable[[Path, Mapping[str, bytes]], Path]] = {
    "folder": lambda folder, files: write_folder(folder / "x", files),
    "zip stored": lambda folder, files: write_zip(folder / "x.zip", files),
    "zip deflate": lambda folder, files: write_zip(folder / "x.zip", files, zipfile.ZIP_DEFLATED),
    "zip bz2": lambda folder, files: write_zip(folder / "x.zip", files, zipfile.ZIP_BZIP2),
    "zip lzma": lambda folder, files: write_zip(folder / "x.zip", files, zipfile.ZIP_LZMA),
    "tar": lambda folder, files: write_tar(folder / "x.tar", files),
    "lmdb": lambda folder, files: write_lmdb(folder / "x_lmdb", files),
    "parquet": lambda folder, files: write_parquet(folder / "x.parquet", files),
}
ZIPS = {"zip stored": 0, "zip deflate": 8, "zip bz2": 12, "zip lzma": 14}
READABLE, UNREADABLE = readable(), unreadable()


def key_in(source: str, name: str, names: list[str]) -> str:
    return f"x/{sorted(names).index(name):08d}" if source == "parquet" else name


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("odd", READABLE)
def test_what_a_viewer_shows_is_read_from_every_source(odd: str, source: str, tmp_path: Path) -> None:
    files = {"0.png": READABLE[odd], **ORDINARY}  # the odd one comes first, and is .png whatever it is
    outcome = account(SOURCES[source](tmp_path, files))
    assert outcome.kept == [key_in(source, name, [*files]) for name in sorted(files)]
    assert (outcome.listed, outcome.others) == ({}, {})


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("odd", UNREADABLE)
def test_what_is_no_image_is_listed_with_a_lasting_reason_wherever_it_lies(
    odd: str, source: str, tmp_path: Path
) -> None:
    value, message = UNREADABLE[odd]
    files = {"0.png": value, **ORDINARY, "zz.png": value}
    path = SOURCES[source](tmp_path, files)
    outcome = account(path)
    names = [*files]
    assert list(outcome.listed) == [key_in(source, name, names) for name in ("0.png", "zz.png")]
    assert outcome.kept == [key_in(source, name, names) for name in ORDINARY]
    for reason in outcome.listed.values():
        assert re.search(message, reason)
        assert not re.search(r"0x[0-9a-f]{6}|\n", reason)
        assert str(tmp_path) not in reason
    assert account(path) == outcome


# What a name is: its bytes, and whether an image under it is read or counted as a kind.
NAMES: dict[str, tuple[bytes, str | None]] = {
    "Latin-1": (b"caf\xe9.png", None),
    "Latin-1 beside its spelling": (b"caf%xe9.png", None),
    "bytes of no encoding": (b"\xff\xfe/\x80.png", None),
    "composed": ("\u00e9.png".encode(), None),
    "decomposed": ("e\u0301.png".encode(), None),
    "spaces": (b" a  b .png", None),
    "newline": (b"a\nb.png", None),
    "tab and quotes": (b"a\t'\"b.png", None),
    "percent": (b"100%.png", None),
    "a leading dash": (b"--undecodable.png", None),
    "emoji": ("\U0001f600.png".encode(), None),
    "very long": (b"x" * 240 + b".png", None),
    "a prefix of others": (b"a", None),
    "no suffix": (b"folder/image", None),
    "a suffix of another format": (b"a.gif", None),
    "a suffix that says nothing": (b"IMG.0001", None),
    "upper case": (b"A.PNG", None),
    "jfif": (b"a.jfif", None),
    "avif": (b"a.AVIF", None),
    "only a suffix for a name": (b".png", "hidden"),
    "a leading dot": (b".a.png", "hidden"),
    "a hidden folder": (b".git/a.png", "hidden"),
    "a text's suffix": (b"a.txt", ".txt"),
}
BY_NAME = {name: SOURCES[name] for name in ("folder", "zip deflate", "tar", "lmdb")}


@pytest.mark.parametrize("source", BY_NAME)
@pytest.mark.parametrize("odd", NAMES)
def test_any_name_is_a_key_or_is_counted(odd: str, source: str, tmp_path: Path) -> None:
    raw, kind = NAMES[odd]
    name = os.fsdecode(raw)
    if source == "zip deflate" and re.search("[\udc80-\udcff]", name):
        name = raw.decode("cp437")  # as every zip's reader takes bytes that are not marked as UTF-8
    files = {name: encoded(random_image(9, 16)), **ORDINARY, "ca.png": ORDINARY["a.png"]}
    if source == "lmdb":
        (tmp_path / "x_lmdb").mkdir()
        with lmdb.open(str(tmp_path / "x_lmdb")) as environment, environment.begin(write=True) as transaction:
            for key, value in files.items():
                transaction.put(os.fsencode(key), value)
        path, kind = tmp_path / "x_lmdb", None  # a key is no file's name: nothing is hidden
    else:
        path = BY_NAME[source](tmp_path, files)
    outcome = account(path)
    assert outcome.total == len(files)
    assert (key_of(name) in outcome.kept) == (kind is None)
    assert outcome.others == ({} if kind is None else {kind: 1})
    outcome_keys = json.dumps(outcome.kept, ensure_ascii=False).encode()  # no surrogates are left
    assert outcome_keys
    assert name_of(key_of(name)) == name
    assert [value for value in read_all(open_source(path)).values() if isinstance(value, Exception)] == []


def test_keys_spell_no_two_names_alike() -> None:
    names = [
        b"\xe9",
        b"%xe9",
        b"%x25xe9",
        b"%x25x25xe9",
        b"%\xe9",
        b"%x\xe9",
        b"%x2\xe9",
        b"%x25",
        "é".encode(),
        b"%xc3%xa9",
    ]
    keys = [key_of(os.fsdecode(name)) for name in names]
    assert len(set(keys)) == len(names)
    assert [os.fsencode(name_of(key)) for key in keys] == names
    assert key_of("100%.png") == "100%.png"
    assert key_of("caf%C3%A9.png") == "caf%C3%A9.png"  # as wget saves it


@pytest.mark.parametrize("kind", ["parquet", "tfrecords"])
def test_names_of_files_with_many_images_need_not_be_utf_8(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"gar\xe7on")
    folder.mkdir()
    if kind == "parquet":
        write_parquet(tmp_path / "x", ORDINARY).rename(folder / os.fsdecode(b"\xe9.parquet"))
    else:
        (folder / os.fsdecode(b"\xe9.tfrecords")).write_bytes(tfrecord(random_image(0, 16)) * 3)
    source = open_source(folder)
    assert [item.key for item in source.items()] == [f"%xe9/{number:08d}" for number in range(3)]
    assert len(read_all(source)) == 3
    json.dumps([source.facts(), source.name], ensure_ascii=False).encode()


def tfrecord(pixels: np.ndarray) -> bytes:
    example = Example()
    for key, values in (("shape", [pixels.shape[2], *pixels.shape[:2]]), ("data", pixels.transpose(2, 0, 1).tobytes())):
        entry = example.features.feature.add()
        entry.key = key
        if isinstance(values, bytes):
            entry.value.bytes_list.value.append(values)
        else:
            entry.value.int64_list.value.extend(values)
    data = example.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_damaged_record_costs_only_itself(where: str, tmp_path: Path) -> None:
    records = [tfrecord(random_image(number, 16)) for number in range(5)]
    number = {"first": 0, "middle": 2, "last": 4}[where]
    records[number] = flipped(records[number], 100)
    (tmp_path / "x.tfrecords").write_bytes(b"".join(records))
    outcome = account(tmp_path / "x.tfrecords")
    assert outcome.listed == {f"x/{number:08d}": "ValueError: the checksum of the record's data is wrong"}
    assert len(outcome.kept) == 4


@pytest.mark.parametrize("source", ZIPS)
@pytest.mark.parametrize("damage", ["header", "first", "middle", "last", "encrypted", "all"])
def test_a_damaged_member_is_listed_whatever_compressed_it(damage: str, source: str, tmp_path: Path) -> None:
    files = {f"{number}.png": encoded(random_image(number, 40)) for number in range(6)}
    path = write_zip(tmp_path / "x.zip", files, ZIPS[source])
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("0.png")
    content = bytearray(path.read_bytes())
    start = 30 + len("0.png")
    if damage == "header":
        content[0] ^= 0xFF
    elif damage == "encrypted":
        content[6] |= 1
        content[content.index(b"PK\x01\x02") + 8] |= 1
    else:
        size = member.compress_size
        place = {"first": slice(4, 5), "middle": slice(size // 2, size // 2 + 1), "last": slice(size - 1, size)}.get(
            damage, slice(0, size)
        )
        for position in range(size)[place]:
            content[start + position] ^= 0xFF
    path.write_bytes(content)
    outcome = account(path)
    assert list(outcome.listed) == ["0.png"]
    assert len(outcome.kept) == 5
    assert account(path) == outcome


def test_damage_at_any_byte_of_a_zip_costs_an_image_or_is_refused(tmp_path: Path) -> None:
    files = {f"{number}.png": encoded(random_image(number, 8)) for number in range(4)}
    for method in ZIPS.values():
        whole = write_zip(tmp_path / "whole.zip", files, method).read_bytes()
        for position in range(0, len(whole), 23):
            path = tmp_path / f"{method}-{position}.zip"
            path.write_bytes(flipped(whole, position))
            outcome: Account | InputError
            try:
                outcome = account(path)
            except InputError as error:
                outcome = error
            assert "\n" not in str(outcome) if isinstance(outcome, InputError) else outcome.total == 4


def many(number: int = 151, broken: int = 1) -> dict[str, bytes]:
    return {f"{n:04d}.png": b"" if n < broken else encoded(random_image(n, 8)) for n in range(number)}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("broken", [1, 60, 150])
def test_the_first_values_do_not_stand_for_the_source(broken: int, source: str, tmp_path: Path) -> None:
    outcome = account(SOURCES[source](tmp_path, many(broken=broken)))
    assert (len(outcome.kept), len(outcome.listed)) == (151 - broken, broken)


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_of_which_no_value_decodes_is_refused(source: str, tmp_path: Path) -> None:
    path = SOURCES[source](tmp_path, many(broken=151))
    with pytest.raises(
        InputError, match=r"holds no images \(its first value, '.*', is 0 bytes that .* and none of 63 others"
    ):
        account(path)


# Links, archives and what lies beside images: (what makes the source, keys that are kept, what is counted).
IMAGE = encoded(random_image(5, 16))


def linked_folder(path: Path) -> Path:
    write_folder(path / "x", {"a.png": IMAGE, "deep/b.png": IMAGE})
    write_folder(path / "elsewhere", {f"{n}.png": IMAGE for n in range(3)} | {"sub/c.png": IMAGE})
    (path / "x" / "link").symlink_to(path / "elsewhere")
    (path / "x" / "file.png").symlink_to(path / "elsewhere" / "0.png")
    os.link(path / "elsewhere" / "0.png", path / "x" / "hard.png")
    return path / "x"


def looped_folder(path: Path) -> Path:
    write_folder(path / "x", {"a.png": IMAGE, "deep/b.png": IMAGE})
    (path / "x" / "deep" / "up").symlink_to(path / "x")
    (path / "x" / "itself.png").symlink_to(path / "x" / "itself.png")
    (path / "x" / "gone.png").symlink_to(path / "nothing")
    os.mkfifo(path / "x" / "pipe.png")
    return path / "x"


def folder_with_others(path: Path) -> Path:
    files = {"a.png": IMAGE, "a.txt": b"x", "b.txt": b"y", "LICENSE": b"MIT", "Pyramid": b"P1 is no bitmap here"}
    return write_folder(
        path / "x", files | {"faces.zip": b"PK", "labels.json": b"{}", "odd.2024": b"?", "run.SH": b"#!"}
    )


def metadata_beside_images(path: Path) -> Path:
    write_folder(path / "x", {"a.png": IMAGE, "b.png": IMAGE})
    pq.write_table(pa.table({"file_name": ["a.png", "b.png"], "label": [0, 1]}), path / "x" / "metadata.parquet")
    return path / "x"


def images_beside_parquet(path: Path) -> Path:
    (path / "x").mkdir()
    for split in ("train", "test"):
        write_parquet(path / "x" / f"{split}-00000-of-00001.parquet", {"a.png": IMAGE})
    write_folder(path / "x", {"extra.png": IMAGE, "README.md": b"x", ".gitattributes": b"x"})
    return path / "x"


def images_beside_an_lmdb(path: Path) -> Path:
    write_lmdb(path / "x_lmdb", {"a": IMAGE})
    return write_folder(path / "x_lmdb", {"thumbnail.png": IMAGE, "README": b"x"})


def images_beside_tfrecords(path: Path) -> Path:
    return write_folder(path / "x", {"x.tfrecords": tfrecord(random_image(0, 16)), "x.labels": b"x", "a.png": IMAGE})


def tar_of_links(path: Path) -> Path:
    with tarfile.open(path / "x.tar", "w") as archive:

        def add(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, link, len(content)
            archive.addfile(member, io.BytesIO(content))

        add("blob", IMAGE)
        add("d/hard.png", kind=tarfile.LNKTYPE, link="./blob")
        add("d/harder.png", kind=tarfile.LNKTYPE, link="d/hard.png")
        add("d/soft.png", kind=tarfile.SYMTYPE, link="../blob")
        add("out.png", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add("loop.png", kind=tarfile.SYMTYPE, link="loop.png")
        add("nothing.png", kind=tarfile.LNKTYPE, link="nobody")
        add("pipe.png", kind=tarfile.FIFOTYPE)
        add("a.txt", b"text")
    return path / "x.tar"


def joined_tars(path: Path) -> Path:
    parts = [write_tar(path / f"{name}.tar", {f"{name}.png": IMAGE, f"{name}.txt": b"x"}) for name in "abc"]
    (path / "x.tar").write_bytes(b"".join(part.read_bytes() for part in parts))
    return path / "x.tar"


def tar_with_garbage(path: Path) -> Path:
    write_tar(path / "x.tar", {"a.png": IMAGE})
    with (path / "x.tar").open("ab") as file:
        file.write(b"garbage")
    return path / "x.tar"


def zip_of_links(path: Path) -> Path:
    with zipfile.ZipFile(path / "x.zip", "w") as archive:
        archive.writestr("d/blob", IMAGE)
        for name, target in (("soft.png", "d/blob"), ("d/up.png", "../soft.png"), ("out.png", "/etc/passwd")):
            member = zipfile.ZipInfo(name)
            member.create_system, member.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            archive.writestr(member, target)
        archive.writestr("a.txt", "text")
    return path / "x.zip"


def zip_64(path: Path) -> Path:
    with zipfile.ZipFile(path / "x.zip", "w") as archive, archive.open("a.png", "w", force_zip64=True) as file:
        file.write(IMAGE)
    return path / "x.zip"


def cifar_tar(path: Path, *, prefix: str = "./", mode: str = "w:gz") -> Path:
    row = bytes([3]) + random_image(0, 32).tobytes()
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    files = {f"{prefix}cifar-10-batches-bin/{name}": row for name in names}
    return write_tar(path / "x.tar.gz", {prefix: b"", **files, f"{prefix}cifar-10-batches-bin/readme.html": b"x"}, mode)


CIFAR_KEYS = [f"train/{number:08d}" for number in range(5)]
CIFAR_OTHERS = {".html": 1, "file of the split 'test'": 1}
PLACES: dict[str, tuple[Callable[[Path], Path], list[str], dict[str, int]]] = {
    "links in a folder": (
        linked_folder,
        ["a.png", "deep/b.png", "file.png", "hard.png", "link/0.png", "link/1.png", "link/2.png", "link/sub/c.png"],
        {},
    ),
    "links that lead nowhere or back": (
        looped_folder,
        ["a.png", "deep/b.png"],
        {"broken link": 2, "link to a folder above it": 1, "special file": 1},
    ),
    "other files in a folder": (
        folder_with_others,
        ["a.png"],
        {".json": 1, ".sh": 1, ".txt": 2, ".zip": 1, "without a suffix": 3},
    ),
    "a table of metadata": (metadata_beside_images, ["a.png", "b.png"], {".parquet": 1}),
    "images beside Parquet": (
        images_beside_parquet,
        ["train/00000000"],
        {".md": 1, ".png": 1, "file of the split 'test'": 1, "hidden": 1},
    ),
    "images beside an LMDB": (images_beside_an_lmdb, ["a"], {".png": 1, "without a suffix": 1}),
    "images beside TFRecords": (images_beside_tfrecords, ["x/00000000"], {".labels": 1, ".png": 1}),
    "links in a tar": (
        tar_of_links,
        ["blob", "d/hard.png", "d/harder.png", "d/soft.png"],
        {".txt": 1, "link to nothing in it": 3, "special file": 1},
    ),
    "three tars joined": (joined_tars, ["a.png", "b.png", "c.png"], {".txt": 3}),
    "garbage after a tar": (tar_with_garbage, ["a.png"], {"bytes after its end": 7}),
    "links in a zip": (zip_of_links, ["d/blob", "d/up.png", "soft.png"], {".txt": 1, "link to nothing in it": 1}),
    "zip64": (zip_64, ["a.png"], {}),
    "a tar of ./": (
        lambda path: write_tar(path / "x.tar", {"./a.png": IMAGE, "./b/c.png": IMAGE}),
        ["./a.png", "./b/c.png"],
        {},
    ),
    "CIFAR-10 below ./": (cifar_tar, CIFAR_KEYS, CIFAR_OTHERS),
    "CIFAR-10 deeper": (lambda path: cifar_tar(path, prefix="data/sets/"), CIFAR_KEYS, CIFAR_OTHERS),
    "CIFAR-10 unpacked from gzip": (lambda path: cifar_tar(path, mode="w"), CIFAR_KEYS, CIFAR_OTHERS),
}


@pytest.mark.parametrize("odd", PLACES)
def test_all_that_lies_in_a_source_is_read_or_counted(odd: str, tmp_path: Path) -> None:
    make, keys, others = PLACES[odd]
    outcome = account(make(tmp_path))
    assert (outcome.kept, outcome.listed, outcome.others) == (keys, {}, others)


def joined_zips(path: Path) -> Path:
    parts = [write_zip(path / f"{name}.zip", {f"{name}.png": IMAGE}).read_bytes() for name in "ab"]
    (path / "x.zip").write_bytes(b"".join(parts))
    return path / "x.zip"


def zip_marked_utf_8(path: Path) -> Path:
    content = write_zip(path / "x.zip", {"\u00e9.png": IMAGE}).read_bytes()
    (path / "x.zip").write_bytes(content.replace("\u00e9".encode(), b"\xe9\xe9"))
    return path / "x.zip"


def broken_joined_tars(path: Path) -> Path:
    joined = joined_tars(path)
    content = joined.read_bytes()
    (path / "x.tar").write_bytes(flipped(content, content.index(b"b.png")))
    return joined


def two_lmdbs(path: Path) -> Path:
    for name in ("bedroom_lmdb", "church_lmdb"):
        (path / "x" / name).mkdir(parents=True)
        write_lmdb(path / "x" / name, {"a": IMAGE})
    return path / "x"


def parent_of_cifar(path: Path) -> Path:
    return write_folder(path / "x", {"cifar-10-batches-bin/data_batch_1.bin": bytes(3073), "readme.html": b"x"})


def parent_of_parquet(path: Path) -> Path:
    (path / "x" / "data").mkdir(parents=True)
    write_parquet(path / "x" / "data" / "train-00000-of-00001.parquet", {"a.png": IMAGE})
    return path / "x"


def folder_of_an_archive(path: Path) -> Path:
    (path / "x").mkdir()
    write_zip(path / "x" / "faces.zip", {"a.png": IMAGE})
    return write_folder(path / "x", {"notes.txt": b"x"})


def database_file(path: Path) -> Path:
    return write_lmdb(path / "x_lmdb", {"a": IMAGE}) / "data.mdb"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "two zips joined": (joined_zips, r"has files in its first \d+ bytes that its table of contents does not name"),
    "a zip's name is no UTF-8": (
        zip_marked_utf_8,
        r"marks a name as UTF-8 that is not \(b'\\xe9\\xe9.png'\): unpack it",
    ),
    "the second of joined tars is damaged": (broken_joined_tars, "is a damaged tar .*: download or make it again$"),
    "several LMDBs": (
        two_lmdbs,
        r"holds no images but 4 .mdb: give '.*/x/bedroom_lmdb', which lies in it \(or one of 1 ",
    ),
    "the parent of CIFAR-10": (
        parent_of_cifar,
        r"holds no images but .*: give '.*/x/cifar-10-batches-bin', which lies",
    ),
    "the parent of Parquet": (
        parent_of_parquet,
        r"holds no images but 1 .parquet: give '.*/x/data', which lies in it$",
    ),
    "the parent of a zip": (
        folder_of_an_archive,
        r"no images but 1 .txt, 1 .zip: give '.*/x/faces.zip', which lies in",
    ),
    "data.mdb itself": (database_file, r"data.mdb' is a file of an LMDB: give its folder, '.*/x_lmdb'$"),
    "an encrypted zip": (
        lambda path: encrypted(write_zip(path / "x.zip", {"a.png": IMAGE, "b.png": IMAGE})),
        r"holds no images \(its first value, 'a.png', cannot be read: File 'a.png' is encrypted",
    ),
}


def encrypted(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    for magic, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for match in re.finditer(magic, bytes(content)):
            content[match.start() + place] |= 1
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("odd", REFUSED)
def test_what_cannot_be_read_is_refused_in_a_sentence_that_says_what_to_give(odd: str, tmp_path: Path) -> None:
    make, message = REFUSED[odd]
    path = make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        account(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["folder", "zip stored", "tar"])
def test_a_file_larger_than_any_image_is_listed_without_reading_it(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LARGEST_FILE > 1 << 29
    monkeypatch.setattr("pipelines.preprocess.sources.items.LARGEST_FILE", 5000)
    monkeypatch.setattr("pipelines.preprocess.sources.image_files.LARGEST_FILE", 5000)
    outcome = account(SOURCES[source](tmp_path, {"bomb.png": bytes(6000), **ORDINARY}))
    assert outcome.listed == {"bomb.png": "ValueError: 6,000 bytes, more than an image's file may have (5,000)"}
    assert outcome.kept == list(ORDINARY)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_folder(tmp_path / "x", {"a.png": IMAGE, "closed/b.png": IMAGE})
    scandir = os.scandir

    def deny(place: Path) -> Any:
        if Path(place).name == "closed":
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(
        InputError, match=r"has a folder 'closed/' that cannot be listed \(Permission denied\): make it"
    ):
        account(path)


ARROW = {
    "binary view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.binary()),
    "dictionary of large": pa.dictionary(pa.int8(), pa.large_binary()),
}


@pytest.mark.parametrize("in_struct", [False, True])
@pytest.mark.parametrize("kind", ARROW)
def test_parquet_of_every_layout_of_binary_is_read(kind: str, in_struct: bool, tmp_path: Path) -> None:
    column = pa.array(list(ORDINARY.values()), pa.binary())
    column = column.dictionary_encode().cast(ARROW[kind]) if "dictionary" in kind else column.cast(ARROW[kind])
    if in_struct:
        column = pa.StructArray.from_arrays([column], ["bytes"])
    pq.write_table(pa.table({"picture": column}), tmp_path / "x.parquet")
    assert list(read_all(open_source(tmp_path / "x.parquet")).values()) == list(ORDINARY.values())
    assert len(account(tmp_path / "x.parquet").kept) == 3


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("name", [name for name in READABLE if name.startswith("orientation")])
def test_an_orientation_is_read_whatever_else_its_exif_holds(name: str) -> None:
    kind, number = name.rsplit(" ", 1)[1].upper(), re.search(r"\d+", name)
    stored = show(picture(kind))
    turn = TURNS.get(6 if number is None else int(number[0]), np.asarray)
    np.testing.assert_array_equal(np.asarray(decode(READABLE[name]).convert("RGB")), turn(stored))


def test_huge_texts_leave_the_orientation_and_the_profile(tmp_path: Path) -> None:
    profile = colour_profile("Adobe RGB (1998)", ADOBE_RGB, 2.2)
    bare = picture("PNG", exif=exif(), icc_profile=profile)
    full = picture("PNG", exif=exif(), icc_profile=profile, pnginfo=texts(1, 3_000_000, zip=True))
    np.testing.assert_array_equal(np.asarray(decode(full)), np.asarray(decode(bare)))
    assert not np.array_equal(np.asarray(decode(bare)), show(bare))


PROFILES = {
    "profile Adobe RGB": {"Adobe RGB (1998)": 1},
    "profile Display P3": {"Display P3": 1},
    "profile Display P3 in JPEG": {"Display P3": 1},
    "profile sRGB": {},
    "profile of grey": {"Grey": 1},
    "profile of grey on colours": {"a profile that cannot be used": 1},
    "profile of colours on CMYK": {"a profile that cannot be used": 1},
    "profile is junk": {"a profile that cannot be used": 1},
    "profile is cut": {"a profile that cannot be used": 1},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("odd", PROFILES)
def test_images_are_converted_by_their_profiles_and_counted(odd: str, source: str, tmp_path: Path) -> None:
    value = READABLE[odd]
    assert account(SOURCES[source](tmp_path, {"0.png": value, **ORDINARY})).profiles == PROFILES[odd]
    pixels = np.asarray(decode(value).convert("RGB"))
    with Image.open(io.BytesIO(value)) as image:
        if "cannot" in str(PROFILES[odd]) or not PROFILES[odd]:
            expected = image.convert("RGB")
        else:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
            converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
            assert converted is not None
            expected = converted
            assert np.abs(pixels.astype(int) - np.asarray(image.convert("RGB"))).mean() > 5
    np.testing.assert_array_equal(pixels, np.asarray(expected))


def test_adobes_and_apples_primaries_land_where_colorimetry_says() -> None:
    """By the definition of sRGB from XYZ, for a colour that both spaces hold."""
    pixels = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    linear = (pixels[0, 0] / 255.0) ** 2.2
    to_xyz = np.array([[0.5767, 0.1856, 0.1882], [0.2973, 0.6274, 0.0753], [0.0270, 0.0707, 0.9911]])  # of Adobe RGB
    from_xyz = np.array([[3.2405, -1.5371, -0.4985], [-0.9693, 1.8760, 0.0416], [0.0556, -0.2040, 1.0572]])
    values = np.clip(from_xyz @ to_xyz @ linear, 0, 1)
    expected = 255 * np.where(values <= 0.0031308, 12.92 * values, 1.055 * values ** (1 / 2.4) - 0.055)
    value = encoded(pixels, "PNG", icc_profile=colour_profile("Adobe RGB (1998)", ADOBE_RGB, 2.2))
    shown = transform(value, image_size=8, channels=3, filter="box")[0, 0]
    assert np.abs(shown - expected).max() < 1.5


def test_transparency_is_kept_through_a_profile() -> None:
    profile = colour_profile("Adobe RGB (1998)", ADOBE_RGB, 2.2)
    clear = Image.new("RGBA", (8, 8), (10, 200, 30, 0))
    assert (np.asarray(decode(encoded(clear, "PNG", icc_profile=profile)).convert("RGB")) == 255).all()


def test_max_pixels_lets_large_images_in_and_keeps_small_ones_out(tmp_path: Path) -> None:
    large = png(20_000, 10_000, (b"\0" + b"\xff" * 2500) * 10_000)
    path = write_folder(tmp_path / "x", {"0.png": large, **ORDINARY})
    assert list(account(path).listed) == ["0.png"]
    assert account(path, max_pixels=200_000_000).listed == {}
    listed = account(path, max_pixels=16 * 16).listed
    assert listed == {"0.png": "TooLargeError: 20000x10000 pixels, more than --max-pixels 256 allows"}
    with pytest.raises(InputError, match=r"holds no images .* more than --max-pixels 255 allows"):
        account(path, max_pixels=255)
    limit = Image.MAX_IMAGE_PIXELS
    assert limit is not None  # nothing else in the process loses its limit
    for wrong in (0, -1, 2**32):
        with pytest.raises(InputError, match=r"--max-pixels is .*: give a number of pixels from 1 to"):
            PreprocessConfig(source="x", output="y", image_size=8, max_pixels=wrong)


@pytest.mark.usefixtures("ray_session")
def test_a_folder_whose_own_name_is_not_utf_8_is_read_through_a_link(tmp_path: Path) -> None:
    path = write_folder(tmp_path / os.fsdecode(b"gar\xe7on"), ORDINARY)
    config = PreprocessConfig(source=str(path), output=str(tmp_path / "out"), image_size=8)
    with pytest.raises(
        InputError, match=r"--source is '.*', a path that is not UTF-8: rename it, or give a link to it$"
    ):
        preprocess(config)
    with pytest.raises(InputError, match=r"--output is '.*', a path that is not UTF-8: give another$"):
        preprocess(replace(config, source=str(tmp_path), output=str(path / "out")))
    (tmp_path / "link").symlink_to(path)
    dataset = preprocess(replace(config, source=str(tmp_path / "link")))
    assert (len(dataset), dataset.name) == (3, "gar%xe7on")
    assert describe_dataset(dataset).encode()


@pytest.mark.usefixtures("ray_session")
def test_the_manifest_and_the_card_account_for_every_file(tmp_path: Path) -> None:
    files = many() | {"p3.png": READABLE["profile Display P3"], os.fsdecode(b"\xe9\n.png"): b"", "notes.txt": b"x"}
    config = PreprocessConfig(
        source=str(write_folder(tmp_path / "x", files)), output=str(tmp_path / "one"), image_size=8, max_skipped=0.5
    )
    lines: list[str] = []
    dataset = preprocess(config, lines.append)
    manifest = dataset.manifest
    assert [entry["key"] for entry in manifest["skipped"]] == ["%xe9\n.png", "0000.png"]
    assert manifest["source_others"] == {".txt": 1}
    assert manifest["colour_profiles"] == {"Display P3": 1}
    assert len(dataset) + len(manifest["skipped"]) + sum(manifest["source_others"].values()) == len(files)
    assert lines[0] == "preprocess: 153 images in the source, and 1 .txt, which are not read"
    card = describe_dataset(dataset).splitlines()
    assert "not read  1 .txt" in card
    assert "profiles  1 with Display P3, converted to sRGB" in card
    assert r"          '%xe9\n.png': ValueError: 0 bytes" in card
    dataset.verify()
    again = preprocess(replace(config, output=str(tmp_path / "two")))
    for name in ("manifest.json", "plan.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    # A manifest of an earlier version opens, and so does its card.
    old = {key: value for key, value in again.manifest.items() if key not in ("source_others", "colour_profiles")}
    (tmp_path / "two" / "manifest.json").write_text(json.dumps(old))
    assert "not read" not in describe_dataset(ShardedDataset.open(tmp_path / "two"))
