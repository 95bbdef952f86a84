"""The FID network against a second implementation written from its table, and the ways to its weights."""

import io
import pickle
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_core.errors import InputError
from ddpm_core.inception import InceptionV3, blocks
from ddpm_core.inception.network import load_inception, tf1_resize_bilinear
from ddpm_core.inception.weights import WEIGHTS_NAME, WEIGHTS_VARIABLE, find_inception_weights

# The network as a table, independent of the code: a branch is a chain of (name, outputs, kernel h, kernel w,
# stride); "avg", "max" and "max/2" are pools. Inputs of a branch's first convolution are the block's.
Chain = list[tuple[str, int, int, int, int] | str]


def block_a(pool: int) -> list[Chain]:
    return [
        [("branch1x1", 64, 1, 1, 1)],
        [("branch5x5_1", 48, 1, 1, 1), ("branch5x5_2", 64, 5, 5, 1)],
        [("branch3x3dbl_1", 64, 1, 1, 1), ("branch3x3dbl_2", 96, 3, 3, 1), ("branch3x3dbl_3", 96, 3, 3, 1)],
        ["avg", ("branch_pool", pool, 1, 1, 1)],
    ]


def block_c(width: int) -> list[Chain]:
    return [
        [("branch1x1", 192, 1, 1, 1)],
        [("branch7x7_1", width, 1, 1, 1), ("branch7x7_2", width, 1, 7, 1), ("branch7x7_3", 192, 7, 1, 1)],
        [
            ("branch7x7dbl_1", width, 1, 1, 1),
            ("branch7x7dbl_2", width, 7, 1, 1),
            ("branch7x7dbl_3", width, 1, 7, 1),
            ("branch7x7dbl_4", width, 7, 1, 1),
            ("branch7x7dbl_5", 192, 1, 7, 1),
        ],
        ["avg", ("branch_pool", 192, 1, 1, 1)],
    ]


def block_e(pool: str) -> list[Chain]:
    # The split convolutions a and b share what comes before them.
    three: Chain = [("branch3x3_1", 384, 1, 1, 1)]
    double: Chain = [("branch3x3dbl_1", 448, 1, 1, 1), ("branch3x3dbl_2", 384, 3, 3, 1)]
    return [
        [("branch1x1", 320, 1, 1, 1)],
        [*three, ("branch3x3_2a", 384, 1, 3, 1)],
        [*three, ("branch3x3_2b", 384, 3, 1, 1)],
        [*double, ("branch3x3dbl_3a", 384, 1, 3, 1)],
        [*double, ("branch3x3dbl_3b", 384, 3, 1, 1)],
        [pool, ("branch_pool", 192, 1, 1, 1)],
    ]


BLOCKS: dict[str, tuple[int, list[Chain]]] = {
    "Mixed_5b": (192, block_a(32)),
    "Mixed_5c": (256, block_a(64)),
    "Mixed_5d": (288, block_a(64)),
    "Mixed_6a": (
        288,
        [
            [("branch3x3", 384, 3, 3, 2)],
            [
                ("branch3x3dbl_1", 64, 1, 1, 1),
                ("branch3x3dbl_2", 96, 3, 3, 1),
                ("branch3x3dbl_3", 96, 3, 3, 2),
            ],
            ["max/2"],
        ],
    ),
    "Mixed_6b": (768, block_c(128)),
    "Mixed_6c": (768, block_c(160)),
    "Mixed_6d": (768, block_c(160)),
    "Mixed_6e": (768, block_c(192)),
    "Mixed_7a": (
        768,
        [
            [("branch3x3_1", 192, 1, 1, 1), ("branch3x3_2", 320, 3, 3, 2)],
            [
                ("branch7x7x3_1", 192, 1, 1, 1),
                ("branch7x7x3_2", 192, 1, 7, 1),
                ("branch7x7x3_3", 192, 7, 1, 1),
                ("branch7x7x3_4", 192, 3, 3, 2),
            ],
            ["max/2"],
        ],
    ),
    "Mixed_7b": (1280, block_e("avg")),
    "Mixed_7c": (2048, block_e("max")),
}
STEM = {  # name: (inputs, outputs, kernel)
    "Conv2d_1a_3x3": (3, 32, 3),
    "Conv2d_2a_3x3": (32, 32, 3),
    "Conv2d_2b_3x3": (32, 64, 3),
    "Conv2d_3b_1x1": (64, 80, 1),
    "Conv2d_4a_3x3": (80, 192, 3),
}


def table_of_shapes() -> dict[str, tuple[int, ...]]:
    convs = {name: (outputs, inputs, k, k) for name, (inputs, outputs, k) in STEM.items()}
    for block, (inputs, branches) in BLOCKS.items():
        for branch in branches:
            channels = inputs
            for step in branch:
                if not isinstance(step, str):
                    name, outputs, height, width, _ = step
                    convs[f"{block}.{name}"] = (outputs, channels, height, width)
                    channels = outputs
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, shape in convs.items():
        shapes[f"{name}.conv.weight"] = shape
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{statistic}"] = shape[:1]
    return shapes


def average_of_the_pixels_there(x: Tensor) -> Tensor:
    def total(y: Tensor) -> Tensor:
        return F.avg_pool2d(y, 3, stride=1, padding=1, divisor_override=1)

    return total(x) / total(torch.ones_like(x))


def convolution(weights: dict[str, Tensor], name: str, x: Tensor, stride: int, padding: Any) -> Tensor:
    x = F.conv2d(x, weights[f"{name}.conv.weight"], stride=stride, padding=padding)
    mean, var, gain, bias = (
        weights[f"{name}.bn.{statistic}"][:, None, None]
        for statistic in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (var + 1e-3).sqrt() * gain + bias).clamp(min=0)


def forward_from_the_table(weights: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Every block's output, and the features, for float [N, 3, 299, 299]."""
    outputs = {}
    for name, stride, margin in (
        ("Conv2d_1a_3x3", 2, 0),
        ("Conv2d_2a_3x3", 1, 0),
        ("Conv2d_2b_3x3", 1, 1),
        ("Conv2d_3b_1x1", 1, 0),
        ("Conv2d_4a_3x3", 1, 0),
    ):
        outputs[name] = x = convolution(weights, name, x, stride, margin)
        if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
            x = F.max_pool2d(x, 3, 2)
    pools: dict[str, Callable[[Tensor], Tensor]] = {
        "avg": average_of_the_pixels_there,
        "max": lambda y: F.max_pool2d(F.pad(y, (1, 1, 1, 1), value=-torch.inf), 3, 1),
        "max/2": lambda y: F.max_pool2d(y, 3, 2),
    }
    for block, (_, branches) in BLOCKS.items():
        results = []
        for branch in branches:
            y = x
            for step in branch:
                if isinstance(step, str):
                    y = pools[step](y)
                else:
                    name, _, height, width, stride = step
                    padding = (height // 2, width // 2) if stride == 1 else (0, 0)
                    y = convolution(weights, f"{block}.{name}", y, stride, padding)
            results.append(y)
        outputs[block] = x = torch.cat(results, 1)
    outputs["features"] = x.flatten(2).mean(2)
    return outputs


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random weights of the right names and shapes, with BatchNorm statistics that matter."""
    generator = torch.Generator().manual_seed(1)
    result = {}
    for name, shape in table_of_shapes().items():
        if name.endswith(("bn.weight", "running_var")):
            result[name] = 0.5 + torch.rand(shape, generator=generator)
        elif len(shape) == 1:
            result[name] = 0.1 * torch.randn(shape, generator=generator)
        else:
            fan_in = np.prod(shape[1:])
            result[name] = torch.randn(shape, generator=generator) * float(2 / fan_in) ** 0.5
    return result


@pytest.fixture(scope="module")
def network(weights: dict[str, Tensor]) -> InceptionV3:
    network = InceptionV3()
    network.load_state_dict(weights)
    return network


@pytest.fixture
def no_weights_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No variable, an empty cache (returned) and no network."""
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(url: str, timeout: float) -> Any:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    return Path(torch.hub.get_dir()) / "checkpoints"


def test_names_and_shapes_are_those_of_the_published_file() -> None:
    own = {name: tuple(value.shape) for name, value in InceptionV3().state_dict().items()}
    counters = {name for name in own if name.endswith(".num_batches_tracked")}
    assert {name: shape for name, shape in own.items() if name not in counters} == table_of_shapes()
    assert len(counters) == 94  # Inception-v3 has 94 convolutions


def test_parameter_count_is_torchvisions_without_its_heads() -> None:
    # torchvision publishes 27,161,264 for inception_v3: with an auxiliary head of 3,326,696 and 1000 classes.
    body = 27_161_264 - 3_326_696 - (2048 * 1000 + 1000)
    assert sum(p.numel() for p in InceptionV3().parameters()) == body + 2048 * 1008 + 1008


def test_forward_equals_a_second_implementation_block_by_block(
    network: InceptionV3, weights: dict[str, Tensor]
) -> None:
    images = torch.randint(0, 256, (2, 3, 32, 40), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.__setitem__(name, output))
        for name, module in network.named_children()
    ]
    features, logits = network(images)
    for hook in hooks:
        hook.remove()

    resized = torch.tensor(naive_tf1_resize(images[:1].numpy(), 299, 299))
    resized = torch.cat([resized, tf1_resize_bilinear(images[1:].float(), (299, 299))])
    expected = forward_from_the_table(weights, (resized - 128) / 128)
    for name, value in expected.items():
        got = features if name == "features" else seen[name]
        # Both are float32, with sums of up to 10^4 terms in another order at most: 1e-5 of the largest value.
        torch.testing.assert_close(got, value, rtol=0, atol=1e-5 * value.abs().max().item(), msg=f"at {name}")
    torch.testing.assert_close(logits, expected["features"] @ weights["fc.weight"].T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.logits_unbiased(features), logits, rtol=0, atol=0)


def naive_tf1_resize(x: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """resize_bilinear_op.cc of TensorFlow 1, pixel by pixel: uint8 [N, C, H, W] -> float32."""
    x = x.astype(np.float32)
    old_height, old_width = x.shape[2:]
    scale_y, scale_x = np.float32(old_height) / np.float32(height), np.float32(old_width) / np.float32(width)
    out = np.empty((*x.shape[:2], height, width), np.float32)
    for i in range(height):
        y = np.float32(i) * scale_y
        top = int(y)
        bottom = min(top + 1, old_height - 1)
        for j in range(width):
            z = np.float32(j) * scale_x
            left = int(z)
            right = min(left + 1, old_width - 1)
            above = x[..., top, left] + (x[..., top, right] - x[..., top, left]) * (z - np.float32(left))
            below = x[..., bottom, left] + (x[..., bottom, right] - x[..., bottom, left]) * (z - np.float32(left))
            out[..., i, j] = above + (below - above) * (y - np.float32(top))
    return out


@pytest.mark.parametrize("shape", [(5, 7, 11, 4), (8, 8, 8, 8), (3, 3, 1, 9), (64, 50, 7, 50), (1, 1, 4, 4)])
def test_resize_equals_the_pixel_by_pixel_kernel(shape: tuple[int, int, int, int]) -> None:
    old_height, old_width, height, width = shape
    x = np.random.default_rng(0).integers(0, 256, (2, 3, old_height, old_width), dtype=np.uint8)
    got = tf1_resize_bilinear(torch.tensor(x).float(), (height, width))
    # The same float32 operations in the same order: bit for bit.
    assert np.array_equal(got.numpy(), naive_tf1_resize(x, height, width))


def test_resize_gives_tensorflow_1s_published_answer() -> None:
    # image_ops_test.py of TensorFlow, testResizeUpAlignCornersFalse, BILINEAR.
    x = torch.tensor([64.0, 32, 32, 64, 50, 100]).reshape(1, 1, 3, 2)
    expected = [
        [64.0, 48.0, 32.0, 32.0],
        [48.0, 48.0, 48.0, 48.0],
        [32.0, 48.0, 64.0, 64.0],
        [41.0, 61.5, 82.0, 82.0],
        [50.0, 75.0, 100.0, 100.0],
        [50.0, 75.0, 100.0, 100.0],
    ]
    assert torch.equal(tf1_resize_bilinear(x, (6, 4))[0, 0], torch.tensor(expected))


def test_network_never_trains_and_takes_no_gradient(network: InceptionV3) -> None:
    torch.nn.ModuleList([network]).train()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    features, logits = network(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert not features.requires_grad
    assert not logits.requires_grad


def test_features_are_float32_inside_autocast(network: InceptionV3) -> None:
    images = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    alone = network(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = network(images)
    assert torch.equal(alone[0], inside[0])
    assert torch.equal(alone[1], inside[1])


def test_building_the_network_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    first, second = InceptionV3(), InceptionV3()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.fc.weight, second.fc.weight)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
    ],
)
def test_images_that_are_not_uint8_nchw_are_named(network: InceptionV3, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^images must be uint8 \[N, 3, H, W\]"):
        network(images)


def test_counters_in_the_file_are_accepted(weights: dict[str, Tensor]) -> None:
    network = InceptionV3()
    network.load_state_dict({**weights, "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(7)})
    assert torch.equal(network.Conv2d_1a_3x3.conv.weight, weights["Conv2d_1a_3x3.conv.weight"])


def test_wrong_weights_end_with_one_sentence_that_says_what_differs(weights: dict[str, Tensor]) -> None:
    network = InceptionV3()
    missing = {name: value for name, value in weights.items() if name != "Mixed_6c.branch7x7_2.conv.weight"}
    with pytest.raises(InputError, match=r"1 of its entries are missing \(first: 'Mixed_6c.branch7x7_2.conv.weight'\)"):
        network.load_state_dict(missing)
    with pytest.raises(InputError, match=r"do not belong \(first: 'AuxLogits.fc.weight'\)"):
        network.load_state_dict({**weights, "AuxLogits.fc.weight": torch.zeros(1000, 768)})
    imagenet = {**weights, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    with pytest.raises(
        InputError, match=rf"2 of its entries have another shape \(first: 'fc.weight'\).*{WEIGHTS_NAME}"
    ):
        network.load_state_dict(imagenet, strict=False)
    with pytest.raises(InputError, match="another shape"):
        network.load_state_dict({**weights, "fc.bias": [0.0] * 1008})


def test_weights_load_from_a_path_and_from_the_variable(
    no_weights_anywhere: Path,
    weights: dict[str, Tensor],
    network: InceptionV3,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "mine.pth"
    torch.save(weights, file)
    images = torch.full((1, 3, 8, 8), 50, dtype=torch.uint8)
    assert torch.equal(load_inception(file)(images)[0], network(images)[0])
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(file))
    assert find_inception_weights() == file
    with pytest.raises(InputError, match=r"nowhere\.pth' are not a file"):
        find_inception_weights(tmp_path / "nowhere.pth")


def test_without_weights_or_network_the_error_names_the_file_and_its_place(
    no_weights_anywhere: Path,
) -> None:
    with pytest.raises(InputError) as caught:
        load_inception()
    message = str(caught.value)
    assert WEIGHTS_NAME in message
    assert str(no_weights_anywhere / WEIGHTS_NAME) in message
    assert WEIGHTS_VARIABLE in message
    assert "no route to host" in message
    assert "\n" not in message
    assert list(no_weights_anywhere.iterdir()) == []


def test_a_download_is_kept_only_with_the_right_sha256(
    no_weights_anywhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float]] = []

    def serve(url: str, timeout: float) -> io.BytesIO:
        asked.append((url, timeout))
        return io.BytesIO(b"an error page with status 200")

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    with pytest.raises(InputError, match="what arrived has a sha256 of"):
        find_inception_weights()
    assert list(no_weights_anywhere.iterdir()) == []
    monkeypatch.setattr("ddpm_core.inception.weights.sha256_file", lambda _path: "6726825d" + "0" * 56)
    assert find_inception_weights() == no_weights_anywhere / WEIGHTS_NAME
    assert (no_weights_anywhere / WEIGHTS_NAME).read_bytes() == b"an error page with status 200"
    assert find_inception_weights() == no_weights_anywhere / WEIGHTS_NAME  # from the cache now
    assert [url.rsplit("/", 1)[1] for url, _ in asked] == [WEIGHTS_NAME] * 2
    assert all(0 < timeout <= 30 for _, timeout in asked)


def test_an_interrupted_download_leaves_nothing(no_weights_anywhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise TimeoutError("timed out")

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Broken())
    with pytest.raises(InputError, match="timed out"):
        find_inception_weights()
    assert list(no_weights_anywhere.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_named(no_weights_anywhere: Path) -> None:
    no_weights_anywhere.mkdir(parents=True)
    damaged = no_weights_anywhere / "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's name
    damaged.write_bytes(b"half of it")
    with pytest.raises(InputError, match=r"weights-inception.*are damaged.*delete the file"):
        find_inception_weights()


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("the weight file was executed",))


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps(Bomb())])
def test_a_file_that_is_no_weight_file_is_named_and_not_executed(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"weights.pth' cannot be read as a PyTorch weight file"):
        load_inception(file)


def test_a_weight_file_of_something_else_is_named(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match=r"list\.pth' hold a list, not a state dict"):
        load_inception(tmp_path / "list.pth")


@pytest.mark.parametrize(
    "shape", [(2, 64, 147, 147), (1, 192, 71, 71), (2, 288, 35, 35), (2, 70, 17, 17), (1, 2048, 8, 8)]
)
def test_pools_are_torchs_to_the_bit(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu_()
    assert torch.equal(blocks._average(x), F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))
    assert torch.equal(blocks._maximum(x), F.max_pool2d(x, 3, stride=1, padding=1))
    if shape[-1] % 2:
        assert torch.equal(blocks.halve(x), F.max_pool2d(x, 3, stride=2))
