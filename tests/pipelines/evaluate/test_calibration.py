"""Known answers of real images through the whole fan-out, against numpy and scipy on the same features."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.linalg import sqrtm

from ddpm_core.errors import InputError
from ddpm_core.features import load_extractor
from ddpm_core.rng import permutation
from pipelines.evaluate.calibration import calibrate, check_calibrated, outcome_path
from pipelines.evaluate.config import CalibrateConfig
from pipelines.evaluate.extractor import describe_extractor
from pipelines.preprocess.config import PreprocessConfig
from pipelines.preprocess.driver import preprocess
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.layout import open_storage

RESNET = "features/cifar10-resnet56.torchscript.pt"
IMAGES = 1000  # of each split


@pytest.fixture(scope="module")
def cifar(ray_session: None, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardedDataset]:
    """The first images of CIFAR-10's splits."""
    folder, sets = tmp_path_factory.mktemp("cifar"), {}
    for split in ("train", "test"):
        (file, *_) = sorted((shared_data / "cifar10").rglob(f"*{split}*.parquet"))
        pq.write_table(pq.read_table(file).slice(0, IMAGES), folder / f"{split}.parquet")
        making = PreprocessConfig(
            source=str(folder / f"{split}.parquet"), output=str(folder / split), image_size=32, images_per_shard=400
        )
        sets[split] = preprocess(making)
    return sets


def second_features(dataset: ShardedDataset, network: Path) -> tuple[np.ndarray, np.ndarray]:
    """(features, logits) float64, all at once in one process."""
    extractor = load_extractor(str(network), (3, 32, 32))
    with torch.no_grad():
        features, logits = extractor(torch.from_numpy(dataset.pixels(range(len(dataset)))).permute(0, 3, 1, 2))
    assert logits is not None
    return features.double().numpy(), logits.double().numpy()


def second_distance(x: np.ndarray, y: np.ndarray) -> float:
    a, b = np.cov(x.T), np.cov(y.T)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real))


@pytest.mark.slow
def test_distances_and_score_of_real_images_are_those_of_numpy_and_scipy(
    cifar: dict[str, ShardedDataset], shared_data: Path, tmp_path: Path
) -> None:
    network = shared_data / RESNET
    config = CalibrateConfig(
        data=str(cifar["train"].path),
        test_data=str(cifar["test"].path),
        extractor=str(network),
        storage=str(tmp_path),
    )
    lines: list[str] = []
    itself, halves, across, score = (check.value for check in calibrate(config, lines.append))
    train, logits = second_features(cifar["train"], network)
    test, _ = second_features(cifar["test"], network)
    order = permutation(0, "reference", 0, IMAGES).numpy()
    # Features are float32, in batches of another size here: seven digits, of which the differences keep five.
    assert itself == pytest.approx(0.0, abs=1e-3)
    assert across == pytest.approx(second_distance(train, test), rel=1e-5)
    assert halves == pytest.approx(second_distance(train[order[: IMAGES // 2]], train[order[IMAGES // 2 :]]), rel=1e-5)
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[order]
    scores = [
        np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()) for part in p.reshape(10, IMAGES // 10, -1)
    ]
    assert score == pytest.approx(np.mean(scores), rel=1e-5)
    assert sum(line.startswith("calibrate: ") for line in lines) == 4
    check_calibrated(describe_extractor(str(network), cifar["train"]), open_storage(str(tmp_path)))


def test_an_extractor_that_failed_is_not_used(digits: ShardedDataset, tmp_path: Path) -> None:
    calibrate(
        CalibrateConfig(data=str(digits.path), test_data=str(digits.path), extractor="pixels", storage=str(tmp_path))
    )
    extractor, storage = describe_extractor("pixels", digits), open_storage(str(tmp_path))
    path = outcome_path(storage, extractor)
    facts = json.loads(path.read_text())
    assert facts["passed"]
    path.write_text(json.dumps({**facts, "passed": False}))
    with pytest.raises(InputError, match="extractor pixels failed its calibration"):
        check_calibrated(extractor, storage)


def test_parts_of_different_data_sets_are_refused(digits: ShardedDataset, cifar: dict[str, ShardedDataset]) -> None:
    with pytest.raises(InputError, match="--data holds images 8x8x1 and --test-data 32x32x3"):
        calibrate(CalibrateConfig(data=str(digits.path), test_data=str(cifar["test"].path), extractor="pixels"))
