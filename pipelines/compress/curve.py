"""Rate and distortion of real coded files beside the theory (paper, Fig. 5 and Table 4) and beside PNG, JPEG and WebP."""

import io
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ddpm_core import images, rng
from ddpm_core.codec import Codec, Coded, Decoded
from ddpm_core.codec.chain import spread_timesteps
from ddpm_core.commit import committed_file, write_json
from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.errors import InputError
from ddpm_core.likelihood import Bound, rate_distortion, variational_bound
from ddpm_core.precision import full_float32
from ddpm_core.protocol import fingerprint
from ddpm_core.unet import UNet
from pipelines.compress.config import CurveConfig
from pipelines.compress.model import load_model
from pipelines.runtime.layout import local_storage
from pipelines.runtime.locations import absolute, location
from pipelines.runtime.options import flatten
from pipelines.runtime.progress import Progress, Say
from pipelines.shards.dataset import ShardedDataset
from pipelines.tracking.tracker import open_tracker

QUALITIES = (5, 10, 20, 35, 50, 70, 85, 95)
BUDGETS = 16  # sizes that files are cut to


def measure_curve(config: CurveConfig, say: Say = lambda line: None) -> dict[str, Any]:
    """Code, cut and decode; write curve.json and curve.svg, the former into MLflow too; return what it holds.

    InputError where images and network do not fit, or there are too few. Rates are bits/dim with headers; RMSE is on 0..255,
    over all images.
    """
    model = load_model(config)
    _, checkpoint, codec, network = model
    dataset = ShardedDataset.open(location(config.data, option="--data"))
    if config.images > len(dataset):
        raise InputError(f"--images is {config.images}, but data set {dataset.name!r} has {len(dataset)}: give fewer")
    output = absolute(config.output, option="--output")
    process = checkpoint.diffusion_config().build().to(codec.device)
    chain = process.strided(spread_timesteps(process, config.theory_steps or process.num_timesteps))
    numbers = rng.permutation(config.seed, "curve", 0, len(dataset))[: config.images]
    pixels = torch.from_numpy(dataset.pixels(numbers.numpy()))
    coded, decoded, seconds = _round_trip(config, codec, pixels, say)
    curve: dict[str, Any] = {
        "protocol": {
            "weights_sha256": checkpoint.weights_sha256(config.weights),
            "step": checkpoint.step,
            "data": dataset.name,
            "data_sha256": dataset.sha256,
            **{name: getattr(config, name) for name in ("weights", "images", "steps", "theory_steps", "seed")},
            "device": str(codec.device),
        },
        "images_per_second": {name: config.images / each for name, each in seconds.items()},
        "coded": _coded_points(pixels, decoded),
        "lossless": {
            "coded": _rate([len(each.data) for each in coded], pixels),
            "png": _rate([len(_file(image, "PNG", optimize=True)) for image in pixels], pixels),
            "webp": _rate([len(_file(image, "WEBP", lossless=True, quality=100)) for image in pixels], pixels),
        },
        "lossy": {name: _lossy_points(pixels, name) for name in ("JPEG", "WEBP")},
        "account": _account(coded, pixels),
    }
    network.to(torch.float32)  # as a likelihood is measured; the files are made
    curve["theory"] = _theory(config, chain, network, pixels, numbers, say)
    curve["overhead"] = {
        "lossy": curve["account"]["lossy"] / curve["theory"]["lossy"] - 1.0,
        "total": curve["lossless"]["coded"] / curve["theory"]["total"] - 1.0,
    }
    write_json(output / "curve.json", curve)
    with committed_file(output / "curve.svg") as temporary:
        _draw(curve).savefig(temporary, format="svg", metadata={"Date": None})
    _record(config, model.run.name, curve)
    return curve


def _record(config: CurveConfig, name: str, curve: dict[str, Any]) -> None:
    """Into an MLflow run of its own, below that of the training `name`."""
    tracker, mark = open_tracker(config, local_storage(config.storage)), fingerprint(curve["protocol"])
    train_run = tracker.find("train", name)
    run = tracker.run(
        "compression",
        f"{name}-compression-{mark[:6]}",
        mark,
        params=flatten(curve["protocol"]),
        tags={"ddpm.data": curve["protocol"]["data"]},
        parent=train_run.run_id if train_run else None,
    )
    run.log_json("compression/curve.json", curve)
    run.finish()


def _theory(
    config: CurveConfig, chain: GaussianDiffusion, network: UNet, pixels: Tensor, numbers: Tensor, say: Say
) -> dict[str, Any]:
    """The bound of the same images and, for who has received the paper's x_t, rate and RMSE."""
    bounds, device = [], chain.betas.device
    progress = Progress("theory", config.images, "images", say)
    for part, its in zip(pixels.split(config.batch_size), numbers.split(config.batch_size), strict=True):
        x = images.to_float(part.to(device))
        noise = rng.SampleNoise(config.seed, its.to(device), tuple(x.shape[1:]), purpose="likelihood")
        with full_float32(device):
            bounds.append(variational_bound(chain, network, x, noise))
        progress.advance(len(part))
    bound = Bound(*(torch.cat([getattr(each, name) for each in bounds]) for name in ("terms", "prior", "mse")))
    curve, total, decoder = rate_distortion(bound), float(bound.total.mean()), float(bound.terms[:, 0].mean())
    return {
        "t": (chain.timesteps + 1).tolist(),
        "rate": curve.rate.tolist(),
        "rmse": curve.distortion.tolist(),
        "lossy": total - decoder,
        "decoder": decoder,
        "total": total,
    }


def describe_curve(curve: dict[str, Any]) -> list[str]:
    """The table in words."""
    lossless, theory, account, overhead = (curve[name] for name in ("lossless", "theory", "account", "overhead"))
    speed = curve["images_per_second"]
    totals = (
        f"lossless {lossless['coded']:.3f} bits/dim; the bound {theory['total']:.3f} ({overhead['total']:+.1%}); "
        f"PNG {lossless['png']:.3f}, WebP {lossless['webp']:.3f}"
    )
    lossy = (
        f"lossy part {account['lossy']:.3f} bits/dim; L_1 + .. + L_T {theory['lossy']:.3f} ({overhead['lossy']:+.1%}); "
        f"the coded steps' KL {account['kl']:.3f} ({account['lossy'] / account['kl'] - 1.0:+.1%})"
    )
    lines = [totals, lossy, f"{speed['encode']:.3g} images/s encoded, {speed['decode']:.3g} decoded"]
    points = [("coded", point) for point in curve["coded"]]
    points += [(name, point) for name, its in curve["lossy"].items() for point in its]
    return lines + [f"{name}: {point['rate']:.3f} bits/dim, RMSE {point['rmse']:.2f}" for name, point in points]


def _round_trip(
    config: CurveConfig, codec: Codec, pixels: Tensor, say: Say
) -> tuple[list[Coded], list[Decoded], dict[str, float]]:
    """(files, images, seconds)."""
    coded: list[Coded] = []
    decoded: list[Decoded] = []
    seconds = {"encode": 0.0, "decode": 0.0}
    progress = Progress("curve", config.images, "images", say)
    for part in pixels.split(config.batch_size):
        start = time.monotonic()
        coded += codec.encode(part, steps=config.steps, seed=config.seed)
        middle = time.monotonic()
        decoded += codec.decode([each.data for each in coded[-len(part) :]])
        seconds["encode"] += middle - start
        seconds["decode"] += time.monotonic() - middle
        progress.advance(len(part))
    if not all(torch.equal(its.pixels, image) for its, image in zip(decoded, pixels, strict=True)):
        raise AssertionError("an image did not come back bit for bit")
    return coded, decoded, seconds


def _coded_points(pixels: Tensor, decoded: Sequence[Decoded]) -> list[dict[str, float]]:
    """Rate and RMSE of files cut to a budget of bytes, each at the last check that it holds."""
    most = max(its.frames[-1].nbytes for its in decoded)
    least = max(its.frames[0].nbytes for its in decoded)
    points: dict[float, dict[str, float]] = {}
    for budget in np.geomspace(least, most, BUDGETS):
        held = [[frame for frame in its.frames if frame.nbytes <= budget][-1] for its in decoded]
        rate = _rate([frame.nbytes for frame in held], pixels)
        points[rate] = {"rate": rate, "rmse": _rmse(torch.stack([frame.pixels for frame in held]), pixels)}
    return list(points.values())


def _lossy_points(pixels: Tensor, form: str) -> list[dict[str, float]]:
    points = []
    for quality in QUALITIES:
        files = [_file(image, form, quality=quality) for image in pixels]
        back = torch.stack([_opened(file, image) for file, image in zip(files, pixels, strict=True)])
        points.append({"quality": quality, "rate": _rate([len(f) for f in files], pixels), "rmse": _rmse(back, pixels)})
    return points


def _account(coded: Sequence[Coded], pixels: Tensor) -> dict[str, Any]:
    """Means over images in bits/dim: what was spent, what the coded steps' KL was, in total and by step."""
    ledgers, size = [each.ledger for each in coded], pixels[0].numel()
    names = ("paper_kl", "kl", "paths", "rates", "shifts", "checks")
    by_step = {name: np.mean([getattr(ledger, name) for ledger in ledgers], axis=0) / size for name in names}
    return {
        "header": ledgers[0].header / size,
        "lossy": float(np.mean([ledger.lossy for ledger in ledgers])) / size,
        "decoder": float(np.mean([ledger.decoder for ledger in ledgers])) / size,
        "paper_decoder": float(np.mean([ledger.paper_decoder for ledger in ledgers])) / size,
        **{name: float(each.sum()) for name, each in by_step.items()},
        "steps": {"t": [t + 1 for t in ledgers[0].t], **{name: each.tolist() for name, each in by_step.items()}},
    }


def _rate(sizes: Sequence[int], pixels: Tensor) -> float:
    return 8.0 * sum(sizes) / pixels.numel()


def _rmse(found: Tensor, pixels: Tensor) -> float:
    return math.sqrt(float((found.double() - pixels.double()).square().mean()))


def _file(image: Tensor, form: str, **options: Any) -> bytes:
    array, file = image.numpy(), io.BytesIO()
    picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    picture.save(file, format=form, **options)
    return file.getvalue()


def _opened(file: bytes, like: Tensor) -> Tensor:
    with Image.open(io.BytesIO(file)) as picture:
        array = np.asarray(picture.convert("L" if like.shape[-1] == 1 else "RGB"))
    return torch.from_numpy(array.copy()).reshape(like.shape)


def _draw(curve: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = [("files cut at their checks", curve["coded"], "o-"), ("JPEG", curve["lossy"]["JPEG"], "s:")]
    for label, points, style in [*lines, ("WebP", curve["lossy"]["WEBP"], "^:")]:
        axes.plot([p["rate"] for p in points], [p["rmse"] for p in points], style, ms=4, label=label)
    theory = [(rate, rmse) for rate, rmse in zip(curve["theory"]["rate"], curve["theory"]["rmse"], strict=True)]
    axes.plot(*zip(*theory, strict=True), "k--", lw=1, label="theory: L_T + .. + L_t")
    for (name, rate), style in zip(curve["lossless"].items(), ("-", ":", "-."), strict=True):
        axes.axvline(rate, color="grey", lw=1, ls=style, label=f"{name} lossless, {rate:.2f}")
    axes.set(xlabel="bits/dim", ylabel="RMSE of 0..255", xscale="symlog", ylim=(0, None), xlim=(0, None))
    axes.legend(fontsize=8)
    return figure
