"""Where images come from, and what is said where there are none."""

import pickle
from pathlib import Path

import lmdb
import pytest
from PIL import Image

from ddpm_core.errors import InputError
from pipelines.sources import list_keys, open_source


def test_an_lsun_lmdb_lists_its_keys_in_order_and_reads_them(digits_lmdb: Path) -> None:
    source = pickle.loads(pickle.dumps(open_source(digits_lmdb)))  # it travels to workers
    keys = list_keys(source, digits_lmdb)
    assert len(keys) == 1797
    assert keys == sorted(keys)
    assert all(len(key) == 40 for key in keys)
    read = dict(source.read(keys[5:8]))
    assert list(read) == keys[5:8]
    assert all(value[8:12] == b"WEBP" for value in read.values())
    assert source.name == "digits_train"


def test_the_lsun_sample_is_read(shared_data: Path) -> None:
    path = shared_data / "lsun" / "church_outdoor_sample_lmdb"
    source = open_source(path)
    assert len(list_keys(source, path)) == 35
    assert source.name == "church_outdoor_sample"


def test_a_folder_is_searched_through_in_order(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/1.jpg", "c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 7), "red").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    source = open_source(tmp_path)
    keys = list_keys(source, tmp_path)
    assert keys == ["a/1.jpg", "b/2.png", "c.webp"]
    assert [key for key, _ in source.read(keys)] == keys


def test_what_is_no_source_is_refused_in_a_sentence(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "file"
    file.write_text("x")
    no_images = tmp_path / "texts_lmdb"
    with lmdb.open(str(no_images)) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"0" * 40, b"hello")
    nothing = tmp_path / "nothing_lmdb"
    lmdb.open(str(nothing)).close()
    damaged = tmp_path / "damaged_lmdb"
    damaged.mkdir()
    (damaged / "data.mdb").write_bytes(b"this is no database")
    for path, said in [
        (tmp_path / "missing", "does not exist"),
        (file, "is a file"),
        (empty, "holds no images"),
        (nothing, "holds no images"),
        (no_images, "decode as none"),
        (damaged, "cannot be read as an LMDB"),
    ]:
        with pytest.raises(InputError, match=said) as caught:
            list_keys(open_source(path), path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
