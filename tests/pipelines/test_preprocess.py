"""Ray Data makes shards whose bytes depend on the source alone, and goes on where it was stopped."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_core.commit import sha256_file
from ddpm_core.errors import InputError
from pipelines.preprocess import PreprocessConfig, preprocess, transform
from pipelines.shards import ShardedDataset

pytestmark = pytest.mark.usefixtures("ray_session")


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind)
    return file.getvalue()


def test_the_centre_is_cropped_and_resized_as_pillow_does_it_in_two_steps() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    config = PreprocessConfig(source="", output="", image_size=8)
    cropped = Image.fromarray(pixels[:, 12:52])
    expected = np.asarray(cropped.resize((8, 8), Image.Resampling.LANCZOS))
    assert (transform(encoded(Image.fromarray(pixels)), config) == expected).all()


def test_a_grey_image_becomes_one_channel_and_a_palette_three() -> None:
    image = Image.new("P", (8, 8))
    image.putpalette([10, 200, 30] * 256)
    config = PreprocessConfig(source="", output="", image_size=8)
    assert (transform(encoded(image), config) == [10, 200, 30]).all()
    assert transform(encoded(image), replace(config, channels=1)).shape == (8, 8, 1)


def test_the_digits_survive_the_way_through_the_lmdb(digits: ShardedDataset, digits_lmdb: Path) -> None:
    from sklearn.datasets import load_digits

    from pipelines.demo import digit_key

    keys = [key for number in range(5) for key in digits.keys(number)]
    place = {key: index for index, key in enumerate(keys)}
    original = load_digits().images
    ours = digits.pixels([place[digit_key(number)] for number in range(len(original))])[..., 0]
    correlation = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(original, ours, strict=True)]
    # The even ones with little margin are the same 8x8 picture; a crop at the wrong place would correlate below 0.5.
    assert np.min(correlation) > 0.95


def test_the_manifest_counts_and_measures_every_image(digits: ShardedDataset) -> None:
    manifest = digits.manifest
    pixels = digits.pixels(range(len(digits))) / 127.5 - 1
    assert manifest["images"] == 1797
    assert [shard["images"] for shard in manifest["shards"]] == [400, 400, 400, 400, 197]
    assert manifest["mean"] == pytest.approx([pixels.mean()], rel=1e-12)
    assert manifest["std"] == pytest.approx([pixels.std()], rel=1e-12)
    assert manifest["second_moment"] == pytest.approx((pixels**2).mean(), rel=1e-12)
    assert manifest["skipped"] == []
    digits.verify()


def test_missing_shards_are_made_again_with_the_same_bytes(
    digits: ShardedDataset, digits_lmdb: Path, tmp_path: Path
) -> None:
    output = tmp_path / "again"
    shutil.copytree(digits.path, output)
    (output / "manifest.json").unlink()
    for name in ("shard-00001.parquet", "shard-00003.json"):
        (output / name).unlink()
    (output / ".shard-00001.parquet.deadbeef.tmp").write_bytes(b"left by a killed worker")
    untouched = (output / "shard-00002.parquet").stat().st_mtime_ns
    config = PreprocessConfig(
        source=str(digits_lmdb), output=str(output), image_size=8, channels=1, images_per_shard=400
    )
    lines: list[str] = []
    again = preprocess(config, lines.append)
    assert lines[-1].startswith("preprocess: 800 of 800 images")
    assert again.manifest["files"] == digits.manifest["files"]
    assert (output / "shard-00002.parquet").stat().st_mtime_ns == untouched
    assert not list(output.glob(".*"))
    lines.clear()
    assert preprocess(config, lines.append).sha256 == digits.sha256  # finished: nothing to do, nothing said
    assert lines == []


def test_a_folder_with_another_data_set_is_left_alone(digits: ShardedDataset, digits_lmdb: Path) -> None:
    before = sha256_file(digits.path / "manifest.json")
    with pytest.raises(InputError, match="holds another data set"):
        preprocess(PreprocessConfig(source=str(digits_lmdb), output=str(digits.path), image_size=16, channels=1))
    assert sha256_file(digits.path / "manifest.json") == before


def folder_with_broken(tmp_path: Path, good: int, broken: int) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    whole = encoded(Image.effect_noise((32, 32), 50).convert("RGB"), "JPEG")
    for number in range(good):
        (source / f"a{number:03d}.jpg").write_bytes(whole)
    for number in range(broken):
        (source / f"b{number:03d}.jpg").write_bytes(whole[: len(whole) // 2])
    return source


def test_a_truncated_image_is_skipped_and_named_in_the_manifest(tmp_path: Path) -> None:
    source = folder_with_broken(tmp_path, 30, 1)
    config = PreprocessConfig(source=str(source), output=str(tmp_path / "out"), image_size=8, max_skipped=0.1)
    dataset = preprocess(config)
    assert len(dataset) == 30
    (skipped,) = dataset.manifest["skipped"]
    assert skipped["key"] == "b000.jpg"
    assert "truncated" in skipped["reason"].lower()


def test_too_many_broken_images_stop_the_run_before_a_manifest_is_written(tmp_path: Path) -> None:
    source = folder_with_broken(tmp_path, 30, 10)
    config = PreprocessConfig(source=str(source), output=str(tmp_path / "out"), image_size=8, max_skipped=0.1)
    with pytest.raises(InputError, match=r"10 broken images among 40, first 'b000\.jpg'"):
        preprocess(config)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_lsun_sample_becomes_shards(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "lsun" / "church_outdoor_sample_lmdb"
    dataset = preprocess(PreprocessConfig(source=str(source), output=str(tmp_path / "church"), image_size=64))
    assert (len(dataset), dataset.shape, dataset.name) == (35, (64, 64, 3), "church_outdoor_sample")
    # Churches are photographed against the sky: brighter above than below.
    images = dataset.images(range(35))
    assert images[:, :, :16].mean() > images[:, :, -16:].mean() + 0.2
    assert Image.open(dataset.path / "contact_sheet.png").size == (8 * 64, 5 * 64)
    assert json.loads((dataset.path / "manifest.json").read_text())["filter"] == "lanczos"
