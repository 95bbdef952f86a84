"""Feature extractors: what they map to, what they are called, and what they refuse."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor, nn

from ddpm_core.errors import InputError
from ddpm_core.extractors import ExtractorFacts, known_facts
from ddpm_core.features import FeatureExtractor, TorchScriptFeatures, load_extractor
from ddpm_core.inception import InceptionV3
from ddpm_core.inception.weights import WEIGHTS_VARIABLE
from ddpm_core.metrics import FeatureStatistics, FrechetDistance

DATA = Path(__file__).parents[3] / "shared" / "data"
RESNET = DATA / "features" / "cifar10-resnet56.torchscript.pt"
needs_data = pytest.mark.skipif(not RESNET.is_file(), reason="the sample data ../shared/data is absent")


def cifar10(file: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images, uint8 [N, 3, 32, 32], and labels."""
    batch = next(parquet.ParquetFile(DATA / "cifar10" / file).iter_batches(batch_size=count)).to_pydict()
    pixels = [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in batch["img"]]
    return torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(batch["label"])


class Network(nn.Module):
    """uint8 images to what `kind` says, for TorchScript files of every sort."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        flat = x.flatten(1).float()
        if self.kind == "pair":
            return flat, flat[:, :5] * 2
        if self.kind == "integers":
            return x.flatten(1)
        if self.kind == "whole batch":
            return flat.sum(0)
        if self.kind == "not finite":
            return flat / 0
        return flat


def saved(network: nn.Module, example: Tensor, path: Path) -> Path:
    torch.jit.save(torch.jit.trace(network, example), str(path))
    return path


# The tests write TorchScript files; torch deprecates its writer. The package itself silences only its reader.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def test_pixels_are_exact_means_of_equal_cells() -> None:
    extractor = load_extractor("pixels", (3, 32, 16))
    images = torch.randint(0, 256, (5, 3, 32, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features, logits = extractor(images)
    cells = images.numpy().astype(np.float64).reshape(5, 3, 8, 4, 8, 2).mean((3, 5)).reshape(5, -1) / 255
    assert logits is None
    # Means of 8 bytes are exact in float32, so only the division by 255 rounds.
    assert np.array_equal(features.numpy(), cells.astype(np.float32))
    assert (extractor.name, extractor.resize, extractor.dim, extractor.num_logits) == (
        "pixels",
        "area-8",
        192,
        None,
    )
    assert len(extractor.sha256) == 64


@pytest.mark.parametrize("size", [(28, 28), (5, 9), (1, 1)])
def test_pixels_of_other_sizes_keep_their_mean_when_constant(size: tuple[int, int]) -> None:
    features, _ = load_extractor("pixels", (1, *size))(torch.full((2, 1, *size), 51, dtype=torch.uint8))
    assert features.shape == (2, 64)
    torch.testing.assert_close(features, torch.full((2, 64), 0.2))


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_images_that_are_not_uint8_nchw_are_named(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^images must be uint8 \[N, C, H, W\]"):
        load_extractor("pixels", (3, 8, 8))(images)


def test_inception_repeats_grey_and_is_named_by_what_its_weights_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = InceptionV3()
    file = tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(file))
    extractor = load_extractor("inception", (1, 8, 8))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    # These are not the published weights, so the metric over them may not be called FID.
    assert (extractor.name, extractor.sha256) == (f"inception_{digest[:8]}", digest)
    assert (extractor.dim, extractor.num_logits, extractor.resize) == (2048, 1008, "tf1-bilinear-299")
    assert isinstance(extractor, FeatureExtractor)
    grey = torch.randint(0, 256, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features, logits = extractor.to("cpu")(grey)
    expected = network(grey.repeat(1, 3, 1, 1))
    assert logits is not None
    assert torch.equal(features, expected[0])
    assert torch.equal(logits, expected[1])

    monkeypatch.setattr("ddpm_core.extractors.WEIGHTS_SHA256_PREFIX", digest[:8])
    assert load_extractor("inception", (3, 8, 8)).name == "inception-2015-12-05"


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_known_of_an_extractor_without_its_network_is_what_the_network_says(
    channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights.pth"
    torch.save(InceptionV3().state_dict(), file)
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(file))
    assert known_facts("inception", channels) is None  # not the published file: it is loaded, to see whether it fits
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr("ddpm_core.extractors.WEIGHTS_SHA256_PREFIX", digest[:8])
    for spec in ("inception", "pixels"):
        loaded = load_extractor(spec, (channels, 8, 8))
        of_network = (loaded.name, loaded.sha256, loaded.dim, loaded.num_logits, loaded.resize)
        assert known_facts(spec, channels) == ExtractorFacts(*of_network)
        features, logits = loaded(torch.zeros(2, channels, 8, 8, dtype=torch.uint8))
        assert features.shape == (2, loaded.dim)
        assert (None if logits is None else logits.shape[1]) == loaded.num_logits


def test_torchscript_may_return_features_alone_or_with_logits(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (4, 1, 3, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    alone = load_extractor(str(saved(Network("features"), images, tmp_path / "My-Net.v2.pt")), (1, 3, 2))
    assert (alone.name, alone.dim, alone.num_logits, alone.resize) == ("my_net", 6, None, "none")
    assert alone.sha256 == hashlib.sha256((tmp_path / "My-Net.v2.pt").read_bytes()).hexdigest()
    features, logits = alone(images)
    assert torch.equal(features, images.flatten(1).float())
    assert logits is None
    pair = load_extractor(str(saved(Network("pair"), images, tmp_path / "pair.pt")), (1, 3, 2)).to("cpu")
    features, logits = pair(images)
    assert (pair.dim, pair.num_logits) == (6, 5)
    assert logits is not None
    assert torch.equal(logits, 2 * features[:, :5])


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("integers", r"returned uint8 \[2, 4\]"),
        ("whole batch", r"returned float32 \[4\]"),
        ("not finite", "all finite"),
    ],
)
def test_torchscript_with_another_output_is_refused(kind: str, sentence: str, tmp_path: Path) -> None:
    path = saved(Network(kind), torch.ones(2, 1, 2, 2, dtype=torch.uint8), tmp_path / "net.pt")
    with pytest.raises(InputError, match=rf"net\.pt.*{sentence}"):
        load_extractor(str(path), (1, 2, 2))


def test_torchscript_that_does_not_take_the_images_is_refused(tmp_path: Path) -> None:
    convolution = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    path = saved(convolution, torch.zeros(2, 3, 4, 4), tmp_path / "floats.pt")
    with pytest.raises(InputError, match=r"floats\.pt' does not take uint8 images \[2, 3, 4, 4\]") as caught:
        load_extractor(str(path), (3, 4, 4))
    assert "\n" not in str(caught.value)


def test_specs_that_name_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"unknown feature extractor 'resnet': choose 'inception', 'dinov2', 'pixels' or"
    ):
        load_extractor("resnet", (3, 32, 32))
    with pytest.raises(InputError, match=r"none\.pt' is not a file"):
        load_extractor(str(tmp_path / "none.pt"), (3, 32, 32))
    (tmp_path / "bad.pt").write_bytes(b"not an archive")
    with pytest.raises(InputError, match=r"bad\.pt' cannot be read as TorchScript"):
        load_extractor(str(tmp_path / "bad.pt"), (3, 32, 32))
    with pytest.raises(InputError, match="1 or 3 channels, and these have 4"):
        load_extractor("inception", (4, 32, 32))


@pytest.fixture(scope="module")
def resnet() -> TorchScriptFeatures:
    return TorchScriptFeatures(RESNET, (3, 32, 32))


@needs_data
def test_real_classifier_has_its_published_accuracy(resnet: TorchScriptFeatures) -> None:
    assert (resnet.name, resnet.dim, resnet.num_logits) == ("cifar10_resnet56", 64, 10)
    images, labels = cifar10("test-00000-of-00001.parquet", 512)
    correct = 0
    for start in range(0, 512, 128):
        _, logits = resnet(images[start : start + 128])
        assert logits is not None
        correct += int((logits.argmax(1) == labels[start : start + 128]).sum())
    # 93.35 % on all 10,000; of 512 random ones the share has a standard deviation of 1.1 %: three of them.
    assert abs(correct / 512 - 0.9335) < 0.033


@needs_data
def test_distance_of_real_halves_equals_numpy_and_scipy(resnet: TorchScriptFeatures) -> None:
    images, _ = cifar10("train-00000-of-00003.parquet", 256)
    halves = [resnet(images[:128])[0], resnet(images[128:])[0]]
    reference = FeatureStatistics(resnet.dim)
    reference.update(halves[1])
    metric = FrechetDistance(reference)
    for start in range(0, 128, 30):
        metric.update(halves[0][start : start + 30])

    (mu1, s1), (mu2, s2) = ((h.mean(0), np.cov(h.T)) for h in (half.double().numpy() for half in halves))
    root = scipy.linalg.sqrtm(s1 @ s2)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real
    # The limit is scipy's: sqrtm takes the root of a product whose condition number is the square of theirs
    # (4e3 here): 1.6e7 units of rounding are 4e-9.
    assert metric.compute().item() == pytest.approx(expected, rel=1e-8)
    # The same images against themselves: 0 up to the root of float64's precision.
    same = FrechetDistance(reference)
    same.merge_state(reference)
    assert same.compute().item() == pytest.approx(0, abs=1e-6)
