"""Our numbers beside those of other people's code, on the same input: the largest relative deviation of each, as a table."""

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
from support.contest import peer_module
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: nothing is fetched

from ddpm_core.configs import Schedule
from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.dinov2 import Size, load_dinov2, prepared
from ddpm_core.inception import InceptionV3
from ddpm_core.interop import to_diffusers
from ddpm_core.metrics import FeatureStatistics, KernelDistance, PrecisionRecall, frechet_distance
from ddpm_core.presets import PRESETS
from ddpm_core.samplers import sample
from ddpm_core.schedules import make_betas
from ddpm_core.unet import UNet

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
T = 1000
ROWS: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table() -> Any:
    yield
    print("\n| what | with | largest relative deviation |\n|---|---|---|\n" + "\n".join(ROWS))


def agree(what: str, peer: str, ours: Tensor | float, theirs: Any, within: float) -> None:
    """Ours and theirs as a row of the table; fails if they differ by more, relative to the largest value of theirs."""
    expected = torch.as_tensor(np.asarray(theirs), dtype=torch.float64)
    deviation = float((torch.as_tensor(ours, dtype=torch.float64) - expected).abs().max() / expected.abs().max())
    try:
        number = version(peer)
    except PackageNotFoundError:  # it lies in the folder of DDPM_PEERS
        number = peer_module(f"{peer.replace('-', '_')}.version").__version__
    ROWS.append(f"| {what} | {peer} {number} | {deviation:.1e} |")
    assert deviation < within, ROWS[-1]


def network(x: Tensor, t: Tensor) -> Tensor:
    """A prediction of eps that is no constant."""
    return torch.sin(3.0 * x + t.reshape(-1, 1, 1, 1) / 300.0)


def images(seed: int, count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_schedules_and_posteriors() -> None:
    from diffusers import DDPMScheduler

    names: dict[Schedule, str] = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
    for ours, peers in names.items():
        scheduler = DDPMScheduler(T, beta_schedule=peers)
        agree(f"betas, {ours}", "diffusers", make_betas(ours), scheduler.betas, 1e-6)  # theirs are float32
        process = GaussianDiffusion(make_betas(ours))
        agree(f"alphas_cumprod, {ours}", "diffusers", process.alphas_cumprod, scheduler.alphas_cumprod, 1e-5)
        t = torch.tensor([0, 1, 500, 999])
        noised = scheduler.add_noise(images(0), images(1), t)
        agree(f"q_sample, {ours}", "diffusers", process.q_sample(images(0), t, images(1)), noised, 1e-5)


@pytest.mark.parametrize("var_type", ["fixedlarge", "fixedsmall"])
def test_an_ancestral_chain(var_type: Any) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(T, variance_type=var_type.replace("fixed", "fixed_"))
    noise = {t: images(10 + t) for t in range(T + 1)}
    x = noise[T]
    for t in scheduler.timesteps.tolist():
        drawn = mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, t=t, **__: noise[t])
        with drawn:
            x = scheduler.step(network(x, torch.full((4,), t)), t, x).prev_sample
    process = GaussianDiffusion(make_betas("linear"), var_type=var_type)
    ours = sample(process, network, (4, 3, 8, 8), noise=noise.__getitem__)
    agree(f"1,000 ancestral steps, {var_type}", "diffusers", ours, x, 1e-3)


def test_ddim_chains() -> None:
    from diffusers import DDIMScheduler

    for eta in (0.0, 1.0):
        scheduler = DDIMScheduler(T, timestep_spacing="leading", set_alpha_to_one=True)
        scheduler.set_timesteps(50)
        noise = {t: images(10 + t) for t in range(T + 1)}
        x = noise[T]
        for t in scheduler.timesteps.tolist():
            extra = {"eta": eta, "variance_noise": noise[t] if t else torch.zeros_like(x)} if eta else {}
            x = scheduler.step(
                network(x, torch.full((4,), t)), t, x, use_clipped_model_output=True, **extra
            ).prev_sample
        process = GaussianDiffusion(make_betas("linear"))
        options: dict[str, Any] = {"method": "ddim", "steps": 50, "spacing": "leading", "eta": eta}
        ours = sample(process, network, (4, 3, 8, 8), noise=noise.__getitem__, **options)
        agree(f"50 steps of DDIM, eta {eta:g}", "diffusers", ours, x, 1e-3)


def test_the_networks(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    for name in ("cifar10", "lsun_church"):
        torch.manual_seed(0)
        ours = UNet(PRESETS[name].unet).eval()
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))  # none of them is zero, as the last layers begin
        to_diffusers(tmp_path / name, ours.config, ours.state_dict())
        theirs = UNet2DModel.from_pretrained(tmp_path / name, low_cpu_mem_usage=False).eval()
        size = ours.config.image_size
        x, t = torch.randn(1, 3, size, size), torch.tensor([500])
        with torch.no_grad():
            agree(f"U-Net, {name}", "diffusers", ours(x, t), theirs(x, t).sample, 1e-4)


def features(seed: int, count: int, dim: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64).exp() * (1 + 0.1 * seed)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    statistics = FeatureStatistics(x.shape[1])
    statistics.update(x)
    return statistics.moments()


def test_the_distance() -> None:
    from torchmetrics.image.fid import _compute_fid

    (mu1, sigma1), (mu2, sigma2) = moments(features(0, 500)), moments(features(1, 400))
    ours = frechet_distance(mu1, sigma1, mu2, sigma2)
    agree("covariance", "numpy", sigma1, np.cov(features(0, 500).numpy(), rowvar=False), 1e-12)
    agree("Frechet distance", "torchmetrics", ours, _compute_fid(mu1, sigma1, mu2, sigma2), 1e-9)
    root = scipy.linalg.sqrtm((sigma1 @ sigma2).numpy()).real
    others = float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace())
    agree("Frechet distance by sqrtm", "scipy", ours, others - 2 * np.trace(root), 1e-9)


def test_the_other_metrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    generated, real = features(0, 300), features(1, 300)
    kernel = KernelDistance(real, subsets=1, subset_size=300)
    kernel.update(generated, torch.arange(300))
    whole = poly_mmd(generated, real, degree=3, gamma=None, coef=1.0)
    agree("KID of whole sets", "torchmetrics", kernel.compute()[0], whole, 1e-9)
    fidelity = peer_module("torch_fidelity.metric_prc")
    neighbourhoods = PrecisionRecall(real)
    neighbourhoods.update(generated, torch.arange(300))
    found = fidelity.prc_features_to_metric(generated.float(), real.float(), verbose=False)
    theirs = [found["precision"], found["recall"]]
    agree("precision and recall", "torch-fidelity", torch.stack(neighbourhoods.compute()[:2]), theirs, 1e-2)


def test_the_network_of_the_fid(tmp_path: Path) -> None:
    fidelity = peer_module("torch_fidelity.feature_extractor_inceptionv3")
    ours, pictures = InceptionV3(), torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    torch.save(dict(ours.state_dict()), tmp_path / "weights.pth")
    layers, path = ["2048", "logits_unbiased"], str(tmp_path / "weights.pth")
    theirs: Callable[..., Any] = fidelity.FeatureExtractorInceptionV3(
        "bench", layers, feature_extractor_weights_path=path
    )
    with torch.no_grad():
        agree("features of the FID network", "torch-fidelity", ours(pictures)[0], theirs(pictures)[0], 1e-6)


def test_the_network_of_fd_dinov2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full width, of images whose patches are those of its positions: between other ones, transformers interpolates otherwise
    than the authors, and so than ours."""
    if folder := os.environ.get("DDPM_PEERS"):
        monkeypatch.syspath_prepend(folder)
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=224, layerscale_value=0.5
    )
    theirs = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        theirs.embeddings.position_embeddings.normal_(0.0, 0.5)
        theirs.save_pretrained(tmp_path)
        x = prepared(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
        ours = load_dinov2(tmp_path / "model.safetensors", Size(grid=16))(x)
        agree("features of DINOv2 ViT-L/14, random weights", "transformers", ours, theirs(x).pooler_output, 1e-5)
