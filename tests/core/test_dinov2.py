"""DINOv2 as an extractor: the network against torch's own transformer, the file by its sha256, and what images go through."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.dinov2_weights import SMALL, published_shapes, take_for_published, write_weights
from torch import Tensor, nn

from ddpm_core import dinov2
from ddpm_core.dinov2 import WEIGHTS_VARIABLE, DinoV2, Size, load_dinov2, prepared
from ddpm_core.errors import InputError
from ddpm_core.features import FeatureExtractor, load_extractor


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small network in the published layout."""
    return write_weights(tmp_path_factory.mktemp("dinov2") / "model.safetensors")


@pytest.fixture
def known(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as if it were the published file."""
    take_for_published(file, monkeypatch)
    return file


def pictures(count: int, *size: int, channels: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, *size), generator=g, dtype=torch.uint8)


def test_the_network_has_the_tensors_and_bytes_of_the_published_file() -> None:
    """439 tensors; 1,217,522,888 bytes are theirs and a header's."""
    with torch.device("meta"):
        own = DinoV2().state_dict()
    shapes = published_shapes(Size())
    assert len(shapes) == 439
    assert {dinov2.own_name(name): shape for name, shape in shapes.items() if "mask_token" not in name} == {
        name: tuple(tensor.shape) for name, tensor in own.items()
    }
    header = 1_217_522_888 - 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    assert 40 * 439 < header < 200 * 439


def test_the_network_equals_torchs_own_transformer(file: Path) -> None:
    """Its layers before which x is normalised; the scales of the branches, which it lacks, go into their last weights."""
    network, weights = load_dinov2(file, SMALL), load_file(file)
    w = SMALL.width
    peer = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(
            w, w // 64, 4 * w, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        ),
        SMALL.depth,
        norm=nn.LayerNorm(w, eps=1e-6),
        enable_nested_tensor=False,
    ).eval()
    state = {"norm.weight": weights["layernorm.weight"], "norm.bias": weights["layernorm.bias"]}
    for number in range(SMALL.depth):
        theirs, ours = f"layers.{number}", f"encoder.layer.{number}"
        for part in ("weight", "bias"):
            parts = [weights[f"{ours}.attention.attention.{name}.{part}"] for name in ("query", "key", "value")]
            state[f"{theirs}.self_attn.in_proj_{part}"] = torch.cat(parts)
            scales = [weights[f"{ours}.layer_scale{branch}.lambda1"] for branch in (1, 2)]
            one, two = (scale[:, None] if part == "weight" else scale for scale in scales)
            state[f"{theirs}.self_attn.out_proj.{part}"] = one * weights[f"{ours}.attention.output.dense.{part}"]
            state[f"{theirs}.linear1.{part}"] = weights[f"{ours}.mlp.fc1.{part}"]
            state[f"{theirs}.linear2.{part}"] = two * weights[f"{ours}.mlp.fc2.{part}"]
            for norm in ("norm1", "norm2"):
                state[f"{theirs}.{norm}.{part}"] = weights[f"{ours}.{norm}.{part}"]
    peer.load_state_dict(state)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    kernel, bias = (weights[f"embeddings.patch_embeddings.projection.{part}"] for part in ("weight", "bias"))
    # A patch of 14 x 14 pixels times the kernel, without a convolution.
    patches = x.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    tokens = torch.cat([weights["embeddings.cls_token"].expand(2, 1, w), patches @ kernel.flatten(1).T + bias], 1)
    with torch.no_grad():
        expected = peer(tokens + network._positions())[:, 0]
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def cubic(distance: float, a: float) -> float:
    """Keys' kernel."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def test_positions_are_read_where_the_authors_scale_of_16_1_says(file: Path) -> None:
    """Patch i of 16 reads the trained grid at (i + 1/2) grid / 16.1 - 1/2, the edge repeated."""
    network, grid = load_dinov2(file, SMALL), SMALL.grid
    rows = np.zeros((16, grid))
    for i in range(16):
        place = (i + 0.5) * grid / 16.1 - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            rows[i, min(max(j, 0), grid - 1)] += cubic(place - j, -0.75)
    trained = network.positions[0, 1:].unflatten(0, (grid, grid)).double().numpy()
    expected = np.einsum("ia,jb,abw->ijw", rows, rows, trained)
    np.testing.assert_allclose(network._positions()[0, 1:].unflatten(0, (16, 16)).numpy(), expected, atol=1e-5)
    assert torch.equal(network._positions()[:, 0], network.positions[:, 0])


def averaging(old: int, new: int) -> np.ndarray:
    """The weights of `old` pixels in each of `new`: the kernel, as wide as the scale if they get fewer, over those there are."""
    scale = old / new
    places, pixels = (np.arange(new) + 0.5) * scale, np.arange(old) + 0.5
    weights = np.array([[cubic((pixel - place) / max(scale, 1.0), -0.5) for pixel in pixels] for place in places])
    return np.asarray(weights / weights.sum(1, keepdims=True))


@pytest.mark.parametrize("size", [32, 37, 224, 256])
def test_images_are_resized_by_an_averaging_bicubic_and_normalised(size: int) -> None:
    """Across, then down, with 8 bits between. Pillow's weights have 22 bits, so that a half may be rounded either way: by one
    level across, times at most 1.3, the sum of weights without their signs, and by one level down."""
    images = pictures(2, size, size)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    resized = ((prepared(images) * std + mean) * 255).double().numpy()
    np.testing.assert_allclose(resized, resized.round(), atol=1e-3)
    across = np.einsum("xw,nchw->nchx", averaging(size, 224), images.double().numpy()).clip(0, 255).round()
    wanted = np.einsum("yh,nchx->ncyx", averaging(size, 224), across).clip(0, 255).round()
    difference = np.abs(resized.round() - wanted)
    assert difference.max() <= 2
    assert difference.mean() < 1e-3


def test_the_extractor_says_what_it_is_and_has_no_classes(known: Path) -> None:
    extractor = load_extractor("dinov2", (1, 8, 8))
    assert isinstance(extractor, FeatureExtractor)
    assert (extractor.name, extractor.sha256) == ("dinov2-vitl14", hashlib.sha256(known.read_bytes()).hexdigest())
    assert (extractor.dim, extractor.num_logits, extractor.resize) == (128, None, "pil-bicubic-224")
    grey = pictures(3, 8, 8, channels=1)
    features, logits = extractor.to("cpu")(grey)
    assert (features.shape, features.dtype, logits) == ((3, 128), torch.float32, None)
    torch.testing.assert_close(
        features, load_dinov2(known, SMALL)(prepared(grey.repeat(1, 3, 1, 1))), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="images must be uint8"):
        extractor(grey.float())
    with pytest.raises(InputError, match="'dinov2' takes images of 1 or 3 channels, and these have 4"):
        load_extractor("dinov2", (4, 8, 8))


def test_building_the_network_draws_nothing_from_the_global_generator(file: Path) -> None:
    torch.manual_seed(3)
    load_dinov2(file, SMALL)
    drawn = torch.rand(())
    torch.manual_seed(3)
    assert torch.rand(()) == drawn


def test_weights_are_found_by_the_variable_or_in_the_hubs_cache(
    known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dinov2.find_dinov2_weights() == known
    monkeypatch.delenv(WEIGHTS_VARIABLE)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        InputError, match=r"weights are not in the cache '.*hub': fetch https://huggingface.co/facebook/dino"
    ):
        load_extractor("dinov2", (3, 8, 8))
    cached = tmp_path / "hub" / "models--facebook--dinov2-large" / "snapshots" / ("0" * 40) / "model.safetensors"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(known)
    assert dinov2.find_dinov2_weights() == cached
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"weights are not a file '.*none': fetch"):
        load_extractor("dinov2", (3, 8, 8))


def test_any_other_file_is_refused_by_its_sha256(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(file))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(InputError, match=f"have a sha256 that begins {digest[:8]}, not 399fba97: fetch"):
        load_extractor("dinov2", (3, 8, 8))


def test_a_file_of_something_else_is_named_with_what_differs(file: Path, tmp_path: Path) -> None:
    weights, path = load_file(file), tmp_path / "other.safetensors"
    other = {
        "half": {name: tensor.half() for name, tensor in weights.items()},
        "fewer": {name: tensor for name, tensor in weights.items() if name != "layernorm.bias"},
        "more": {**weights, "head.weight": torch.zeros(2)},
    }
    first = {"half": "blocks.0.fc1.bias", "fewer": "norm.bias", "more": "head.weight"}
    for kind, tensors in other.items():
        save_file(tensors, path)
        with pytest.raises(
            InputError, match=rf"not those of ViT-L/14 in the layout .*\(first: '{first[kind]}'\); fetch"
        ):
            load_dinov2(path, SMALL)
    path.write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"other\.safetensors' cannot be read as safetensors"):
        load_dinov2(path, SMALL)
