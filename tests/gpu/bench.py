"""What one GPU does, as one table and as JSON: make bench-gpu, or PYTHONPATH=. python tests/gpu/bench.py

The card and its measured ceilings; training steps of each execution, alone and together; the shares of a step; sampling
steps and what they come to; one run of samples and their features from end to end; the feature network; metrics; a loop over
diffusers' network where that is installed; last, with other options of the compiler. A part that no longer fits the time
says so. With --tiny, at toy size on any device: that it runs, and no number of interest.
"""

import argparse
import copy
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_core import images, rng
from ddpm_core.configs import Execution, OptimConfig, UNetConfig
from ddpm_core.costs import fit_micro_batch, training_flops
from ddpm_core.devices import peak_flops
from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.dropout import dropout_keys
from ddpm_core.inception.network import InceptionV3
from ddpm_core.precision import compile_network, full_float32, in_precision
from ddpm_core.presets import PRESETS
from ddpm_core.samplers import sample, sample_steps
from ddpm_core.training import TrainState, train_step
from ddpm_core.unet import UNet

Row = dict[str, Any]
EXACT = Execution(mode="exact", precision="float32")
FAST = Execution(mode="fast").resolved(fast=True)
ALONE = {
    "exact": EXACT,
    "bfloat16": replace(EXACT, precision="bfloat16"),
    "channels-last": replace(EXACT, channels_last=True),
    "bfloat16, channels-last": replace(EXACT, precision="bfloat16", channels_last=True),
    "compile": replace(EXACT, compile=True),
}
TOGETHER = {"fast": FAST}
# Of the compiler, beside those of precision.UNCUT or in their place: what may be worth taking.
OPTIONS: dict[str, dict[str, Any]] = {
    "the compiler's own limits": {
        "realize_opcount_threshold": 30,
        "realize_reads_threshold": 4,
        "realize_acc_reads_threshold": 8,
    },
    "CUDA graphs": {"triton.cudagraphs": True},
    "small kernels in one": {"combo_kernels": True},
}


@dataclass(frozen=True)
class Size:
    """How large the parts are."""

    small: UNetConfig = PRESETS["cifar10"].unet
    large: UNetConfig = PRESETS["lsun_church"].unet
    batches: tuple[int, int, int] = (
        128,
        16,
        64,
    )  # of the small network, of it on one of eight workers, of the large one
    repeats: int = 20
    samples: tuple[int, ...] = (250, 500, 1000)
    run: int = 2000  # images from end to end, by DDIM in 50 steps
    steps: int = 50
    side: int = 8192  # of the product
    copied: int = 1 << 30  # bytes
    dims: int = 2048
    features: int = 10_000
    compile: bool = True


TINY_UNET = UNetConfig(image_size=8, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.1)
TINY = Size(
    small=TINY_UNET,
    large=TINY_UNET,
    batches=(4, 2, 2),
    repeats=1,
    samples=(2,),
    run=2,
    steps=2,
    side=64,
    copied=1 << 16,
    dims=8,
    features=32,
    compile=False,
)


@dataclass
class Bench:
    """One device, how large everything is, and the rows measured so far. deadline: of time.monotonic()."""

    device: torch.device
    size: Size
    deadline: float = float("inf")
    rows: list[Row] = field(default_factory=list)
    ceiling: float | None = None  # FLOP/s of the product

    def part(self, name: str, measure: Callable[[], Row]) -> None:
        """Add a row, or why there is none."""
        if time.monotonic() > self.deadline:
            self.rows.append({"what": name, "left out": "the time is over"})
            return
        try:
            self.rows.append({"what": name, **measure()})
        except Exception as error:  # a part that a card cannot do is a row too
            self.rows.append(
                {"what": name, "left out": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, action: Callable[[], Any], repeats: int | None = None) -> float:
        """The median of a few calls, each waited for."""
        times = []
        for _ in range(repeats or self.size.repeats):
            self.wait()
            started = time.perf_counter()
            action()
            self.wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def profile(self, action: Callable[[], Any], seconds: float) -> Row:
        """Kernels of a call and the share of its time without one; nothing on a CPU."""
        if self.device.type != "cuda":
            return {}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            action()
            self.wait()
        events = [event for event in profiler.events() or [] if event.device_type.name == "CUDA"]
        busy = sum(event.device_time_total for event in events) * 1e-6
        return {"kernels": len(events), "idle": max(0.0, 1.0 - busy / seconds)}


def card(bench: Bench) -> Row:
    """The device, the versions, and the data sheet's peak."""
    row: Row = {"torch": torch.__version__, "device": str(bench.device)}
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        row |= {"device": properties.name, "memory GiB": properties.total_memory / 2**30, "cuda": torch.version.cuda}
        peak = peak_flops(properties.name, "bfloat16", properties)
        row["peak"] = "unknown" if peak is None else peak.describe()
    return row


def ceilings(bench: Bench) -> Row:
    """Bandwidth of a copy, read and written bytes both counted, and FLOP/s of a bfloat16 product."""
    source = torch.empty(bench.size.copied, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    side = bench.size.side
    a = torch.randn(side, side, device=bench.device).to(torch.bfloat16)
    torch.mm(a, a)
    copy_seconds, product_seconds = bench.seconds(lambda: target.copy_(source)), bench.seconds(lambda: torch.mm(a, a))
    bench.ceiling = 2 * side**3 / product_seconds
    return {"copy GB/s": 2 * bench.size.copied / copy_seconds / 1e9, "product TFLOP/s": bench.ceiling / 1e12}


def draw(unet: UNetConfig, pixels: Tensor, positions: Tensor) -> dict[str, Any]:
    """A batch on its device, as training draws it."""
    x_start = images.to_float(pixels)
    return {
        "x_start": x_start,
        "t": rng.integers(0, "t", positions, 0, 1000),
        "noise": rng.normal(0, "noise", positions, 0, x_start.shape[1:]),
        "dropout_key": dropout_keys(0, positions, unet.dropout_layers) if unet.dropout_layers else None,
    }


@dataclass
class Training:
    """A state and what a step of it takes."""

    bench: Bench
    unet: UNetConfig
    batch: int
    execution: Execution
    options: dict[str, Any] = field(default_factory=dict)  # of the compiler

    def __post_init__(self) -> None:
        device = self.bench.device
        self.optim = OptimConfig(batch_size=self.batch)
        if device.type == "cuda":
            capacity = torch.cuda.get_device_properties(device).total_memory
            self.execution = fit_micro_batch(self.unet, self.optim, self.execution, 1, capacity)
            torch.cuda.reset_peak_memory_stats(device)
        self.state = TrainState(UNet(self.unet), self.optim, self.execution)
        if self.options:
            compile_network(self.state.model, **self.options)
        self.state.to(device)
        self.diffusion = PRESETS["cifar10"].diffusion.build().to(device)
        side, channels = self.unet.image_size, self.unet.in_channels
        self.pixels = torch.zeros(self.batch, side, side, channels, dtype=torch.uint8, device=device)
        self.positions = torch.arange(self.batch, device=device)
        compiled = self.execution.compile and device.type == "cuda"
        self.draw = torch.compile(draw, fullgraph=True, dynamic=False) if compiled else draw

    def step(self) -> None:
        data = self.draw(self.unet, self.pixels, self.positions)
        train_step(self.state, self.diffusion, self.state.model, self.optim, **data)

    def measure(self) -> Row:
        bench = self.bench
        first = bench.seconds(self.step, 1)
        for _ in range(2):
            self.step()
        seconds = bench.seconds(self.step)
        flops = training_flops(self.unet) * self.batch / seconds
        row: Row = {"ms": 1e3 * seconds, "images/s": self.batch / seconds, "first step s": first}
        row["at once"] = self.execution.micro_batch or self.batch
        if bench.ceiling is not None:
            row["of the measured ceiling"] = flops / bench.ceiling
        if bench.device.type == "cuda":
            properties = torch.cuda.get_device_properties(bench.device)
            peak = peak_flops(properties.name, self.execution.network_precision, properties)
            if peak is not None:
                row["of the peak"] = flops / peak.flops
            row["GiB"] = torch.cuda.max_memory_allocated(bench.device) / 2**30
        return row | bench.profile(self.step, seconds)

    def shares(self) -> Row:
        """Of a step's time: draw, forward, backward, the rest (clip, Adam, EMA), by waiting after each."""
        bench, model, state = self.bench, self.state.model, self.state
        network = in_precision(model, self.execution.network_precision)
        data = self.draw(self.unet, self.pixels, self.positions)
        keys = () if data["dropout_key"] is None else (data["dropout_key"],)

        def forward() -> Tensor:
            return self.diffusion.training_losses(
                lambda x, t: network(x, t, *keys), data["x_start"], data["t"], data["noise"]
            ).mean()

        def rest() -> None:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            state.optimizer.step()
            state.ema.update(1)

        losses: list[Tensor] = []
        parts: dict[str, Callable[[], Any]] = {
            "draw": lambda: self.draw(self.unet, self.pixels, self.positions),
            "forward": lambda: losses.append(forward()),
            "backward": lambda: losses.pop().backward(),
            "clip, Adam, EMA": rest,
        }
        times = dict.fromkeys(parts, 0.0)
        for number in range(bench.size.repeats + 1):
            state.optimizer.zero_grad(set_to_none=True)
            for name, part in parts.items():
                seconds = bench.seconds(part, 1)
                times[name] += seconds if number else 0.0  # the first is warm-up
        whole = sum(times.values())
        return {name: total / whole for name, total in times.items()}


@contextmanager
def sampler(bench: Bench, execution: Execution) -> Iterator[tuple[GaussianDiffusion, Callable[..., Tensor]]]:
    """(process, network) as evaluation prepares them."""
    network = UNet(bench.size.small)
    if execution.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.to(bench.device).eval()
    if execution.compile:
        compile_network(network)
    with full_float32(bench.device):
        yield (
            PRESETS["cifar10"].diffusion.build().to(bench.device),
            in_precision(network, execution.network_precision),
        )


def noise_of(bench: Bench, count: int, execution: Execution) -> rng.SampleNoise:
    shape = (bench.size.small.in_channels, bench.size.small.image_size, bench.size.small.image_size)
    indices = torch.arange(count, device=bench.device)
    return rng.SampleNoise(0, indices, shape, compiled=execution.compile and bench.device.type == "cuda")


def sampling(bench: Bench, execution: Execution, count: int) -> Row:
    """A step of the ancestral chain, and what 50,000 samples of 1,000 and of 50 such steps come to."""
    noise = noise_of(bench, count, execution)
    with sampler(bench, execution) as (diffusion, network):
        chain = sample_steps(diffusion, network, (count, *noise.shape), noise=noise)
        first = bench.seconds(lambda: next(chain), 1)
        next(chain)
        seconds = bench.seconds(lambda: next(chain))
        row: Row = {"ms": 1e3 * seconds, "first step s": first}
        for steps in (1000, 50):
            row[f"minutes for 50,000 x {steps:,}"] = 50_000 / count * steps * seconds / 60
        return row | bench.profile(lambda: next(chain), seconds)


def end_to_end(bench: Bench, execution: Execution) -> Row:
    """Samples by DDIM, to 8 bits, through the feature network, and their sums: images a second, compilation left out."""
    size, count = bench.size, min(bench.size.run, 500)
    features_of = InceptionV3().to(bench.device)
    with sampler(bench, execution) as (diffusion, network), torch.no_grad():

        def draw_some(first: int, steps: int) -> Tensor:
            noise = replace(
                noise_of(bench, count, execution), indices=torch.arange(first, first + count, device=bench.device)
            )
            x = sample(diffusion, network, (count, *noise.shape), noise=noise, method="ddim", steps=steps)
            return features_of(images.to_uint8(x).permute(0, 3, 1, 2).contiguous())[0].to(torch.float64)

        draw_some(0, 2)
        total = torch.zeros(2048, 2048, dtype=torch.float64, device=bench.device)

        def run() -> None:
            for first in range(0, size.run, count):
                features = draw_some(first, size.steps)
                total.addmm_(features.T, features)

        seconds = bench.seconds(run, 1)
    return {"seconds": seconds, "images/s": size.run / seconds, "images": size.run, "steps": size.steps}


def inception(bench: Bench) -> Row:
    count = 250 if bench.size.compile else 2
    network = InceptionV3().to(bench.device)
    pixels = torch.zeros(count, 3, 32, 32, dtype=torch.uint8, device=bench.device)
    with torch.no_grad(), full_float32(bench.device):
        network(pixels)
        seconds = bench.seconds(lambda: network(pixels), min(5, bench.size.repeats))
    return {"images/s": count / seconds}


def metrics(bench: Bench, device: torch.device) -> Row:
    """Sums of features and an eigen-decomposition of their covariance, float64."""
    features = torch.randn(bench.size.features, bench.size.dims, device=device).to(torch.float64)
    covariance = torch.cov(features.T)
    torch.linalg.eigvalsh(covariance[:8, :8])
    repeats = min(3, bench.size.repeats)
    return {
        "ms": 1e3 * bench.seconds(lambda: torch.cov(features.T), repeats),
        "eigenvalues ms": 1e3 * bench.seconds(lambda: torch.linalg.eigvalsh(covariance), repeats),
    }


def diffusers_loop(bench: Bench) -> Row:
    """A training step by hand around diffusers' network of the same size, in bfloat16 autocast and compiled like ours."""
    if importlib.util.find_spec("diffusers") is None:
        return {"left out": "diffusers is not installed"}
    from diffusers import UNet2DModel

    batch, device = bench.size.batches[0], bench.device
    channels = (128, 256, 256, 256) if bench.size.compile else (32, 32, 32, 32)
    model = UNet2DModel(
        sample_size=32,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        dropout=0.1,
    )
    model.to(device).to(memory_format=torch.channels_last).train()
    predict = torch.compile(model) if bench.size.compile else model
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, fused=device.type == "cuda")
    average = copy.deepcopy(list(model.parameters()))
    x, t = torch.zeros(batch, 3, 32, 32, device=device), torch.zeros(batch, dtype=torch.int64, device=device)

    def step() -> None:
        noise = torch.randn_like(x)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = nn.functional.mse_loss(predict(x + noise, t).sample.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(model.parameters()), 1e-4)

    first = bench.seconds(step, 1)
    step()
    seconds = bench.seconds(step)
    return {"ms": 1e3 * seconds, "images/s": batch / seconds, "first step s": first} | bench.profile(step, seconds)


def run(bench: Bench) -> list[Row]:
    """All parts, those that a person looks at first before the others."""
    size, (whole, share, large) = bench.size, bench.size.batches
    together = TOGETHER if size.compile else {"bfloat16, channels-last": replace(FAST, compile=False)}
    best = next(iter(together.values()))
    bench.part("card", lambda: card(bench))
    bench.part("ceilings", lambda: ceilings(bench))

    def training(unet: UNetConfig, batch: int, executions: dict[str, Execution]) -> None:
        for name, execution in executions.items():
            what = f"train {unet.image_size}x{unet.image_size}, {batch}: {name}"
            bench.part(what, lambda execution=execution: Training(bench, unet, batch, execution).measure())  # type: ignore[misc]

    training(size.small, whole, {"exact": EXACT, **together})
    bench.part("shares of that step", lambda: Training(bench, size.small, whole, best).shares())
    for count in size.samples:
        bench.part(f"sample {count}", lambda count=count: sampling(bench, best, count))  # type: ignore[misc]
    bench.part("sample, exact", lambda: sampling(bench, EXACT, size.samples[0]))
    bench.part("from noise to features", lambda: end_to_end(bench, best))
    bench.part("diffusers' network, loop by hand", lambda: diffusers_loop(bench))
    training(size.small, share, {"exact": EXACT, **together})
    training(size.large, large, {**together, "bfloat16, channels-last": ALONE["bfloat16, channels-last"]})
    bench.part("Inception", lambda: inception(bench))
    for device in dict.fromkeys((bench.device, torch.device("cpu"))):
        bench.part(f"metrics on {device}", lambda device=device: metrics(bench, device))  # type: ignore[misc]
    alone = {name: how for name, how in ALONE.items() if name != "exact" and (size.compile or not how.compile)}
    training(size.small, whole, alone)
    for how, options in OPTIONS.items() if size.compile else ():
        for batch in (whole, share):
            what = f"train {size.small.image_size}x{size.small.image_size}, {batch}: fast, {how}"
            bench.part(what, lambda b=batch, o=options: Training(bench, size.small, b, best, o).measure())  # type: ignore[misc]
    return bench.rows


def table(rows: list[Row]) -> str:
    """A line a row, its values by name."""
    width = max(len(row["what"]) for row in rows)

    def shown(value: Any) -> str:
        return (
            f"{value:,.3g}"
            if isinstance(value, float) and abs(value) < 1000
            else f"{value:,.0f}"
            if isinstance(value, float)
            else str(value)
        )

    return "\n".join(
        f"{row['what']:<{width}}  "
        + ", ".join(f"{name} {shown(value)}" for name, value in row.items() if name != "what")
        for row in rows
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path("bench-gpu.json"))
    parser.add_argument("--minutes", type=float, default=6.0, help="no part begins after so many")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device: give --device cpu --tiny to see that it runs")
    if given.device == "cuda":
        torch.backends.cudnn.benchmark = True  # as training does
    deadline = time.monotonic() + 60.0 * given.minutes
    rows = run(Bench(torch.device(given.device), TINY if given.tiny else Size(), deadline))
    print(table(rows))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
