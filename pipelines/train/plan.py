"""What a training run will be, in words, before anything is started."""

from dataclasses import replace

from ddpm_core.configs import Precision
from ddpm_core.costs import averages_bytes, plan
from ddpm_core.devices import Peak, peak_flops
from ddpm_core.errors import InputError, did_you_mean
from ddpm_core.posthoc_ema import chosen_steps
from ddpm_core.records import flatten
from pipelines.train.config import TrainConfig

GPUS = ("A100", "H100 80GB HBM3", "H200", "B200", "L40S", "L4")


def known_peak(gpu: str, precision: Precision) -> Peak:
    """The peak of a GPU by its name. InputError for one that is not known here."""
    peak = peak_flops(gpu, precision)
    if peak is None:
        near = did_you_mean(gpu, GPUS)
        raise InputError(f"--gpu is {gpu!r}, whose peak FLOP/s are not known here{near}: give one of {', '.join(GPUS)}")
    return peak


def describe_plan(config: TrainConfig, gpu: str, utilisation: float) -> str:
    """The resolved configuration, and what it costs on `config.workers` GPUs of a kind used to a fraction.

    InputError for a GPU whose speed is not known here, or a fraction that is none.
    """
    if config.execution.mode != "exact":  # the GPUs that are known here multiply in bfloat16
        config = replace(config, execution=config.execution.resolved(fast=True))
    peak = known_peak(gpu, config.execution.network_precision)
    if not 0.0 < utilisation <= 1.0:
        raise InputError(f"--utilisation is {utilisation}: give a fraction of the peak, above 0 and up to 1")
    costs = plan(
        config.unet,
        config.optim,
        config.execution,
        steps=config.steps,
        checkpoint_every=config.checkpoint_every,
        workers=config.workers,
        peak_flops=peak.flops,
        utilisation=utilisation,
    )
    memory, assumed = costs.memory, f"assumed to do {utilisation:.0%} of {peak.describe()}"
    parts = ("weights", "gradients", "adam", "ema", "activations")
    each = ", ".join(f"{name} {getattr(memory, name) / 2**30:.1f}" for name in parts)
    size = costs.checkpoint_bytes
    kept = kept_checkpoints(config)
    left = chosen_steps(range(config.checkpoint_every, config.steps, config.checkpoint_every))
    bytes_left = len(left) * averages_bytes(config.unet, config.optim)
    averages = f", and {bytes_left / 1e9:,.1f} GB of averages that deleted ones leave" if bytes_left else ""
    rows = {
        "parameters": f"{costs.parameters:,}",
        "FLOPs": f"{costs.step_flops / 1e12:,.2f} T a step, {costs.training_flops / 1e9:,.2f} G an image",
        "memory": f"at least {memory.total / 2**30:.1f} GiB a GPU: {each}",
        "speed": f"{costs.images_per_second:,.0f} images/s on {config.workers} x {gpu}, {assumed}",
        "time": f"{costs.hours:,.1f} hours for {config.steps:,} steps",
        "disk": f"{kept * size / 1e9:,.1f} GB for at most {kept} checkpoints of {size / 1e9:.2f} GB{averages}",
    }
    values = flatten(config)
    width = max(map(len, values | rows))
    tables = ("\n".join(f"  {name:<{width}}  {value}" for name, value in table.items()) for table in (values, rows))
    return "configuration\n{}\nplan\n{}".format(*tables)


def kept_checkpoints(config: TrainConfig) -> int:
    """How many checkpoints stay at most: the newest, those for ever, and the best."""
    made = -(-config.steps // config.checkpoint_every)
    return min(made, config.keep_last + (config.steps // config.keep_every if config.keep_every else 0) + 1)
