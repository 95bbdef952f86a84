"""What a GPU computes, against the CPU: pytest tests/gpu -o addopts= -o filterwarnings= with torch, numpy, safetensors,
jaxtyping and pytest alone. What needs more skips without."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import device_checks
from support.device_checks import CHECKS, COMPILED, EXECUTIONS
from torch.nn.parallel import DistributedDataParallel

from ddpm_core.precision import compile_network
from ddpm_core.training import TrainState, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("name", CHECKS)
def test_a_gpu_computes_what_the_cpu_does(name: str) -> None:
    CHECKS[name](CUDA)


@pytest.mark.parametrize("name", EXECUTIONS | COMPILED)
def test_ten_steps_are_those_of_the_cpu_in_float64(name: str) -> None:
    device_checks.check_ten_steps_are_the_cpus_in_float64(CUDA, *(EXECUTIONS | COMPILED)[name])


def test_what_cannot_fit_is_refused_and_what_is_chosen_fits() -> None:
    device_checks.check_what_cannot_fit_is_refused(CUDA)


def test_compiled_normals_are_the_cpus() -> None:
    device_checks.check_normals_are_the_cpus(CUDA, compiled=True)


def test_ten_checkpoints_go_through_one_compiled_graph() -> None:
    device_checks.check_several_networks_go_through_one_compiled_graph(CUDA, compile_network)


def test_a_deterministic_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    device_checks.check_a_resumed_training_is_the_undisturbed_one(CUDA, tmp_path)


def test_one_process_of_nccl_makes_the_steps_of_none(tmp_path: Path) -> None:
    """Through the wrapper: losses and norms relative 1e-4, for cuDNN may add up otherwise from run to run."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        metrics = []
        for wrapped in (False, True):
            state = TrainState(device_checks.network(), device_checks.OPTIM)
            state.to(CUDA)
            model = (
                DistributedDataParallel(state.model, device_ids=[0], gradient_as_bucket_view=True)
                if wrapped
                else state.model
            )
            diffusion = device_checks.DIFFUSION.to(CUDA)
            data = [device_checks.batch(step, torch.float32, CUDA) for step in range(3)]
            steps = [train_step(state, diffusion, model, device_checks.OPTIM, **each) for each in data]
            metrics.append(torch.stack([torch.stack([m.loss, m.grad_norm]) for m in steps]).cpu())
        torch.testing.assert_close(metrics[1], metrics[0], rtol=1e-4, atol=0)
    finally:
        device_checks.DIFFUSION.to("cpu")
        dist.destroy_process_group()


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_batches_on_the_gpu_are_those_made_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: bool, compiled: bool
) -> None:
    """Kept there whole or streamed, drawn there by single kernels or compiled ones."""
    for package in ("pyarrow", "tyro", "fsspec", "upath"):
        pytest.importorskip(package)
    from support.synthetic_shards import random_pixels, write_dataset

    from ddpm_core.configs import Execution
    from pipelines.train import loader
    from pipelines.train.config import config_for

    if not resident:
        monkeypatch.setattr(loader, "RESIDENT_BYTES", 0)
    dataset = write_dataset(tmp_path / "shards", random_pixels(40, (32, 32, 3)), [40])
    config = config_for("cifar10", shards=str(dataset.path), steps=4, execution=Execution(compile=compiled))
    with loader.Loader(config, dataset, rank=0, world_size=1, device=CUDA) as batches:
        for step, batch in enumerate(batches):
            expected = loader.make_batch(config, dataset, step, 0, 1)
            assert torch.equal(batch.x_start.cpu(), expected.x_start)
            assert torch.equal(batch.t.cpu(), expected.t)
            torch.testing.assert_close(batch.noise.cpu(), expected.noise, rtol=0, atol=1e-5)
            assert batch.dropout_key is not None
            assert expected.dropout_key is not None
            assert torch.equal(batch.dropout_key.cpu(), expected.dropout_key)
