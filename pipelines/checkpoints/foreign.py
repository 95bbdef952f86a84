"""Weights from and for other programs, in the layout of Hugging Face diffusers."""

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from ddpm_core import typed
from ddpm_core.checkpoint import Checkpoint, checkpoint_name, open_checkpoint
from ddpm_core.commit import write_json
from ddpm_core.configs import DiffusionConfig, identity
from ddpm_core.errors import InputError, one_line
from ddpm_core.interop import CONFIG, OLDER_WEIGHTS, WEIGHTS, from_diffusers, to_diffusers
from ddpm_core.protocol import fingerprint
from pipelines.checkpoints.config import ExportConfig
from pipelines.checkpoints.select import find_checkpoint
from pipelines.checkpoints.store import commit_weights, saved_steps
from pipelines.storage.chunks import content_sha256
from pipelines.storage.layout import Run, Storage, open_storage
from pipelines.storage.lease import MAKING, sole_writer
from pipelines.storage.locations import Location, check_writable, committed_folder, location
from pipelines.tracking.uri import tracking_uri

INDEX = "model_index.json"  # of a pipeline
NOT_IN_NAMES = re.compile(r"[^\w.-]+")  # of a folder, and in searches of MLflow
SCHEDULER = ("scheduler_config.json", "scheduler/scheduler_config.json", "../scheduler/scheduler_config.json")
# What diffusers calls things, and what Ho's code does.
SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
VARIANCES = {"fixed_large": "fixedlarge", "fixed_small": "fixedsmall"}
PREDICTIONS = {"epsilon": "eps", "sample": "xstart", "v_prediction": "v"}
# The schedulers whose process is a beta schedule, as the paper's; others add noise in other ways.
_CLASSES = """
DDPM DDPMParallel DDIM DDIMParallel DDIMInverse PNDM DPMSolverMultistep DPMSolverMultistepInverse DPMSolverSinglestep
DPMSolverSDE UniPCMultistep DEISMultistep EulerDiscrete EulerAncestralDiscrete HeunDiscrete LMSDiscrete KDPM2Discrete
KDPM2AncestralDiscrete
"""
CLASSES = frozenset(f"{name}Scheduler" for name in _CLASSES.split())
HONOURED = frozenset(
    ("beta_schedule", "num_train_timesteps", "beta_start", "beta_end", "prediction_type", "variance_type")
)
# Keys that would make another process or another sampler than ours, with the values that make the same.
FIXED: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "timestep_values": (None,),
    "predict_epsilon": (True, None),  # the older name of prediction_type
    "rescale_betas_zero_snr": (False, None),
    "clip_sample": (True,),  # x_0 is clipped to [-1, 1] in every sampler here
    "clip_sample_range": (1, None),
    "thresholding": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "interpolation_type": ("linear", None),
    "timestep_type": ("discrete", None),
}
# Keys that choose how diffusers' samplers walk through the process, which --sampler and its options choose here, and those of
# thresholding and flow matching, which are off.
_SAMPLING = """
tensor_format timestep_spacing steps_offset set_alpha_to_one set_alpha_to_zero skip_prk_steps
dynamic_thresholding_ratio sample_max_value solver_order solver_type solver_p algorithm_type lower_order_final
euler_at_final disable_corrector predict_x0 use_karras_sigmas use_exponential_sigmas use_beta_sigmas use_lu_lambdas
final_sigmas_type lambda_min_clipped sigma_min sigma_max flow_shift time_shift_type shift_terminal
"""
SAMPLING = frozenset(_SAMPLING.split())


def import_weights(given: str, reference: str | None, storage: Storage) -> tuple[Run, tuple[Checkpoint, ...]]:
    """(the run, its checkpoint) of weights in the diffusers layout, kept from now on as a run of one step 0 in the storage.

    The process is that of a scheduler_config.json in or beside the folder, and the paper's without one. Raises InputError if
    the weights are not the paper's network, or no reference says what to compare with.
    """
    place = location(given, option="--weights")
    if reference is None:
        raise InputError(f"--weights {given!r} has no training set of its own: give --reference")
    with on_disk(place) as folder:
        network, weights = from_diffusers(folder)
        diffusion = scheduler_of(folder)
    digest = fingerprint({"weights": content_sha256(weights), "diffusion": identity(diffusion)})
    name = f"{NOT_IN_NAMES.sub('-', place.name)}-{digest}"
    run = storage.run(name)
    if not saved_steps(run.folder):
        config = {
            "preset": name,
            "unet": asdict(network),
            "diffusion": asdict(diffusion),
            "shards": str(location(reference, option="--reference")),
        }
        with sole_writer(run.folder, "run", wait=MAKING):
            if not saved_steps(run.folder):
                commit_weights(run.folder, {"step": 0, "model": weights, "ema": weights, "optimizer": {}}, config)
    return run, (open_checkpoint(run.folder / checkpoint_name(0)),)


@contextlib.contextmanager
def on_disk(place: Location) -> Iterator[Path]:
    """Weights in the diffusers layout as a local folder: their own, or a temporary copy of what is read of them. Errors name
    the place."""
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="ddpm-") as parent:
        folder = Path(parent) / "pipeline" / "weights"
        for name in (CONFIG, WEIGHTS, OLDER_WEIGHTS, *SCHEDULER):
            source = place.parent / name.removeprefix("../") if name.startswith("../") else place / name
            if (name != OLDER_WEIGHTS or not (folder / WEIGHTS).exists()) and source.is_file():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                source.fs.get_file(source.path, str(target))
        try:
            yield folder
        except InputError as error:
            raise InputError(str(error).replace(str(folder), str(place))) from error


def scheduler_of(folder: Path) -> DiffusionConfig:
    """The process that weights in the diffusers layout were trained for. Raises InputError if it has no counterpart here."""
    path = next((folder / place for place in SCHEDULER if (folder / place).exists()), None)
    if path is None:
        return DiffusionConfig()
    values = cast(dict[str, Any], typed.read_json(path, typed.JsonObject, what="scheduler", advice="fetch it again"))
    try:
        return process_of(values)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(
            f"scheduler {str(path)!r} has {one_line(error)}, which has no counterpart here: remove the file to take the "
            "paper's process"
        ) from error


def process_of(scheduler: Mapping[str, Any]) -> DiffusionConfig:
    """The process of a diffusers scheduler's configuration. Raises ValueError, which names the key, if a value is of another
    process or a key is not known."""
    kind = scheduler.get("_class_name", "DDPMScheduler")
    if kind not in CLASSES:
        raise ValueError(f"_class_name = {kind!r}")
    for key, value in scheduler.items():
        known = key in HONOURED or key in SAMPLING or key.startswith("_")  # such as _diffusers_version
        if not known and value not in FIXED.get(key, ()):
            raise ValueError(f"{key} = {typed.shown(value)}")

    def choice(key: str, default: str, names: Mapping[str, str]) -> Any:
        value = scheduler.get(key, default)
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"{key} = {typed.shown(value)}")
        return names[value]

    def number(key: str, default: float) -> float:
        value = scheduler.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key} = {typed.shown(value)}")
        return value

    timesteps = number("num_train_timesteps", 1000)
    if timesteps != int(timesteps):
        raise ValueError(f"num_train_timesteps = {timesteps!r}")
    return DiffusionConfig(
        schedule=choice("beta_schedule", "linear", SCHEDULES),
        num_timesteps=int(timesteps),
        beta_start=float(number("beta_start", 1e-4)),
        beta_end=float(number("beta_end", 0.02)),
        mean_type=choice("prediction_type", "epsilon", PREDICTIONS),
        # null, in schedulers that know learned variances only, is none stated.
        var_type="fixedsmall" if scheduler.get("variance_type") is None else choice("variance_type", "", VARIANCES),
    )


def export_checkpoint(config: ExportConfig) -> Location:
    """Write a checkpoint as a pipeline of diffusers, whole or not at all; its folder. Raises InputError if it has no counterpart
    there."""
    storage = open_storage(config.storage)
    _, checkpoint = find_checkpoint(config.run, config.checkpoint, storage, tracking_uri(config, storage))
    output = location(config.output, option="--output")
    if output.exists() and not output.is_dir():
        raise InputError(f"--output is {str(output)!r}, a file: give the path of a folder")
    check_writable(output, "--output")
    if output.is_dir() and any(output.iterdir()) and not (output / INDEX).is_file():
        raise InputError(f"--output is {str(output)!r}, a folder with other files in it: give a new or empty one")
    scheduler = scheduler_config(checkpoint.diffusion_config())
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    network, weights = checkpoint.unet_config(), checkpoint.network(config.weights).state_dict()
    with committed_folder(output, {"weights_sha256": checkpoint.weights_sha256(config.weights)}) as folder:
        to_diffusers(folder / "unet", network, weights)
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        write_json(folder / INDEX, {"_class_name": "DDPMPipeline", **parts})
    return output


def scheduler_config(diffusion: DiffusionConfig) -> dict[str, Any]:
    """The scheduler_config.json of a process. A schedule that diffusers has no name for is given by its betas. Raises
    InputError for a variance or prediction that it does not have."""
    schedules, variances, predictions = (
        {here: there for there, here in names.items()} for names in (SCHEDULES, VARIANCES, PREDICTIONS)
    )
    if diffusion.var_type not in variances or diffusion.mean_type not in predictions:
        raise InputError(
            f"the process predicts {diffusion.mean_type!r} with variance {diffusion.var_type!r}, which diffusers does not "
            f"have: export one that predicts {', '.join(predictions)} with {' or '.join(variances)}"
        )
    named = diffusion.schedule in schedules
    return {
        "_class_name": "DDPMScheduler",
        "beta_schedule": schedules[diffusion.schedule] if named else "linear",
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "clip_sample": True,
        "num_train_timesteps": diffusion.num_timesteps,
        "prediction_type": predictions[diffusion.mean_type],
        "trained_betas": None if named else diffusion.betas().tolist(),
        "variance_type": variances[diffusion.var_type],
    }
