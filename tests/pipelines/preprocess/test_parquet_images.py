"""Parquet with encoded images: which column, which files, which rows; and the real CIFAR-10 as Hugging Face lays it out."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.source_images import bytes_read, decoded, encoded, random_image, read_all
from upath import UPath

from ddpm_core.errors import InputError
from pipelines.preprocess.sources.open import list_items, open_source
from pipelines.preprocess.sources.parquet_images import ParquetSource

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded_images(first: int, count: int) -> list[bytes]:
    return [encoded(random_image(first + number)) for number in range(count)]


def write(path: Path, values: list[bytes | None], *, column: str = "image", kind: Any = STRUCT, group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": value, "path": "x.png"} for value in values] if pa.types.is_struct(kind) else values
    table = pa.table({"label": pa.array(range(len(values))), column: pa.array(rows, kind)})
    pq.write_table(table, path, row_group_size=group, compression="none", use_dictionary=False)
    return path


@pytest.mark.parametrize("kind", [STRUCT, pa.binary(), pa.large_binary()], ids=str)
def test_a_file_gives_its_rows_whatever_the_columns_type(kind: pa.DataType, tmp_path: Path) -> None:
    values = encoded_images(0, 11)
    source = open_source(write(tmp_path / "faces.parquet", [*values], column="picture", kind=kind))
    assert read_all(source) == {f"faces/{row:08d}": value for row, value in enumerate(values)}
    assert source.name == "faces"


def test_a_row_without_an_image_is_empty_and_costs_no_other(tmp_path: Path) -> None:
    values = [*encoded_images(0, 5), None, b"", *encoded_images(5, 2)]
    read = read_all(open_source(write(tmp_path / "x.parquet", values)))
    assert list(read.values()) == [value or b"" for value in values]


def test_rows_count_through_the_parts_of_a_split(tmp_path: Path) -> None:
    values = encoded_images(0, 30)
    for part, (start, stop) in enumerate([(0, 11), (11, 12), (12, 23)]):
        write(tmp_path / "birds" / f"train-{part:05d}-of-00003.parquet", [*values[start:stop]])
    write(tmp_path / "birds" / "test-00000-of-00001-0123abcd.parquet", [*values[23:]])
    (tmp_path / "birds" / "README.md").write_text("x")
    for split, expected in [(None, values[:23]), ("train", values[:23]), ("test", values[23:])]:
        source = open_source(tmp_path / "birds", split=split)
        group = split or "train"
        assert read_all(source) == {f"{group}/{row:08d}": value for row, value in enumerate(expected)}
        assert source.name == ("birds_test" if split == "test" else "birds")
        assert source.facts()["split"] == group
    with pytest.raises(InputError, match=r"--split is 'val', but source .* has only test, train: give one of these"):
        open_source(tmp_path / "birds", split="val")
    alone = open_source(tmp_path / "birds" / "test-00000-of-00001-0123abcd.parquet")
    assert alone.items() == open_source(tmp_path / "birds", split="test").items()
    middle = open_source(
        tmp_path / "birds" / "train-00001-of-00003.parquet"
    )  # no split: its rows' numbers are not known
    assert [item.key for item in middle.items()] == ["train-00001-of-00003/00000000"]


def test_a_split_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    for part in (0, 2):
        write(tmp_path / f"train-{part:05d}-of-00003.parquet", [*encoded_images(0, 3)])
    with pytest.raises(InputError, match=r"has 2 files of the split 'train', not the numbers 0 to 2 that their names"):
        open_source(tmp_path)


def test_of_several_splits_without_train_one_must_be_chosen(tmp_path: Path) -> None:
    for split in ("test", "validation"):
        write(tmp_path / f"{split}-00000-of-00001.parquet", [*encoded_images(0, 3)])
    with pytest.raises(InputError, match=r"has the splits test, validation: choose one with --split$"):
        open_source(tmp_path)
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    assert open_source(tmp_path).items()[0].key == "validation/00000000"


def test_files_of_any_name_count_their_own_rows(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"{name}.parquet", [*encoded_images(ord(name), 3)])
    values = read_all(open_source(tmp_path))
    assert list(values) == [f"{name}/{row:08d}" for name in "ab" for row in range(3)]
    assert list(values.values()) == encoded_images(ord("a"), 3) + encoded_images(ord("b"), 3)
    with pytest.raises(InputError, match=r"--split is 'train', but source .* has no splits: leave it out$"):
        open_source(tmp_path, split="train")


def test_the_column_is_the_one_called_so_or_the_only_one(tmp_path: Path) -> None:
    binary = pa.array([b"x"], pa.binary())

    def column(*names: str) -> str:
        table = pa.table({"label": pa.array([1]), **dict.fromkeys(names, binary)})
        pq.write_table(table, tmp_path / "x.parquet")
        source = open_source(tmp_path / "x.parquet")
        assert isinstance(source, ParquetSource)
        return source.column

    assert column("thumbnail") == "thumbnail"
    assert column("thumbnail", "img") == "img"
    assert column("img", "image") == "image"
    with pytest.raises(
        InputError, match=r"several columns that may hold images \(mask, thumbnail\): call the right one"
    ):
        column("mask", "thumbnail")
    with pytest.raises(InputError, match=r"has the columns label, none of which holds encoded images"):
        column()
    write(tmp_path / "y.parquet", [b"x"], column="picture")
    column("image")
    with pytest.raises(InputError, match=r"files with different columns of images \(image, picture\): give one of the"):
        open_source(tmp_path)


def test_an_object_store_gives_the_same(tmp_path: Path, s3_bucket: str) -> None:
    remote = UPath(f"{s3_bucket}/{tmp_path.name}/fish")
    for part in range(2):
        path = write(tmp_path / "fish" / f"train-{part:05d}-of-00002.parquet", [*encoded_images(10 * part, 9)])
        (remote / path.name).write_bytes(path.read_bytes())
    near, far = open_source(tmp_path / "fish"), open_source(remote)
    assert list_items(far, remote) == near.items()
    assert read_all(far) == read_all(near)
    assert far.facts() == near.facts()
    assert far.name == "fish"


def test_a_few_rows_cost_their_row_groups_and_their_column(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    values = [noise.bytes(100_000) for _ in range(60)]
    table = pa.table({"image": pa.array(values, pa.binary()), "mask": pa.array(values, pa.binary())})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=5, compression="none", use_dictionary=False)
    source = open_source(tmp_path / "x.parquet")
    assert bytes_read(source.items) < 100_000  # of 12 million
    wanted = [source.items()[row] for row in (12, 14, 33)]
    read: list[Any] = []
    assert bytes_read(lambda: read.extend(source.read(wanted))) < 1_500_000  # two row groups of 500,000 and a footer
    assert [value for _, value in read] == [values[row] for row in (12, 14, 33)]


def test_a_broken_row_group_costs_only_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [*encoded_images(0, 12)], kind=pa.binary())
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(1)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset : chunk.data_page_offset + 8] = b"\xff" * 8
    path.write_bytes(content)
    values = list(read_all(open_source(path)).values())
    assert [isinstance(value, Exception) for value in values] == [False] * 4 + [True] * 4 + [False] * 4
    for row in (0, 3, 8, 11):
        np.testing.assert_array_equal(decoded(values[row]), random_image(row))


def test_a_file_that_was_not_downloaded_to_its_end_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [*encoded_images(0, 12)])
    whole = path.read_bytes()
    for content in (whole[:-50], whole[:300] + whole[-8:], b"PAR1"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot be read as Parquet \(.*\): download it again$"):
            open_source(path)


@pytest.mark.parametrize("shard", ["shard-00000.parquet", "shards/shard-00000.parquet"])
@pytest.mark.parametrize("record", ["plan.json", "manifest.json"])
def test_a_data_set_of_shards_is_no_source(shard: str, record: str, tmp_path: Path) -> None:
    write(tmp_path / shard, [*encoded_images(0, 2)])
    (tmp_path / "contact_sheet.png").write_bytes(encoded_images(0, 1)[0])
    (tmp_path / record).write_text("{}")
    with pytest.raises(
        InputError, match=r"is a data set of shards, made or begun by jobs/preprocess.py: train on it as it is"
    ):
        open_source(tmp_path)


def test_cifar10_of_hugging_face_is_complete(shared_data: Path) -> None:
    path = shared_data / "cifar10"
    for split, count in (("train", 50_000), ("test", 10_000)):
        source = open_source(path, split=split)
        items = list_items(source, path)
        assert [items[0].key, items[-1].key, len(items)] == [f"{split}/00000000", f"{split}/{count - 1:08d}", count]
        assert source.facts()["column"] == "img"
    source = open_source(path)
    items = source.items()
    wanted = [items[row] for row in (16_999, 17_000, 40_000)]  # across files, against the rows read one by one
    files = [pq.read_table(path / f"train-{part:05d}-of-00003.parquet", columns=["img"]) for part in range(3)]
    rows = pa.concat_tables(files).column("img")
    assert [value for _, value in source.read(wanted)] == [
        rows[row].as_py()["bytes"] for row in (16_999, 17_000, 40_000)
    ]
    assert decoded(next(source.read(wanted))[1]).shape == (32, 32, 3)
