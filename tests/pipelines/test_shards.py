"""The shard format, and which image belongs to which training step."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray.data
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_core.errors import InputError
from pipelines.shards import ShardedDataset, global_batch, rank_slice, write_shard


def test_a_shard_is_read_by_plain_pyarrow_and_says_how_to_reach_minus_one_to_one(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    write_shard(tmp_path / "a.parquet", list("abcde"), pixels, (4, 6, 3))
    table = pq.read_table(tmp_path / "a.parquet")
    facts = json.loads(table.schema.metadata[b"ddpm"])
    raw = np.frombuffer(b"".join(table.column("image").to_pylist()), np.uint8).reshape(-1, *facts["shape"])
    assert (raw == pixels).all()
    scaled = raw / facts["divide_by"] + facts["then_add"]
    assert scaled.min() >= -1
    assert scaled.max() <= 1
    assert table.column("key").to_pylist() == list("abcde")


def test_the_bytes_of_a_shard_depend_on_its_content_alone(tmp_path: Path) -> None:
    pixels = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8, 1)
    for name in ("a", "b"):
        write_shard(tmp_path / name, ["x", "y"], pixels.copy(), (8, 8, 1))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_images_come_back_by_index_in_any_order_and_across_shards(digits: ShardedDataset) -> None:
    everything = digits.pixels(range(len(digits)))
    wanted = [1796, 0, 400, 399, 400, 1199, 1200]
    assert (digits.pixels(wanted) == everything[wanted]).all()
    images = digits.images(wanted)
    assert images.shape == (7, 1, 8, 8)
    assert images.dtype == torch.float32
    assert torch.equal(images, torch.from_numpy(everything[wanted]).permute(0, 3, 1, 2) / 127.5 - 1)


@pytest.mark.parametrize("indices", [[-1], [1797], [0, 5000]])
def test_an_index_beyond_the_data_is_refused(digits: ShardedDataset, indices: list[int]) -> None:
    with pytest.raises(IndexError, match=r"must lie in 0\.\.1796"):
        digits.pixels(indices)


def test_ray_data_reads_the_shards_too(digits: ShardedDataset) -> None:
    files = [str(digits.path / shard["file"]) for shard in digits.manifest["shards"]]
    rows: list[dict[str, Any]] = ray.data.read_parquet(files).take_all()
    assert sorted(row["key"] for row in rows) == [key for number in range(5) for key in digits.keys(number)]
    assert {len(row["image"]) for row in rows} == {64}


def test_verify_finds_a_flipped_bit(digits: ShardedDataset, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(digits.path, copy)
    ShardedDataset.open(copy).verify()
    victim = copy / "shard-00002.parquet"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(InputError, match=r"shard-00002\.parquet"):
        ShardedDataset.open(copy).verify()


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


@given(st.integers(1, 60), st.integers(0, 5), st.integers(1, 25))
def test_an_epoch_visits_every_image_once_whatever_the_batch_size(images: int, seed: int, batch: int) -> None:
    steps = -(-2 * images // batch)
    stream = np.concatenate([global_batch(images, seed, step, batch) for step in range(steps)])
    first, second = stream[:images], stream[images : 2 * images]
    assert sorted(first) == list(range(images))
    assert sorted(second) == list(range(images))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(global_batch(50, seed, step, 50)) for seed in range(3) for step in range(3)}
    assert len(orders) == 9


@given(st.integers(1, 100), st.integers(1, 12))
def test_the_workers_shares_are_the_whole_batch_in_order(batch: int, workers: int) -> None:
    shares = [list(range(batch))[rank_slice(batch, rank, workers)] for rank in range(workers)]
    assert [index for share in shares for index in share] == list(range(batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
