"""Rate and distortion of real coded files beside the theory (paper, Fig. 5 and Table 4) and beside PNG, JPEG and WebP."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ddpm_core import images, rng
from ddpm_core.codec import Codec, Coded, Decoded
from ddpm_core.codec.chain import spread_timesteps
from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.errors import InputError
from ddpm_core.likelihood import Bound, rate_distortion, variational_bound
from ddpm_core.precision import full_float32
from ddpm_core.protocol import fingerprint
from ddpm_core.records import COMPRESSION, COMPRESSION_CURVE, DATA_TAG, IMAGES_PER_SECOND, RUN_TAG, TRAIN, flatten
from ddpm_core.unet import UNet
from pipelines.compress.baselines import bits_per_dim, lossless_rates, lossy_points, rmse
from pipelines.compress.config import CurveConfig
from pipelines.compress.model import LoadedModel, load_model
from pipelines.runtime.progress import Progress, Say
from pipelines.runtime.recipe import keep_recipe
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.layout import open_storage
from pipelines.storage.lease import sole_writer
from pipelines.storage.locations import commit_json, committed, location
from pipelines.tracking.tracker import open_tracker

BUDGETS = 16  # sizes that files are cut to
FORMATS = {"JPEG": "JPEG", "WEBP": "WebP"}  # lossy ones, by Pillow's names


def measure_curve(config: CurveConfig, say: Say = lambda line: None) -> dict[str, Any]:
    """Code, cut and decode a data set's images; write curve.json and curve.svg, put the former into MLflow, return it.

    Rates are bits/dim with headers; RMSE is on 0..255, over all images. Raises InputError if images and network do not fit,
    or there are too few images.
    """
    model = load_model(config)
    dataset = ShardedDataset.open(location(config.data, option="--data"))
    if config.images > len(dataset):
        raise InputError(f"--images is {config.images}, but data set {dataset.name!r} has {len(dataset)}: give fewer")
    output = location(config.output, option="--output")
    with sole_writer(output, "output", say):
        curve = make_curve(config, model, dataset, say)
        commit_json(output / "curve.json", curve)
        with committed(output / "curve.svg") as temporary:
            draw_curve(curve).savefig(temporary, format="svg", metadata={"Date": None})
        keep_recipe(output, replace(config, data=str(dataset.path), output=str(output), storage=model.storage))
    _log_curve(config, model.run.name, curve)
    return curve


def make_curve(config: CurveConfig, model: LoadedModel, dataset: ShardedDataset, say: Say) -> dict[str, Any]:
    """What measure_curve returns."""
    process = model.checkpoint.diffusion_config().build().to(model.codec.device)
    # A strided chain is a model of its own, with a looser bound.
    chain = process.strided(spread_timesteps(process, config.theory_steps or process.num_timesteps))
    numbers = rng.permutation(config.seed, "curve", 0, len(dataset))[: config.images]
    pixels = torch.from_numpy(dataset.pixels(numbers.numpy()))
    curve = {"protocol": _protocol(config, model, dataset), **_measure_files(config, model.codec, pixels, say)}
    model.network.to(torch.float32)  # as a likelihood is measured; no file is made from here on
    curve["theory"] = _theory(config, chain, model.network, pixels, numbers, say)
    curve["overhead"] = {
        "lossy": curve["account"]["lossy"] / curve["theory"]["lossy"] - 1.0,
        "total": curve["lossless"]["coded"] / curve["theory"]["total"] - 1.0,
    }
    return curve


def _protocol(config: CurveConfig, model: LoadedModel, dataset: ShardedDataset) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    return {
        "weights_sha256": model.checkpoint.weights_sha256(config.weights),
        "step": model.checkpoint.step,
        "data": dataset.name,
        "data_sha256": dataset.sha256,
        **{name: getattr(config, name) for name in ("weights", "images", "steps", "theory_steps", "seed")},
        "device": str(model.codec.device),
    }


def _measure_files(config: CurveConfig, codec: Codec, pixels: Tensor, say: Say) -> dict[str, Any]:
    """What coded files of the images weigh and show, how fast they are made, and the same of other formats."""
    coded, decoded, seconds = _round_trip(config, codec, pixels, say)
    return {
        IMAGES_PER_SECOND: {name: config.images / duration for name, duration in seconds.items()},
        "coded": _coded_points(pixels, decoded),
        "lossless": {"coded": bits_per_dim([len(file.data) for file in coded], pixels), **lossless_rates(pixels)},
        "lossy": {form: lossy_points(pixels, form) for form in FORMATS},
        "account": _account(coded, pixels),
    }


def _round_trip(
    config: CurveConfig, codec: Codec, pixels: Tensor, say: Say
) -> tuple[list[Coded], list[Decoded], dict[str, float]]:
    """(coded files, decoded images, seconds of both), after a check that every image comes back bit for bit."""
    coded: list[Coded] = []
    decoded: list[Decoded] = []
    seconds = {"encode": 0.0, "decode": 0.0}
    progress = Progress("curve", config.images, "images", say)
    for batch in pixels.split(config.batch_size):
        started = time.monotonic()  # no synchronisation on a GPU: both ends return bytes and pixels on the CPU
        files = codec.encode(batch, steps=config.steps, seed=config.seed)
        encoded = time.monotonic()
        coded += files
        decoded += codec.decode([file.data for file in files])
        seconds["encode"] += encoded - started
        seconds["decode"] += time.monotonic() - encoded
        progress.advance(len(batch))
    if not all(torch.equal(image.pixels, original) for image, original in zip(decoded, pixels, strict=True)):
        raise AssertionError("an image did not come back bit for bit")
    return coded, decoded, seconds


def _coded_points(pixels: Tensor, decoded: Sequence[Decoded]) -> list[dict[str, float]]:
    """Rate and RMSE of files cut to a budget of bytes, each at the last check that it holds."""
    most = max(image.frames[-1].nbytes for image in decoded)
    least = max(image.frames[0].nbytes for image in decoded)
    points: dict[float, dict[str, float]] = {}  # by rate: budgets between the same two checks give one point
    for budget in np.geomspace(least, most, BUDGETS):
        shown = [[frame for frame in image.frames if frame.nbytes <= budget][-1] for image in decoded]
        rate = bits_per_dim([frame.nbytes for frame in shown], pixels)
        points[rate] = {"rate": rate, "rmse": rmse(torch.stack([frame.pixels for frame in shown]), pixels)}
    return list(points.values())


def _account(coded: Sequence[Coded], pixels: Tensor) -> dict[str, Any]:
    """Means over images in bits/dim: what was spent, and the KL of the coded steps, in total and by step."""
    ledgers, size = [file.ledger for file in coded], pixels[0].numel()
    names = ("paper_kl", "kl", "paths", "rates", "shifts", "checks")
    by_step = {name: np.mean([getattr(ledger, name) for ledger in ledgers], axis=0) / size for name in names}
    return {
        "header": ledgers[0].header / size,
        "lossy": float(np.mean([ledger.lossy for ledger in ledgers])) / size,
        "decoder": float(np.mean([ledger.decoder for ledger in ledgers])) / size,
        "paper_decoder": float(np.mean([ledger.paper_decoder for ledger in ledgers])) / size,
        **{name: float(values.sum()) for name, values in by_step.items()},
        # the paper's t, one more than the index
        "steps": {"t": [t + 1 for t in ledgers[0].t], **{name: values.tolist() for name, values in by_step.items()}},
    }


def _theory(
    config: CurveConfig, chain: GaussianDiffusion, network: UNet, pixels: Tensor, numbers: Tensor, say: Say
) -> dict[str, Any]:
    """The bound of the same images in bits/dim (Eq. 5), and rate and RMSE of who has received the paper's x_t (Fig. 5)."""
    bounds, device = [], chain.betas.device
    progress = Progress("theory", config.images, "images", say)
    for batch, indices in zip(pixels.split(config.batch_size), numbers.split(config.batch_size), strict=True):
        x = images.to_float(batch.to(device))
        noise = rng.SampleNoise(config.seed, indices.to(device), tuple(x.shape[1:]), purpose="likelihood")
        with full_float32(device):
            bounds.append(variational_bound(chain, network, x, noise))
        progress.advance(len(batch))
    bound = Bound(*(torch.cat([getattr(part, name) for part in bounds]) for name in ("terms", "prior", "mse")))
    curve, total, decoder = rate_distortion(bound), float(bound.total.mean()), float(bound.terms[:, 0].mean())
    return {
        "t": (chain.timesteps + 1).tolist(),
        "rate": curve.rate.tolist(),
        "rmse": curve.distortion.tolist(),
        "lossy": total - decoder,  # L_1 + .. + L_T
        "decoder": decoder,  # L_0
        "total": total,
    }


def _log_curve(config: CurveConfig, name: str, curve: dict[str, Any]) -> None:
    """Put a curve into an MLflow run of its own, a child of the training `name`."""
    tracker, digest = open_tracker(config, open_storage(config.storage)), fingerprint(curve["protocol"])
    training = tracker.find(TRAIN, name)
    tracked = tracker.run(
        COMPRESSION,
        f"{name}-compression-{digest[:6]}",
        digest,
        params=flatten(curve["protocol"]),
        tags={RUN_TAG: name, DATA_TAG: curve["protocol"]["data"]},
        parent=training.run_id if training else None,
    )
    tracked.log_json(COMPRESSION_CURVE, curve)
    tracked.finish()


def describe_curve(curve: dict[str, Any]) -> list[str]:
    """The curve in lines. curve: what measure_curve returned."""
    lossless, theory, account, overhead = (curve[name] for name in ("lossless", "theory", "account", "overhead"))
    speed = curve[IMAGES_PER_SECOND]
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
    points += [(FORMATS[form], point) for form, of_format in curve["lossy"].items() for point in of_format]
    return lines + [f"{name}: {point['rate']:.3f} bits/dim, RMSE {point['rmse']:.2f}" for name, point in points]


def draw_curve(curve: dict[str, Any]) -> Figure:
    """Distortion against rate, as the right panel of the paper's Fig. 5."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = [
        ("files cut at their checks", curve["coded"], "o-"),
        *(
            (name, curve["lossy"][form], style)
            for (form, name), style in zip(FORMATS.items(), ("s:", "^:"), strict=True)
        ),
    ]
    for label, points, style in lines:
        axes.plot([point["rate"] for point in points], [point["rmse"] for point in points], style, ms=4, label=label)
    theory = curve["theory"]
    axes.plot(theory["rate"], theory["rmse"], "k--", lw=1, label="theory: L_T + .. + L_t")
    for (name, rate), style in zip(curve["lossless"].items(), ("-", ":", "-."), strict=True):
        axes.axvline(rate, color="grey", lw=1, ls=style, label=f"{name} lossless, {rate:.2f}")
    axes.set(xlabel="bits/dim", ylabel="RMSE of 0..255", xscale="symlog", ylim=(0, None), xlim=(0, None))
    axes.legend(fontsize=8)
    return figure
