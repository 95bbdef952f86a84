"""In which precision a network computes: what was asked for, whatever surrounds it."""

import contextlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gaussian_case import unchecked
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ddpm_core.checkpoint import snapshot, write_checkpoint
from ddpm_core.configs import DiffusionConfig, OptimConfig, Precision, UNetConfig
from ddpm_core.precision import autocast, compute_deterministically, full_float32, in_precision, in_slices
from ddpm_core.samplers import sample
from ddpm_core.training import TrainState
from ddpm_core.unet import UNet
from pipelines.checkpoints.network import NetworkHolder

DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU = torch.device("cpu")
SMALL = UNetConfig(image_size=8, in_channels=1, ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())


class Recorder(nn.Conv2d):
    """A convolution that remembers the dtype it computed in."""

    computed: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        self.computed = out.dtype
        return out


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("surrounding", DTYPES)
def test_a_network_computes_in_its_precision_and_gives_float32(precision: Precision, surrounding: Precision) -> None:
    network = Recorder(3, 3, 1)
    with autocast(CPU, surrounding):
        out = in_precision(network, precision)(torch.zeros(1, 3, 4, 4))
    assert network.computed == DTYPES[precision]
    assert out.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_changes_no_bit(dtype: torch.dtype) -> None:
    network = nn.Conv2d(3, 3, 3).to(dtype)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(in_precision(network, "float32")(x), network(x))


def test_a_network_gets_everything_it_is_given() -> None:
    x = torch.ones(1, 1, 1, 1)
    assert in_precision(lambda x, t, key: x + t + key, "bfloat16")(x, 2 * x, 3 * x).item() == 6.0


@pytest.mark.parametrize("fails", [False, True])
def test_full_float32_ends_an_autocast_and_gives_it_back(fails: bool) -> None:
    network, x = Recorder(3, 3, 1), torch.zeros(1, 3, 4, 4)
    with autocast(CPU, "bfloat16"):
        with contextlib.suppress(ArithmeticError), full_float32(CPU):
            assert network(x).dtype == torch.float32
            if fails:
                raise ArithmeticError
        assert network(x).dtype == torch.bfloat16


def test_full_float32_is_of_products_and_convolutions_on_a_cpu_too() -> None:
    """Those that multiply bfloat16 are told to in vain."""
    onednn: Any = torch.backends.mkldnn
    default = torch.get_float32_matmul_precision()
    layer, images = nn.Conv2d(64, 64, 3), torch.rand(2, 64, 32, 32, generator=torch.Generator().manual_seed(0))
    x = images.reshape(64, -1)

    def computed() -> list[Tensor]:
        return [x @ x.T, layer(images)]

    exact = computed()
    try:
        torch.set_float32_matmul_precision("medium")
        onednn.conv.fp32_precision = "bf16"
        rounded = computed()
        with full_float32(CPU):
            inside = computed()
        after = torch.get_float32_matmul_precision(), onednn.matmul.fp32_precision, onednn.conv.fp32_precision
    finally:
        torch.set_float32_matmul_precision(default)
        onednn.conv.fp32_precision = "none"
    assert after == ("medium", "bf16", "bf16")
    for one, other, coarse in zip(exact, inside, rounded, strict=True):
        assert torch.equal(one, other)
        if "amx_bf16" in Path("/proc/cpuinfo").read_text():  # with AVX-512 alone oneDNN may go on in float32
            assert not torch.equal(one, coarse)  # the case can tell


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_full_float32_on_a_gpu_is_without_tf32_and_of_fixed_algorithms() -> None:
    """The switches of cuDNN and cuBLAS can be read where there is no GPU."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul

    def switches() -> list[object]:
        cublas = products.allow_tf32, products.fp32_precision, torch.get_float32_matmul_precision()
        return [cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, *cublas]

    default = torch.get_float32_matmul_precision()
    try:
        for outside in (
            "highest",
            "high",
            "medium",
        ):  # high is what TORCH_ALLOW_TF32_CUBLAS_OVERRIDE makes of the default
            torch.set_float32_matmul_precision(outside)
            before = switches()
            with full_float32(torch.device("cuda")):
                assert switches()[:4] == [False, True, False, False]
                assert switches()[5] == "highest"
            assert switches() == before
    finally:
        torch.set_float32_matmul_precision(default)


def test_samples_are_drawn_in_the_precision_asked_for(tmp_path: Path) -> None:
    """As evaluation draws them: the network of a checkpoint, in a chain."""
    state = TrainState(UNet(SMALL), OptimConfig())
    config = {"unet": asdict(SMALL), "diffusion": asdict(DiffusionConfig(num_timesteps=10))}
    checkpoint = write_checkpoint(tmp_path, snapshot(state), config)
    for precision, dtype in DTYPES.items():
        diffusion, network = NetworkHolder("ema", precision).of(checkpoint)
        seen: set[torch.dtype] = set()

        def watch(module: nn.Module, args: Any, out: Tensor, seen: set[torch.dtype] = seen) -> None:
            if isinstance(module, nn.Conv2d):
                seen.add(out.dtype)

        with nn.modules.module.register_module_forward_hook(watch):
            x = sample(diffusion, network, (1, 1, 8, 8), noise=torch.randn(1, 1, 8, 8), method="ddim", steps=2)
        assert seen == {dtype}
        assert x.dtype == torch.float32


def test_a_deterministic_process_times_no_kernels_and_refuses_unordered_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_DETERMINISTIC": "1"}
    for name in variables:
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    try:
        compute_deterministically()
        assert {name: os.environ[name] for name in variables} == variables
        assert torch.are_deterministic_algorithms_enabled()
        assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        cudnn.benchmark, cudnn.deterministic = before


def test_a_network_in_slices_sees_every_image_once_and_no_more_at_a_time() -> None:
    seen: list[int] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(len(x))
        return x + t[:, None, None, None]

    x, t = torch.randn(10, 1, 2, 2), torch.arange(10)
    assert torch.equal(in_slices(network, 4)(x, t), x + t[:, None, None, None])
    assert seen == [4, 4, 2]


def test_ten_checkpoints_go_through_one_compiled_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for each would reach the compiler's limit, after minutes of compiling; and each gives its own samples."""
    graphs = CompileCounterWithBackend("eager")
    monkeypatch.setattr(
        UNet, "compile", lambda network, **_: nn.Module.compile(network, fullgraph=True, backend=graphs)
    )
    holder, config = NetworkHolder("raw", compile=True), {"unet": asdict(SMALL), "diffusion": asdict(DiffusionConfig())}
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    for step in range(10):
        torch.manual_seed(step)
        state = TrainState(UNet(SMALL), OptimConfig())
        state.step = step
        checkpoint = write_checkpoint(tmp_path, snapshot(state), config)
        with unchecked(), torch.no_grad():
            ours, expected = holder.of(checkpoint)[1](x, t), state.model.eval()(x, t)
        assert torch.equal(ours, expected)
    assert graphs.frame_count == 1
