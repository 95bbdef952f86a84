"""Folders, zips and tars of images: the same keys and bytes whichever it is, and broken ones cost only themselves."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import s3fs
from PIL import Image
from support.source_images import bytes_read, decoded, encoded, random_image, read_all, write_tar
from upath import UPath

from ddpm_core.errors import InputError
from pipelines.preprocess.sources.image_files import FolderSource, TarSource, ZipSource
from pipelines.preprocess.sources.open import list_items, open_source

KINDS = {
    "b/2.PNG": "PNG",
    "a/1.jpg": "JPEG",
    "c.webp": "WEBP",
    "a/d/e [1].JPEG": "JPEG",
    "é#?.tiff": "TIFF",
    "z.bmp": "BMP",
}
FILES = {name: encoded(random_image(number), kind) for number, (name, kind) in enumerate(KINDS.items())}
OTHER_FILES = {"notes.txt": b"x", ".a.png": b"x", "a/.hidden/b.png": b"x", "__MACOSX/a/._1.jpg": b"x", "png": b"x"}


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a/", b"")
        for name, content in files.items():
            archive.writestr(name, content)
    return path


WRITERS: dict[str, tuple[Callable[[Path, dict[str, bytes]], Path], type]] = {
    "images": (write_folder, FolderSource),
    "images.zip": (write_zip, ZipSource),
    "images.tar": (write_tar, TarSource),
}


@pytest.mark.parametrize("name", WRITERS)
def test_images_are_recognised_by_suffix_and_read_as_written(name: str, tmp_path: Path) -> None:
    write, kind = WRITERS[name]
    source = open_source(write(tmp_path / name, FILES | OTHER_FILES))
    assert isinstance(source, kind)
    assert source.name == "images"
    assert read_all(source) == FILES


@pytest.mark.parametrize("name", WRITERS)
def test_an_object_store_gives_the_same_as_the_disk(name: str, tmp_path: Path, s3_bucket: str) -> None:
    files = FILES | OTHER_FILES | {f"many/{number:03d}.png": encoded(random_image(number)) for number in range(50)}
    local = WRITERS[name][0](tmp_path / name, files)
    remote = UPath(f"{s3_bucket}/{tmp_path.name}/{name}")
    s3fs.S3FileSystem().put(str(local), f"{s3_bucket}/{tmp_path.name}/", recursive=True)
    near, far = open_source(local), open_source(remote)
    assert list_items(far, remote) == near.items()
    assert read_all(far) == read_all(near)
    assert far.facts() == near.facts()
    assert far.name == near.name


def test_formats_decode_to_the_pixels_that_were_saved(tmp_path: Path) -> None:
    lossless = ("b/2.PNG", "é#?.tiff", "z.bmp")
    values = read_all(open_source(write_zip(tmp_path / "x.zip", FILES)))
    for number, name in enumerate(KINDS):
        if name in lossless:
            np.testing.assert_array_equal(decoded(values[name]), random_image(number))


def test_the_celebahq_sample_reads_as_unzip_writes_it(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "celebahq" / "celebahq-512-sample.zip"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "faces")
    source = open_source(path)
    assert source.name == "celebahq-512-sample"
    assert len(list_items(source, path)) == 200
    assert read_all(source) == read_all(open_source(tmp_path / "faces"))
    assert decoded(next(source.read(source.items()[7:8]))[1]).shape == (512, 512, 3)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_of_tar_is_read(format: int, tmp_path: Path) -> None:
    files = {f"{'long' * 12}/{'folder' * 10}/{number}.png": os.urandom(number * 300) for number in range(1, 20)}
    assert read_all(open_source(write_tar(tmp_path / "x.tar", files, format=format))) == files


@pytest.mark.parametrize(("name", "most"), [("x.zip", 200_000), ("x.tar", 2_000_000)])
def test_listing_an_archive_reads_no_image(name: str, most: int, tmp_path: Path) -> None:
    write = write_zip if name == "x.zip" else write_tar
    source = open_source(write(tmp_path / name, {f"{number}.png": os.urandom(400_000) for number in range(60)}))
    assert bytes_read(source.items) < most  # of 24 million
    assert bytes_read(lambda: list(source.read(source.items()[30:31]))) < most + 800_000  # nor the others


def test_links_and_devices_in_a_tar_are_no_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number, kind in enumerate(
            [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
        ):
            member = tarfile.TarInfo(f"{number}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        member = tarfile.TarInfo("real.png")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"value"))
    assert read_all(open_source(tmp_path / "x.tar")) == {"real.png": b"value"}


@pytest.mark.parametrize("name", ["in/x.zip", "in/x.tar"])
def test_names_that_lead_out_of_the_archive_are_keys_and_nothing_else(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    outside = tmp_path / "absolute.png"
    files = {"../up.png": b"1", "../../../up.png": b"2", str(outside): b"3", "a/../../b.png": b"4"}
    write = write_zip if name.endswith("zip") else write_tar
    assert read_all(open_source(write(tmp_path / name, files), scratch=tmp_path / "scratch")) == files
    assert [entry.relative_to(tmp_path).as_posix() for entry in tmp_path.rglob("*") if entry.is_file()] == [name]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_members_of_one_name_the_last_counts_as_when_unpacked(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar, zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for content in (b"first", b"second"):
            archive.writestr("a.png", content)
            member = tarfile.TarInfo("a.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for name in ("x.tar", "x.zip"):
        assert read_all(open_source(tmp_path / name)) == {"a.png": b"second"}


def test_a_broken_member_of_a_zip_costs_only_itself(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {f"{number}.png": encoded(random_image(number, 32)) for number in range(7)})
    with zipfile.ZipFile(path) as archive:
        start = {member.filename: member.header_offset for member in archive.infolist()}
    content = bytearray(path.read_bytes())
    content[start["0.png"] + 6] |= 1  # encrypted, says the header
    content[content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1) + 8] |= (
        1  # and the second entry of the contents
    )
    content[start["2.png"]] ^= 0xFF  # no header
    content[start["3.png"] + 30 + len("3.png")] = 0b111  # a kind of deflated block that does not exist
    content[start["5.png"] + 1500] ^= 0xFF  # a pixel
    path.write_bytes(content)
    values = read_all(open_source(path))
    broken = {key: f"{type(value).__name__}: {value}" for key, value in values.items() if isinstance(value, Exception)}
    assert broken == {
        "0.png": "RuntimeError: File '0.png' is encrypted, password required for extraction",
        "2.png": "BadZipFile: Bad magic number for file header",
        "3.png": "error: Error -3 while decompressing data: invalid block type",
        "5.png": "BadZipFile: Bad CRC-32 for file '5.png'",
    }
    for number in (1, 4, 6):
        np.testing.assert_array_equal(decoded(values[f"{number}.png"]), random_image(number, 32))
    assert len(list_items(open_source(path), path)) == 7  # the broken first value does not stand for the others


def test_a_file_that_is_gone_costs_only_itself(tmp_path: Path, s3_bucket: str) -> None:
    local = write_folder(tmp_path / "x", FILES)
    s3fs.S3FileSystem().put(str(local), f"{s3_bucket}/{tmp_path.name}/", recursive=True)
    remote = UPath(f"{s3_bucket}/{tmp_path.name}/x")
    for path in (local, remote):
        source = open_source(path)
        items = source.items()
        (path / "b/2.PNG").unlink()
        values = dict(source.read(items))
        assert isinstance(values.pop("b/2.PNG"), FileNotFoundError)
        assert values == {name: content for name, content in FILES.items() if name != "b/2.PNG"}


def test_a_disk_that_fails_is_no_broken_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write_folder(tmp_path / "x", FILES))

    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        list(source.read(source.items()))


def test_links_to_images_are_followed_and_a_gif_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "out.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.gif").symlink_to(tmp_path / "out.gif")
    (tmp_path / "x" / "loop").symlink_to(tmp_path / "x")
    (tmp_path / "x" / "nowhere.png").symlink_to(tmp_path / "nothing")
    values = read_all(open_source(tmp_path / "x"))
    assert list(values) == ["a.gif"]
    np.testing.assert_array_equal(decoded(values["a.gif"])[0, 0], [255, 0, 0])


def damaged_tars(whole: bytes) -> dict[str, bytes]:
    # Two members of 1,500 bytes: a header of 512 and three blocks each, then the end.
    broken = bytearray(whole)
    broken[2048 + 100] ^= 0xFF
    return {"cut in a file": whole[:1000], "cut in a header": whole[: 2048 + 100], "broken header": bytes(broken)}


@pytest.mark.parametrize("damage", ["cut in a file", "cut in a header", "broken header"])
def test_a_damaged_tar_is_refused_and_not_taken_for_a_shorter_one(damage: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.png": bytes(1500), "b.png": bytes(1500)}, format=tarfile.USTAR_FORMAT)
    path.write_bytes(damaged_tars(path.read_bytes())[damage])
    with pytest.raises(InputError, match=r"is a damaged tar \(.*\): download or make it again$"):
        open_source(path).items()


def test_a_zip_that_was_not_downloaded_to_its_end_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", FILES)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cannot be read as a zip \(File is not a zip file\): download it again$"):
        open_source(path)
