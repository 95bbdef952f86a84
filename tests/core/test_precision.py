"""In which precision a network computes: what was asked for, whatever surrounds it."""

import contextlib

import pytest
import torch
from torch import Tensor, nn

from ddpm_core.configs import Precision
from ddpm_core.precision import autocast, full_float32, in_precision

DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU = torch.device("cpu")


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


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_full_float32_on_a_gpu_is_without_tf32_and_of_fixed_algorithms() -> None:
    """cuDNN's switches can be read where there is no GPU."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    with full_float32(torch.device("cuda")):
        assert (cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark) == (False, True, False)
    assert (cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark) == before
