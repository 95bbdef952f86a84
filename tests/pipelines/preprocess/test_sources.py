"""Which source lies at a path, recognised by its content, and what is said if there is none."""

import bz2
import gzip
import lzma
import zipfile
from pathlib import Path

import pytest
from support.source_images import encoded, random_image, read_all, write_lmdb, write_tar
from upath import UPath

from ddpm_core.errors import InputError
from pipelines.preprocess.sources.image_files import FolderSource, TarSource, ZipSource
from pipelines.preprocess.sources.items import Item
from pipelines.preprocess.sources.lsun import LmdbSource
from pipelines.preprocess.sources.open import list_items, open_source

ONE_IMAGE = {"a.png": encoded(random_image(0))}


def test_an_lsun_lmdb_lists_its_keys_in_order_and_reads_them(digits_lmdb: Path) -> None:
    source = open_source(digits_lmdb)
    items = list_items(source, digits_lmdb)
    assert len(items) == 1797
    assert all(len(item.key) == 40 and item == Item(item.key) for item in items)
    assert all(isinstance(value, bytes) and value[8:12] == b"WEBP" for value in read_all(source).values())
    assert source.name == "digits_train"


def test_a_file_is_recognised_by_its_content_not_its_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.zip", ONE_IMAGE)
    with zipfile.ZipFile(tmp_path / "b.tar", "w") as archive:
        archive.writestr("a.png", ONE_IMAGE["a.png"])
    assert isinstance(open_source(tmp_path / "a.zip"), TarSource)
    assert isinstance(open_source(tmp_path / "b.tar"), ZipSource)


def test_a_folder_of_images_may_hold_other_things(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(ONE_IMAGE["a.png"])
    for name in ("manifest.json", "plan.json", "labels.txt", ".hidden.parquet"):
        (tmp_path / name).write_text("{}")
    assert isinstance(open_source(tmp_path), FolderSource)


def test_an_lmdb_in_an_object_store_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = UPath(f"memory://{tmp_path.name}/church_lmdb")
    (path / "data.mdb").write_bytes(b"x")
    with pytest.raises(
        InputError, match=r"is an LMDB in an object store, where it cannot be mapped .*: copy the folder to a"
    ):
        open_source(path)


@pytest.mark.parametrize(
    ("mode", "tool"), [("w:gz", "gunzip -k"), ("w:bz2", "bunzip2 -k"), ("w:xz", "unxz -k")], ids=["gz", "bz2", "xz"]
)
def test_a_compressed_tar_is_refused_and_its_tar_is_read(mode: str, tool: str, tmp_path: Path) -> None:
    packed = write_tar(tmp_path / "faces.tar.packed", ONE_IMAGE, mode)
    with pytest.raises(
        InputError, match=rf"is compressed, .* is no CIFAR-10: decompress it \({tool}\) and give the tar"
    ):
        open_source(packed)
    content = packed.read_bytes()
    decompress = {"w:gz": gzip.decompress, "w:bz2": bz2.decompress, "w:xz": lzma.decompress}[mode]
    (tmp_path / "faces.tar").write_bytes(decompress(content))
    assert read_all(open_source(tmp_path / "faces.tar")) == ONE_IMAGE


def test_a_compressed_file_that_is_no_tar_or_is_cut_is_refused_too(tmp_path: Path) -> None:
    whole = gzip.compress(bytes(10_000))
    for content in (whole, whole[:5], gzip.compress(b"")):
        (tmp_path / "x.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"is compressed, "):
            open_source(tmp_path / "x.gz")


def test_a_split_is_refused_if_the_source_has_none(tmp_path: Path, digits_lmdb: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(ONE_IMAGE["a.png"])
    for path in (digits_lmdb, tmp_path / "images", write_tar(tmp_path / "x.tar", ONE_IMAGE)):
        with pytest.raises(InputError, match=r"--split is 'test', but source .* has no splits: leave it out$"):
            open_source(path, split="test")


def test_facts_are_the_same_for_a_copy_elsewhere(tmp_path: Path) -> None:
    for folder in ("here", "there/deeper"):
        (tmp_path / folder / "faces").mkdir(parents=True)
        (tmp_path / folder / "faces" / "a.png").write_bytes(ONE_IMAGE["a.png"])
        write_tar(tmp_path / folder / "faces.tar", ONE_IMAGE)
    for name in ("faces", "faces.tar"):
        facts = [open_source(tmp_path / folder / name).facts() for folder in ("here", "there/deeper")]
        assert facts[0] == facts[1]
        assert str(tmp_path) not in str(facts)
    before = open_source(tmp_path / "here" / "faces").facts()
    (tmp_path / "here" / "faces" / "a.png").write_bytes(encoded(random_image(0, 9)))
    assert open_source(tmp_path / "here" / "faces").facts() != before


def test_what_is_no_source_is_refused_in_a_sentence(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file").write_text("x")
    no_images = write_lmdb(tmp_path / "texts_lmdb", {"0" * 40: b"hello"})
    nothing = write_lmdb(tmp_path / "nothing_lmdb", {})
    damaged = tmp_path / "damaged_lmdb"
    damaged.mkdir()
    (damaged / "data.mdb").write_bytes(b"this is no database")
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.png").write_text("no picture")
    no_members = tmp_path / "empty.zip"
    zipfile.ZipFile(no_members, "w").close()
    for path, message in [
        (
            tmp_path / "missing",
            "does not exist: give LSUN's LMDB folder or zip, StyleGAN's TFRecords, CIFAR-10's tar.gz, Par",
        ),
        (tmp_path / "file", "is a file of 1 bytes of another kind: give LSUN's"),
        (empty, "holds no images: give LSUN's"),
        (nothing, "holds no images: give LSUN's"),
        (no_members, "holds no images: give LSUN's"),
        (no_images, r"holds no images \(its first value, '0{40}', is 5 bytes that decode as none\): give"),
        (texts, r"holds no images \(its first value, 'a.png', is 10 bytes that decode as none\): give"),
        (damaged, r"cannot be read as an LMDB \(.*\): copy or unpack it again"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            list_items(open_source(path), path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert isinstance(open_source(damaged), LmdbSource)
