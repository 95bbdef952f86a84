"""The shard format, and reading images from local files and from an object store, whole or damaged."""

import hashlib
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.synthetic_shards import random_pixels, write_dataset

from ddpm_core.errors import InputError
from pipelines.shards import reader
from pipelines.shards.dataset import ShardedDataset
from pipelines.shards.format import PixelStorage, ShardWriter, pixel_offsets
from pipelines.shards.reader import GroupCache
from pipelines.storage.locations import Location, location

SHAPE = (128, 128, 3)  # 341 images a row group
STORAGES: tuple[PixelStorage, ...] = ("uint8", "float32")


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    return random_pixels(800, SHAPE)


@pytest.fixture(scope="session", params=STORAGES)
def dataset(request: pytest.FixtureRequest, pixels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Row groups of 341, 59; none; 341, 57; 2 images."""
    return write_dataset(tmp_path_factory.mktemp("data") / "set", pixels, [400, 0, 398, 2], request.param)


def write_shard(path: Path, pixels: np.ndarray, storage: PixelStorage = "uint8") -> None:
    with ShardWriter(path, pixels.shape[1:], storage) as writer:
        for number, image in enumerate(pixels):
            assert writer.append(f"{number:03d}", image) == hashlib.sha256(image.tobytes()).digest()


def test_plain_pyarrow_reads_a_shard_and_the_map_to_minus_one_to_one(tmp_path: Path) -> None:
    pixels = random_pixels(5, (4, 6, 3))
    write_shard(tmp_path / "a.parquet", pixels)
    table = pq.read_table(tmp_path / "a.parquet")
    facts = json.loads(table.schema.metadata[b"ddpm"])
    assert (facts["layout"], facts["storage"]) == ("HWC", "uint8")
    raw = np.frombuffer(b"".join(table.column("image").to_pylist()), np.uint8).reshape(-1, *facts["shape"])
    assert (raw == pixels).all()
    scaled = raw / facts["divide_by"] + facts["then_add"]
    assert scaled.min() >= -1
    assert scaled.max() <= 1
    assert table.column("key").to_pylist() == ["000", "001", "002", "003", "004"]
    assert table.column("sha256").to_pylist() == [hashlib.sha256(image.tobytes()).digest() for image in pixels]


def test_float32_shards_hold_all_256_values_exactly_at_a_byte_each(tmp_path: Path) -> None:
    every = np.random.default_rng(0).permuted(np.tile(np.arange(256, dtype=np.uint8), (64, 16)), axis=1)
    every = every.reshape(64, 32, 32, 4)
    write_shard(tmp_path / "a.parquet", every, "float32")
    column = pq.read_table(tmp_path / "a.parquet").column("image")
    assert column.type == pa.fixed_shape_tensor(pa.float32(), [32, 32, 4])
    values = column.chunk(0).to_numpy_ndarray()
    assert values.dtype == np.float32
    assert (values == every.astype(np.float32) / np.float32(127.5) - np.float32(1)).all()
    assert np.unique(values).size == 256
    assert (tmp_path / "a.parquet").stat().st_size < 1.1 * every.nbytes
    assert (write_dataset(tmp_path / "set", every, [64], "float32").pixels(range(64)) == every).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(1, 4000), st.integers(0, 9))
def test_the_bytes_of_an_image_lie_where_the_footer_says(rows: int, width: int, seed: int) -> None:
    """Group boundaries, and sizes at which the header's numbers get another byte, among them."""
    pixels = random_pixels(rows, (1, width, 1), seed)
    sink = pa.BufferOutputStream()
    with ShardWriter(sink, (1, width, 1)) as writer:
        for number, image in enumerate(pixels):
            writer.append(f"{number:03d}", image)
    content = sink.getvalue().to_pybytes()
    offsets = pixel_offsets(pq.read_metadata(pa.BufferReader(content)), (1, width, 1))
    assert offsets is not None
    assert len(offsets) == 1
    assert content[offsets[0] :][: pixels.nbytes] == pixels.tobytes()


def test_row_groups_hold_16_mib_or_1024_images_and_at_least_one(tmp_path: Path) -> None:
    for shape, count, rows in [
        ((32, 32, 3), 2500, [1024, 1024, 452]),
        ((256, 256, 3), 90, [85, 5]),
        ((4096, 4096, 3), 2, [1, 1]),
    ]:
        images = np.zeros((count, *shape), np.uint8)
        images[-1] = 7
        write_shard(tmp_path / "a", images)
        metadata = pq.read_metadata(tmp_path / "a")
        assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == rows
        offsets = pixel_offsets(metadata, shape)
        assert offsets is not None
        content = (tmp_path / "a").read_bytes()
        assert content[offsets[-1] :][: images[0].size * rows[-1]] == images[count - rows[-1] :].tobytes()


REWRITTEN: list[dict[str, Any]] = [
    {"compression": "zstd"},
    {"use_dictionary": True},
    {"data_page_size": 100_000, "write_batch_size": 1},
    {"data_page_size": 1 << 24, "max_rows_per_page": 340},  # two pages, with the least overhead that two can have
    {"column_encoding": {"image": "BYTE_STREAM_SPLIT"}},
]


@pytest.mark.parametrize("options", REWRITTEN, ids=lambda options: next(iter(options)))
def test_a_shard_rewritten_in_another_encoding_is_still_read(
    pixels: np.ndarray, tmp_path: Path, options: dict[str, Any]
) -> None:
    dataset = write_dataset(tmp_path / "set", pixels[:400], [400])
    file = tmp_path / "set" / "shard-00000.parquet"
    metadata = pq.read_metadata(file)
    assert pixel_offsets(metadata, SHAPE) is not None
    table = pq.read_table(file)
    pq.write_table(table, file, **{"compression": "none", "use_dictionary": False, "row_group_size": 341, **options})
    assert pixel_offsets(pq.read_metadata(file), SHAPE) is None
    indices = [399, 0, 341, 340]
    assert (dataset.pixels(indices) == pixels[indices]).all()


@pytest.mark.parametrize("storage", STORAGES)
def test_the_bytes_of_a_shard_depend_on_its_content_alone(tmp_path: Path, storage: PixelStorage) -> None:
    pixels = random_pixels(1030, (4, 4, 1))
    write_shard(tmp_path / "a", pixels, storage)
    write_shard(tmp_path / "b", np.asfortranarray(pixels), storage)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_wrong_image_is_not_written(tmp_path: Path) -> None:
    with (
        ShardWriter(tmp_path / "a", (4, 4, 1)) as writer,
        pytest.raises(ValueError, match=r"'k' is float32 \[4, 4, 1\]"),
    ):
        writer.append("k", np.zeros((4, 4, 1), np.float32))


@pytest.mark.slow
def test_ray_data_reads_the_shards_too(digits: ShardedDataset, tmp_path: Path) -> None:
    files = [str(digits.path / shard["file"]) for shard in digits.manifest["shards"]]
    rows: list[dict[str, Any]] = ray.data.read_parquet(files).take_all()
    assert sorted(row["key"] for row in rows) == [key for number in range(5) for key in digits.keys(number)]
    assert {len(row["image"]) for row in rows} == {64}
    pixels = random_pixels(6, (4, 5, 3))
    write_shard(tmp_path / "tensor.parquet", pixels, "float32")
    rows = ray.data.read_parquet(str(tmp_path / "tensor.parquet")).take_all()
    for row in rows:
        value = pixels[int(row["key"])].astype(np.float32) / np.float32(127.5) - np.float32(1)
        assert np.array_equal(np.asarray(row["image"]).reshape(4, 5, 3), value)


def test_images_come_back_by_index_in_any_order_and_across_shards(dataset: ShardedDataset, pixels: np.ndarray) -> None:
    indices = [799, 0, 340, 341, 399, 400, 741, 740, 797, 798, 400]
    assert (dataset.pixels(indices) == pixels[indices]).all()
    images = dataset.images(indices)
    assert images.shape == (11, 3, 128, 128)
    assert images.dtype == torch.float32
    assert torch.equal(images, torch.from_numpy(pixels[indices]).permute(0, 3, 1, 2) / 127.5 - 1)
    assert dataset.pixels([]).shape == (0, *SHAPE)
    assert [list(dataset.shard_range(shard)) for shard in (1, 3)] == [[], [798, 799]]
    assert dataset.keys(3) == ["0000000798", "0000000799"]


@pytest.mark.parametrize("indices", [[-1], [800], [0, 5000]])
def test_an_index_beyond_the_data_is_refused(dataset: ShardedDataset, indices: list[int]) -> None:
    with pytest.raises(IndexError, match=r"must lie in 0\.\.799"):
        dataset.pixels(indices)


def test_a_data_set_in_use_is_pickled_as_its_path_and_manifest(dataset: ShardedDataset) -> None:
    dataset.pixels([5])
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy == dataset
    assert (copy.pixels([5]) == dataset.pixels([5])).all()
    assert len(pickle.dumps(dataset)) < 3000


def test_threads_read_what_one_reads_however_few_files_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN_FILES", 2)
    pixels = random_pixels(300, (8, 8, 1))
    dataset = write_dataset(tmp_path / "set", pixels, [30] * 10)
    batches = np.random.default_rng(0).integers(0, 300, (200, 40))
    open_before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        for batch, read in zip(batches, pool.map(dataset.pixels, batches), strict=True):
            assert (read == pixels[batch]).all()
    assert len(os.listdir("/proc/self/fd")) <= open_before + 2


def test_threads_read_a_row_group_once_and_drop_it_beyond_the_limit() -> None:
    reads: list[int] = []
    started = threading.Barrier(2)

    def read(group: int) -> np.ndarray:
        reads.append(group)
        started.wait(timeout=10)  # two threads read at the same time, or this breaks
        return np.full(100, group, np.uint8)

    cache = GroupCache(200, read)

    def visit(groups: list[int]) -> list[tuple[int, int]]:
        return sorted((group, int(pixels[0])) for group, pixels in cache.visit(groups))

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(visit, [0, 1]) for _ in range(2)]
        assert [future.result() for future in both] == [[(0, 0), (1, 1)]] * 2
        assert sorted(reads) == [0, 1]
        assert visit([1, 0, 1]) == [(0, 0), (1, 1), (1, 1)]
        assert sorted(reads) == [0, 1]
        both = [pool.submit(visit, [group]) for group in (2, 1)]  # 1 is there; 2 waits for the next
        both.append(pool.submit(visit, [3]))
        assert [future.result() for future in both] == [[(2, 2)], [(1, 1)], [(3, 3)]]
        assert sorted(reads) == [0, 1, 2, 3]
        both = [pool.submit(visit, [group]) for group in (0, 4)]  # 0 had made room
        assert [future.result() for future in both] == [[(0, 0)], [(4, 4)]]
    assert sorted(reads) == [0, 0, 1, 2, 3, 4]


def test_a_failed_read_raises_in_all_threads_and_is_tried_again() -> None:
    attempts: list[int] = []

    def read(group: int) -> np.ndarray:
        attempts.append(group)
        if len(attempts) == 1:
            raise OSError("gone")
        return np.zeros(1, np.uint8)

    cache = GroupCache(10, read)
    with pytest.raises(OSError, match="gone"):
        list(cache.visit([4]))
    assert [group for group, _ in cache.visit([4])] == [4]


@pytest.mark.parametrize("storage", STORAGES)
def test_an_object_store_is_read_by_row_groups_once_each(
    pixels: np.ndarray, s3_bucket: str, tmp_path: Path, storage: PixelStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = location(f"{s3_bucket}/{tmp_path.name}", option="--shards")
    dataset = write_dataset(path, pixels[:500], [400, 100], storage)
    assert ShardedDataset.open(f"{s3_bucket}/{tmp_path.name}") == dataset
    groups: list[int] = []
    cache = dataset._reader._cache
    inner = cache._read

    def read(group: int) -> np.ndarray:
        groups.append(group)
        return inner(group)

    monkeypatch.setattr(cache, "_read", read)
    for indices in ([0, 499, 340, 341], [399, 400, 7]):
        assert (dataset.pixels(indices) == pixels[indices]).all()
    assert sorted(groups) == [0, 1, 2]
    assert dataset.keys(1) == [f"{index:010d}" for index in range(400, 500)]
    dataset.verify()
    (path / "shard-00001.parquet").unlink()
    dataset = ShardedDataset.open(path)
    with pytest.raises(InputError, match=r"damaged file 'shard-00001\.parquet' "):
        dataset.pixels([450])


def test_verify_counts_the_images_and_finds_the_real_data_whole(
    dataset: ShardedDataset, digits: ShardedDataset
) -> None:
    seen: list[int] = []
    dataset.verify(seen.append)
    assert seen == [341, 400, 741, 798, 800]
    digits.verify()
    assert dict(ShardedDataset.digests(dataset.path / "shard-00003.parquet")).keys() == {"0000000798", "0000000799"}


@pytest.fixture
def small(tmp_path: Path) -> ShardedDataset:
    return write_dataset(tmp_path / "small", random_pixels(1500, (8, 8, 1)), [1100, 400])


def rewrite(small: ShardedDataset, shard: int, change: Callable[[pa.Table], pa.Table]) -> dict[str, Any]:
    """A manifest for a shard that is changed and rewritten, with the right size and sha256 of its file."""
    file = small.path / small.manifest["shards"][shard]["file"]
    with file.open("rb") as source:
        table = change(pq.read_table(source))
    pq.write_table(table, str(file), row_group_size=1024, use_dictionary=False)
    content = file.read_bytes()
    manifest: dict[str, Any] = json.loads(json.dumps(small.manifest))
    manifest["files"][file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return manifest


def test_verify_finds_a_flipped_bit(small: ShardedDataset) -> None:
    small.verify()
    victim = small.path / "shard-00001.parquet"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"damaged file 'shard-00001\.parquet' \(sha256 differs\)"):
        ShardedDataset.open(small.path).verify()


def swapped(column: str) -> Callable[[pa.Table], pa.Table]:
    """Rows 3 and 4 exchange their values of one column."""

    def change(table: pa.Table) -> pa.Table:
        values = table.column(column).to_pylist()
        values[3], values[4] = values[4], values[3]
        field = table.schema.field(column)
        return table.set_column(table.schema.get_field_index(column), field, pa.array(values, field.type))

    return change


def swapped_both(table: pa.Table) -> pa.Table:
    return swapped("sha256")(swapped("image")(table))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped("key"), r"\(key '0000000003' comes after '0000000004'\)"),
        (swapped("image"), r"\(image '0000000003' differs from its sha256\)"),
        (swapped("sha256"), r"\(image '0000000003' differs from its sha256\)"),
        (swapped_both, r"\(its content differs from content_sha256 in the manifest\)"),
        (lambda table: table.slice(1), r"\(its row groups hold \[1024, 75\] images instead of \[1024, 76\]\)"),
        (lambda table: table.drop_columns("image"), r"\(it has columns \['key', 'sha256'\] among "),
    ],
    ids=["keys", "images", "digests", "pairs", "count", "column"],
)
def test_verify_finds_what_the_files_hashes_do_not_show(
    small: ShardedDataset, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    manifest = rewrite(small, 0, change)
    with pytest.raises(InputError, match=r"damaged file 'shard-00000\.parquet' " + message):
        ShardedDataset(small.path, manifest).verify()


def test_verify_finds_keys_that_do_not_ascend_from_shard_to_shard(small: ShardedDataset) -> None:
    manifest = {**small.manifest, "shards": small.manifest["shards"][::-1]}
    with pytest.raises(InputError, match=r"shard-00000\.parquet' \(key '0000000000' comes after '0000001499'\)"):
        ShardedDataset(small.path, manifest).verify()


@pytest.mark.parametrize("change", [{"images": 1501}, {"sha256": "0" * 64}])
def test_verify_finds_a_wrong_total(small: ShardedDataset, change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="that its manifest promises: make it again"):
        ShardedDataset(small.path, {**small.manifest, **change}).verify()


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def overwrite(file: Path) -> None:
    file.write_bytes(b"x" * file.stat().st_size)


@pytest.mark.parametrize("damage", [Path.unlink, empty, cut, overwrite])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_damaged_file_is_named_in_a_sentence(
    tmp_path: Path, storage: PixelStorage, damage: Callable[[Path], None]
) -> None:
    dataset = write_dataset(tmp_path / "set", random_pixels(20, (8, 8, 3)), [10, 10], storage)
    damage(tmp_path / "set" / "shard-00001.parquet")
    dataset.pixels([3])
    with pytest.raises(InputError, match=r"damaged file 'shard-00001\.parquet' .*: make it again") as caught:
        dataset.pixels([3, 15])
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_named_in_a_sentence(small: ShardedDataset) -> None:
    small.pixels([1200])
    file = Path(str(small.path)) / "shard-00001.parquet"
    with file.open("r+b") as opened:
        opened.truncate(1000)
    with pytest.raises(InputError, match=r"damaged file 'shard-00001\.parquet' \(it ends early\)"):
        small.pixels([1200])


def test_images_of_another_size_than_the_manifests_are_refused(small: ShardedDataset) -> None:
    with pytest.raises(
        InputError, match=r"damaged file 'shard-00000\.parquet' \(its images are fixed_size_binary\[64\]\)"
    ):
        ShardedDataset(small.path, {**small.manifest, "shape": [8, 4, 1]}).pixels([0])


@pytest.mark.parametrize("wrong", ["missing", "empty", "checkpoint"])
def test_a_folder_that_is_no_data_set_is_refused_in_a_sentence(tmp_path: Path, wrong: str) -> None:
    folder = tmp_path / "x"
    if wrong != "missing":
        folder.mkdir()
    if wrong == "checkpoint":
        (folder / "manifest.json").write_text('{"step": 3}')
    with pytest.raises(InputError, match=str(folder)) as caught:
        ShardedDataset.open(folder)
    assert "\n" not in str(caught.value)


def test_the_first_format_is_refused_with_what_to_do(small: ShardedDataset, tmp_path: Path) -> None:
    old: Location = tmp_path / "old"
    shutil.copytree(str(small.path), str(old))
    (tmp_path / "old" / "manifest.json").write_text(json.dumps({**small.manifest, "format": 1}))
    with pytest.raises(InputError, match=r"is of format 1, not 2: make it again with jobs/preprocess\.py"):
        ShardedDataset.open(old)
