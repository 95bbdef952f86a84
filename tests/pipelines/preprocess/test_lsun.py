"""LSUN's LMDB and its zip, read back against what was written and against the real sample."""

import os
import shutil
import zipfile
from pathlib import Path

import pytest
from support.source_images import bytes_read, decoded, read_all, write_lmdb

from ddpm_core.errors import InputError
from pipelines.preprocess.sources.lsun import DATABASE, LmdbSource
from pipelines.preprocess.sources.open import list_items, open_source


def test_an_lmdb_gives_every_value_under_its_key_in_order(tmp_path: Path) -> None:
    values = {f"{number * 7919 % 1000:040x}": os.urandom(number * 50) for number in range(1, 300)}
    values["0" * 39 + "é"] = b""  # nothing under a key: decoding it says so
    source = open_source(write_lmdb(tmp_path / "tower_val_lmdb", values))
    assert read_all(source) == values
    assert source.name == "tower_val"


def test_the_lsun_sample_decodes_to_its_images(shared_data: Path) -> None:
    path = shared_data / "lsun" / "church_outdoor_sample_lmdb"
    source = open_source(path)
    items = list_items(source, path)
    assert len(items) == 35
    assert all(decoded(value).shape == (256, 256, 3) for value in read_all(source).values())
    assert source.name == "church_outdoor_sample"


def test_listing_an_lmdb_touches_no_value(tmp_path: Path) -> None:
    source = open_source(write_lmdb(tmp_path / "x_lmdb", {f"{n:040d}": os.urandom(1 << 20) for n in range(24)}))

    def forget() -> None:
        """Drop the file from memory, so that what is touched must come from the disk."""
        with (tmp_path / "x_lmdb" / DATABASE).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    forget()
    if bytes_read(lambda: list(source.read(source.items())), "read_bytes") < 24 << 20:
        pytest.skip("temporary files lie in memory here")
    forget()
    assert bytes_read(source.items, "read_bytes") < 1 << 20


def test_a_truncated_lmdb_is_refused_before_touching_it_kills_the_process(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "x_lmdb", {f"{n:040d}": os.urandom(10_000) for n in range(100)})
    whole = (path / DATABASE).stat().st_size
    os.truncate(path / DATABASE, whole // 2)
    source = open_source(path)
    for action in (source.items, lambda: list(source.read([]))):
        with pytest.raises(InputError, match=rf"cannot be read as an LMDB \(data.mdb has {whole // 2:,} bytes of"):
            action()


def official_zip(folder: Path, shared_data: Path) -> Path:
    """The sample, packed as LSUN packs it."""
    sample = shared_data / "lsun" / "church_outdoor_sample_lmdb"
    path = folder / "church_outdoor_train_lmdb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("church_outdoor_train_lmdb/", b"")
        archive.write(sample / DATABASE, "church_outdoor_train_lmdb/data.mdb")
        archive.writestr("church_outdoor_train_lmdb/lock.mdb", bytes(8192))
    return path


def test_lsuns_zip_is_unpacked_once_and_then_read_as_an_lmdb(tmp_path: Path, shared_data: Path) -> None:
    path, scratch = official_zip(tmp_path, shared_data), tmp_path / "scratch"
    lines: list[str] = []
    source = open_source(path, scratch=scratch, say=lines.append)
    target = scratch / "church_outdoor_train_lmdb" / DATABASE
    assert source == LmdbSource(target.parent)
    assert source.name == "church_outdoor_train"
    original = open_source(shared_data / "lsun" / "church_outdoor_sample_lmdb")
    assert read_all(source) == read_all(original)
    assert source.facts() == original.facts()
    assert [entry.name for entry in target.parent.iterdir()] == [DATABASE]
    assert lines[-1].startswith("unpack church_outdoor_train: 536,576 of 536,576 bytes")

    unpacked_at = target.stat().st_mtime_ns
    assert open_source(path, scratch=scratch) == source
    assert target.stat().st_mtime_ns == unpacked_at
    (target.parent / f".{DATABASE}.0.tmp").write_bytes(b"of a killed run")
    damaged = bytearray(target.read_bytes())
    damaged[300_000] ^= 1  # as long as before
    target.write_bytes(damaged)
    assert open_source(path, scratch=scratch) == source
    assert target.read_bytes() == (shared_data / "lsun" / "church_outdoor_sample_lmdb" / DATABASE).read_bytes()
    assert [entry.name for entry in target.parent.iterdir()] == [DATABASE]


def test_lsuns_zip_comes_from_an_object_store_as_well(tmp_path: Path, shared_data: Path, s3_bucket: str) -> None:
    from upath import UPath

    path = official_zip(tmp_path, shared_data)
    remote = UPath(f"{s3_bucket}/{tmp_path.name}/church_outdoor_train_lmdb.zip")
    remote.write_bytes(path.read_bytes())
    source = open_source(remote, scratch=tmp_path / "scratch")
    assert read_all(source) == read_all(open_source(path, scratch=tmp_path / "other"))
    with pytest.raises(InputError, match=r"must be unpacked onto a local disk .*: unpack it there and give the folder"):
        open_source(remote)


def test_no_name_in_a_zip_says_where_the_lmdb_is_written(tmp_path: Path) -> None:
    path = tmp_path / "in" / "outside.zip"
    path.parent.mkdir()
    database = write_lmdb(tmp_path / "x", {"k": b"v"}) / DATABASE
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(database, "../../escaped/data.mdb")
    shutil.rmtree(tmp_path / "x")
    open_source(path, scratch=tmp_path / "scratch")
    files = {entry.relative_to(tmp_path).as_posix() for entry in tmp_path.rglob("*") if entry.is_file()}
    assert files == {"in/outside.zip", "scratch/outside_lmdb/data.mdb"}


def test_a_zip_whose_lmdb_cannot_be_unpacked_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = write_lmdb(tmp_path / "x", {"k": b"v" * 9000}) / DATABASE
    twice, damaged = tmp_path / "twice.zip", tmp_path / "damaged.zip"
    with zipfile.ZipFile(twice, "w") as archive:
        archive.write(database, "a_lmdb/data.mdb")
        archive.write(database, "b_lmdb/data.mdb")
    with pytest.raises(InputError, match=r"holds 2 LMDBs \('a_lmdb/data.mdb', 'b_lmdb/data.mdb', ...\): unpack it"):
        open_source(twice, scratch=tmp_path / "scratch")
    with zipfile.ZipFile(damaged, "w") as archive:
        archive.write(database, "a_lmdb/data.mdb")
    content = bytearray(damaged.read_bytes())
    content[5000] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be unpacked \(Bad CRC-32 for file 'a_lmdb/data.mdb'\)"):
        open_source(damaged, scratch=tmp_path / "scratch")
    assert not any((tmp_path / "scratch").rglob("*.*"))  # nothing that a later run could take for the database
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"has 1,000 bytes free, but the LMDB in .* needs .*: make room"):
        open_source(damaged, scratch=tmp_path / "scratch")
