"""Ray Data makes shards whose bytes depend on the source alone, and goes on where it was stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.processes import ROOT
from support.source_images import encoded, random_image, write_lmdb

from ddpm_core.commit import sha256_file
from ddpm_core.errors import InputError
from pipelines.preprocess.card import describe_dataset
from pipelines.preprocess.config import PreprocessConfig
from pipelines.preprocess.driver import preprocess
from pipelines.runtime.progress import ProgressLine
from pipelines.shards.dataset import ShardedDataset

pytestmark = pytest.mark.usefixtures("ray_session")


def small(source: Path, output: Path, **changes: Any) -> PreprocessConfig:
    values: dict[str, Any] = {"image_size": 16, "images_per_shard": 8, "max_skipped": 0.5}
    return PreprocessConfig(source=str(source), output=str(output), **{**values, **changes})


def contents(folder: Path) -> dict[str, str]:
    """The files of a data set by their sha256, without the records of how it was made."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.parent.name != "records"]
    return {file.relative_to(folder).as_posix(): sha256_file(file) for file in files}


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """Thirty images in an LMDB, of which four are broken, two too small, and three repeat others across shards."""
    values = {f"{number:040x}": encoded(random_image(number, 40, 50)) for number in range(30)}
    whole = encoded(random_image(99, 40, 50), "JPEG")
    values[f"{3:040x}"] = b""
    values[f"{9:040x}"] = whole[: len(whole) // 2]
    values[f"{10:040x}"] = b"\x00" * 100
    values[f"{11:040x}"] = b"RIFF\x10\x00\x00\x00WEBPVP8 "
    values[f"{12:040x}"] = encoded(random_image(12, 15, 90))
    values[f"{29:040x}"] = encoded(random_image(29, 90, 15))
    values[f"{7:040x}"] = values[f"{5:040x}"]  # within a shard
    values[f"{20:040x}"] = values[f"{5:040x}"]  # in another
    values[f"{28:040x}"] = encoded(
        Image.fromarray(random_image(1, 40, 50)).convert("RGBA")
    )  # other bytes, the same pixels
    return write_lmdb(tmp_path / "messy_lmdb", values)


def skipped_numbers(entries: list[dict[str, str]], kind: str) -> list[int]:
    return [int(entry["key"], 16) for entry in entries if entry["kind"] == kind]


def test_the_digits_survive_the_way_through_the_lmdb(digits: ShardedDataset) -> None:
    from sklearn.datasets import load_digits

    from pipelines.demo.digits import digit_key

    keys = [key for number in range(5) for key in digits.keys(number)]
    position = {key: index for index, key in enumerate(keys)}
    original = load_digits().images
    shards = digits.pixels([position[digit_key(number)] for number in range(len(original))])[..., 0]
    correlation = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(original, shards, strict=True)]
    # The even ones with little margin are the same 8x8 picture; a crop at the wrong place would correlate below 0.5.
    assert np.min(correlation) > 0.95


def test_the_manifest_counts_and_measures_every_image(digits: ShardedDataset) -> None:
    manifest = digits.manifest
    pixels = digits.pixels(range(len(digits))) / 127.5 - 1
    assert manifest["images"] == manifest["source_images"] == 1797
    assert [shard["images"] for shard in manifest["shards"]] == [400, 400, 400, 400, 197]
    assert manifest["mean"] == pytest.approx([pixels.mean()], rel=1e-12)
    assert manifest["std"] == pytest.approx([pixels.std()], rel=1e-12)
    assert manifest["second_moment"] == pytest.approx((pixels**2).mean(), rel=1e-12)
    assert manifest["skipped"] == []
    digits.verify()


def test_some_of_the_images_are_the_first_by_key_or_drawn_with_a_seed(
    digits: ShardedDataset, digits_lmdb: Path, tmp_path: Path
) -> None:
    config = PreprocessConfig(
        source=str(digits_lmdb), output=str(tmp_path / "first"), image_size=8, channels=1, images=500
    )
    all_keys = [key for number in range(5) for key in digits.keys(number)]

    def made(**choice: Any) -> tuple[list[str], ShardedDataset]:
        dataset = preprocess(replace(config, **choice))
        return list(dataset.keys(0)), dataset

    first, dataset = made()
    assert first == all_keys[:500]
    assert np.array_equal(dataset.pixels(range(500)), digits.pixels(range(500)))
    assert (dataset.manifest["images"], dataset.manifest["source_images"]) == (500, 1797)
    assert "500 of 1,797 in the source: 500 were asked for, the first by key" in describe_dataset(dataset)
    drawn, dataset = made(images_seed=0, output=str(tmp_path / "drawn"))
    numbers = [all_keys.index(key) for key in drawn]
    assert numbers == sorted(set(numbers))
    assert np.array_equal(dataset.pixels(range(500)), digits.pixels(numbers))
    # A uniform choice: the mean of 500 of 0..1796 has a standard error of 20, and none of five fifths is left out.
    assert abs(np.mean(numbers) - 898) < 80
    assert min(Counter(number // 360 for number in numbers).values()) > 60
    fewer, _ = made(images=100, images_seed=0, output=str(tmp_path / "fewer"))
    assert set(fewer) < set(drawn)
    other, _ = made(images_seed=1, output=str(tmp_path / "other"))
    assert len(set(other) & set(drawn)) < 250
    with pytest.raises(InputError, match="holds another data set"):
        made(images_seed=1)
    with pytest.raises(InputError, match=r"is 1,798: source [^,]+ holds 1,797, so give at most that"):
        made(images=1798, output=str(tmp_path / "too-many"))
    with pytest.raises(InputError, match="--images-seed chooses among the images"):
        replace(config, images=None, images_seed=1)


def test_missing_shards_are_made_again_with_the_same_bytes(
    digits: ShardedDataset, digits_lmdb: Path, tmp_path: Path
) -> None:
    output = tmp_path / "again"
    shutil.copytree(str(digits.path), output)
    (output / "manifest.json").unlink()
    for name in ("shards/shard-00001.parquet", "records/shard-00003.json"):
        (output / name).unlink()
    (output / "shards" / ".shard-00001.parquet.deadbeef.tmp").write_bytes(b"left by a killed worker")
    untouched = (output / "shards" / "shard-00002.parquet").stat().st_mtime_ns
    config = PreprocessConfig(
        source=str(digits_lmdb), output=str(output), image_size=8, channels=1, images_per_shard=400
    )
    lines: list[str] = []
    again = preprocess(config, lines.append)
    assert lines[-1].startswith("preprocess: 1,797 of 1,797 images")
    assert contents(output) == contents(Path(str(digits.path))) | {"plan.json": sha256_file(output / "plan.json")}
    assert again.manifest["files"] == digits.manifest["files"]
    assert (output / "shards" / "shard-00002.parquet").stat().st_mtime_ns == untouched
    lines.clear()
    assert preprocess(config, lines.append).sha256 == digits.sha256  # finished: nothing to do, nothing said
    assert lines == []


def test_a_folder_with_another_data_set_is_left_alone(
    digits: ShardedDataset, digits_lmdb: Path, tmp_path: Path
) -> None:
    before = sha256_file(digits.path / "manifest.json")
    with pytest.raises(InputError, match="holds another data set"):
        preprocess(PreprocessConfig(source=str(digits_lmdb), output=str(digits.path), image_size=16, channels=1))
    assert sha256_file(digits.path / "manifest.json") == before
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="a folder with other files in it"):
        preprocess(PreprocessConfig(source=str(digits_lmdb), output=str(tmp_path), image_size=8))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_broken_and_small_images_are_left_out_and_listed_with_a_reason(messy: Path, tmp_path: Path) -> None:
    dataset = preprocess(small(messy, tmp_path / "out"))
    skipped = dataset.manifest["skipped"]
    assert skipped_numbers(skipped, "undecodable") == [3, 9, 10, 11]
    assert skipped_numbers(skipped, "too small") == [12, 29]
    assert skipped_numbers(skipped, "duplicate") == []
    reasons = {int(entry["key"], 16): entry["reason"] for entry in skipped}
    assert reasons[3] == "ValueError: 0 bytes"
    assert "truncated" in reasons[9]
    assert reasons[12] == "90x15 pixels, smaller than 16"
    kept = [int(key, 16) for shard in range(4) for key in dataset.keys(shard)]
    assert kept == [number for number in range(30) if number not in reasons]
    dataset.verify()


def test_duplicates_are_left_out_wherever_the_first_one_lies(messy: Path, tmp_path: Path) -> None:
    once = preprocess(small(messy, tmp_path / "once", duplicates="skip"))
    assert skipped_numbers(once.manifest["skipped"], "duplicate") == [7, 20, 28]
    reasons = {int(entry["key"], 16): entry["reason"] for entry in once.manifest["skipped"]}
    assert reasons[20] == f"same pixels as '{5:040x}'"
    pixels = once.pixels(range(len(once)))
    assert len({image.tobytes() for image in pixels}) == len(once) == 21
    once.verify()
    # The same bytes as from a source that never held them.
    with lmdb.open(str(messy), readonly=True, lock=False) as environment, environment.begin() as transaction:
        values = {bytes(key).decode(): bytes(value) for key, value in transaction.cursor()}
    clean = {key: value for key, value in values.items() if int(key, 16) not in (7, 20, 28)}
    other = preprocess(small(write_lmdb(tmp_path / "clean_lmdb", clean), tmp_path / "clean", duplicates="skip"))
    assert (other.pixels(range(21)) == pixels).all()
    with pytest.raises(InputError, match=r"holds 3 images twice, first '0+7', which has the pixels of '0+5'"):
        preprocess(small(messy, tmp_path / "strict", duplicates="fail"))
    assert not (tmp_path / "strict" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"undecodable": "fail"}, r"holds the image '0+3' \(ValueError: 0 bytes\), and --undecodable is 'fail'"),
        ({"too_small": "fail"}, r"holds the image '0+c' \(90x15 pixels, smaller than 16\), and --too-small is 'fail'"),
        (
            {"max_skipped": 0.1},
            r"has [456] broken or too small images among 30, first '0+3' .* more than --max-skipped 0.1",
        ),
    ],
)
def test_a_broken_policy_stops_the_run_before_a_manifest(
    messy: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        preprocess(small(messy, tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "manifest.json").exists()
    # With another policy the run goes on from the shards that were made.
    lines: list[str] = []
    assert len(preprocess(small(messy, tmp_path / "out"), lines.append)) == 24


def test_small_images_are_enlarged_when_asked(messy: Path, tmp_path: Path) -> None:
    dataset = preprocess(small(messy, tmp_path / "out", too_small="enlarge"))
    assert len(dataset) == 26
    with pytest.raises(InputError, match="holds another data set"):
        preprocess(small(messy, tmp_path / "out"))


def test_scaled_values_are_the_same_images(messy: Path, tmp_path: Path) -> None:
    eight_bits = preprocess(small(messy, tmp_path / "a"))
    scaled = preprocess(small(messy, tmp_path / "b", storage="float32"))
    assert scaled.sha256 == eight_bits.sha256
    assert (scaled.pixels(range(24)) == eight_bits.pixels(range(24))).all()
    table = pq.read_table(tmp_path / "b" / "shards")  # as any other tool sees it
    values = table.column("image").combine_chunks().to_numpy_ndarray()
    assert (values == eight_bits.pixels(range(24)).astype(np.float32) / np.float32(127.5) - 1).all()
    scaled.verify()


def test_the_whole_folder_is_a_table_to_plain_pyarrow(digits: ShardedDataset) -> None:
    table = pq.read_table(digits.path / "shards")
    keys = table.column("key").to_pylist()
    assert keys == sorted(keys)
    assert len(keys) == 1797


def test_a_bucket_holds_the_same_bytes_as_a_folder(messy: Path, s3_bucket: str, tmp_path: Path) -> None:
    local = preprocess(small(messy, tmp_path / "out", duplicates="skip"))
    url = f"{s3_bucket}/{tmp_path.name}"
    config = replace(small(messy, tmp_path, duplicates="skip"), output=url)
    remote = preprocess(config)
    assert remote.manifest["files"] == local.manifest["files"]
    assert (remote.pixels(range(21)) == local.pixels(range(21))).all()
    remote.verify()
    lines: list[str] = []
    assert preprocess(config, lines.append).sha256 == local.sha256
    assert lines == []
    (remote.path / "manifest.json").unlink()
    (remote.path / "shards" / "shard-00002.parquet").unlink()
    assert preprocess(config, lines.append).manifest == remote.manifest
    # The missing shard alone, and again without the duplicate in it that the other shards give away.
    done = [line.split(" images")[0] for line in lines if isinstance(line, ProgressLine) and line.standing.final]
    assert done == ["preprocess: 30 of 30", "preprocess: 8 of 8"]


KILLED = """
import sys
from pipelines.preprocess.card import describe_dataset
from pipelines.preprocess.config import PreprocessConfig
from pipelines.preprocess.driver import preprocess
preprocess(PreprocessConfig(source=sys.argv[1], output=sys.argv[2], image_size=8, channels=1, images_per_shard=50))
"""


def test_killed_workers_and_a_killed_driver_change_nothing(digits_lmdb: Path, tmp_path: Path) -> None:
    config = PreprocessConfig(
        source=str(digits_lmdb), output=str(tmp_path / "whole"), image_size=8, channels=1, images_per_shard=50
    )
    whole = preprocess(config)
    output = tmp_path / "killed"
    environment = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(digits_lmdb), str(output)], env=environment, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(output.glob("shards/shard-*"))) < 3:
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not (output / "manifest.json").exists()

    stop = threading.Event()
    kills: list[int] = []

    def killer() -> Iterator[None]:
        while not stop.wait(0.3):
            workers = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::Map")]
            if workers and len(kills) < 3:
                workers[0].kill()
                kills.append(workers[0].pid)
            yield

    thread = threading.Thread(target=lambda: list(killer()))
    thread.start()
    try:
        resumed = preprocess(replace(config, output=str(output)))
    finally:
        stop.set()
        thread.join()
    assert kills
    assert resumed.manifest["files"] == whole.manifest["files"]
    assert contents(output).keys() == contents(tmp_path / "whole").keys()  # and no half file is left
    resumed.verify()


def test_a_full_disk_ends_in_a_sentence_and_the_run_resumes_after_it(messy: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        config = small(messy, disk / "out", image_size=32, too_small="enlarge")
        with pytest.raises(
            InputError, match=r"could not be made \(.*No space left on device.*\): fix that and run the same"
        ):
            preprocess(config)
        assert not (disk / "out" / "manifest.json").exists()
        assert not list((disk / "out" / "shards").glob(".*"))  # nothing half-written takes up the space
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        preprocess(config).verify()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)  # lazily: files of it may be open still


def test_the_lsun_sample_becomes_shards(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "lsun" / "church_outdoor_sample_lmdb"
    dataset = preprocess(PreprocessConfig(source=str(source), output=str(tmp_path / "church"), image_size=64))
    assert (len(dataset), dataset.shape, dataset.name) == (35, (64, 64, 3), "church_outdoor_sample")
    # Churches are photographed against the sky: brighter above than below.
    images = dataset.images(range(35))
    assert images[:, :, :16].mean() > images[:, :, -16:].mean() + 0.2
    assert Image.open(str(dataset.path / "contact_sheet.png")).size == (8 * 64, 5 * 64)
    assert json.loads((dataset.path / "manifest.json").read_text())["filter"] == "lanczos"


def test_celebahq_becomes_shards_from_its_zip(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "celebahq" / "celebahq-512-sample.zip"
    dataset = preprocess(PreprocessConfig(source=str(source), output=str(tmp_path / "faces"), image_size=64))
    assert (len(dataset), dataset.shape, dataset.manifest["skipped"]) == (200, (64, 64, 3), [])
    assert Image.open(str(dataset.path / "contact_sheet.png")).size == (8 * 64, 8 * 64)
    # Aligned faces: the mean image is nearly symmetric.
    mean = dataset.images(range(200)).mean(0)
    assert (mean - mean.flip(2)).abs().mean() < 0.1


def test_cifar10_is_the_published_one(shared_data: Path, tmp_path: Path) -> None:
    """Its channel means and standard deviations are known (for pixels in 0..1); here of the 10,000 test images."""
    config = PreprocessConfig(
        source=str(shared_data / "cifar10"), split="test", output=str(tmp_path / "out"), image_size=32
    )
    dataset = preprocess(config)
    assert (len(dataset), dataset.shape, dataset.manifest["skipped"]) == (10_000, (32, 32, 3), [])
    mean = (np.array(dataset.manifest["mean"]) + 1) / 2
    std = np.array(dataset.manifest["std"]) / 2
    assert mean == pytest.approx([0.4942, 0.4851, 0.4504], abs=5e-4)
    assert std == pytest.approx([0.2467, 0.2429, 0.2616], abs=5e-4)


def lsun_zip(path: Path, content: bytes) -> Path:
    """A zip whose only member is called as an LMDB is."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("church_lmdb/data.mdb", content)
    return path


def no_images(folder: Path) -> Path:
    folder.mkdir()
    for number in range(100):  # more than are looked at before any work
        (folder / f"{number:03d}.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" if number in (0, 1) else b"\x89PNG\r\n\x1a\nIHDR"
        )
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a zip of 400 MB of zeros": (
        lambda folder: lsun_zip(folder / "bomb.zip", bytes(400 << 20)),
        r"bytes that would be unpacked to 419,430,400, which no LMDB of images would: look at the zip",
    ),
    "a zip of no LMDB": (
        lambda folder: lsun_zip(folder / "other.zip", b"text" * 9),
        "which is no LMDB: give LSUN's zip",
    ),
    "a zip of an LMDB without images": (
        lambda folder: lsun_zip(
            folder / "texts.zip", (write_lmdb(folder / "x_lmdb", {"k": b"text"}) / "data.mdb").read_bytes()
        ),
        "holds no images",
    ),
    "a folder without images": (lambda folder: no_images(folder / "broken"), "holds no images"),
    "nothing": (lambda folder: folder / "absent", "does not exist"),
}


@pytest.mark.parametrize("source", REFUSED)
def test_a_refused_source_leaves_nothing(tmp_path: Path, source: str) -> None:
    make, sentence = REFUSED[source]
    given, output = make(tmp_path), tmp_path / "a" / "output"
    with pytest.raises(InputError, match=sentence):
        preprocess(PreprocessConfig(source=str(given), output=str(output), image_size=8))
    assert not (tmp_path / "a").exists()


def test_a_source_of_small_images_alone_leaves_nothing(ray_session: None, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for number in range(3):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "source" / f"{number}.png")
    with pytest.raises(InputError, match="3 broken or too small images among 3"):
        preprocess(
            PreprocessConfig(
                source=str(tmp_path / "source"), output=str(tmp_path / "output"), image_size=8, max_skipped=1.0
            )
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
