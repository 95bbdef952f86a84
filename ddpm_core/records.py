"""What MLflow holds: the names that pipelines write and reports read.

One training is one MLflow run of the kind TRAIN. What is measured of its checkpoints lies in runs below it: one for each
protocol, EVALUATE, LIKELIHOOD and COMPRESSION, and one for each checkpoint that an evaluation measured under a protocol,
CHECKPOINT. A run of the kind SWEEP stands above the trainings of its trials; that of the kind REPORT holds the newest report.
Paths are of artifacts; a metric's step is the training step of the checkpoint that it is of.
"""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, Final, Literal

Kind = Literal["train", "evaluate", "checkpoint", "likelihood", "compression", "sweep", "report"]
TRAIN: Final = "train"
EVALUATE: Final = "evaluate"
CHECKPOINT: Final = "checkpoint"
LIKELIHOOD: Final = "likelihood"
COMPRESSION: Final = "compression"
SWEEP: Final = "sweep"
REPORT: Final = "report"

# Tags of runs, of models (a checkpoint's weights), and of a registered model's versions.
KIND_TAG = "ddpm.kind"  # a Kind
FINGERPRINT_TAG = "ddpm.fingerprint"  # of the configuration (train, sweep) or of the protocol
CODE_VERSION_TAG = "ddpm.code_version"
STARTED_TAG = "ddpm.started"  # seconds, when a run was last begun or gone on with
STEPS_TAG = "ddpm.steps"  # of a training, up to which it was last asked to go
PRESET_TAG = "ddpm.preset"
WORKERS_TAG = "ddpm.workers"
DEVICE_TAG = "ddpm.device"  # such as "2 x CPU"
EXECUTION_TAG = "ddpm.execution"  # why a training is executed as its values execution.* say
PEAK_TAG = (
    "ddpm.peak"  # of a training's GPUs, what its utilisation is a share of, such as "989 TFLOP/s, the data sheet's"
)
CPU_DEVICE = "CPU"  # what that ends with for workers without a GPU
ALARM_TAG = "ddpm.alarm"  # what a person must know of a run, in sentences; empty if all is well
DISTANCE_TAG = "ddpm.distance"  # the name of an evaluation's distance
DATA_TAG = "ddpm.data"  # the name of a data set
RUN_TAG = "ddpm.run"  # the name of the training, or of the weights from elsewhere, that was measured
STEP_TAG = "ddpm.step"
PROTOCOL_TAG = "ddpm.protocol"  # a fingerprint
PURPOSE_TAG = "ddpm.purpose"  # of an evaluation's noise: selection, report
SAMPLES_TAG = "ddpm.samples"  # of a training: how many, under the protocol of its best_fid
STANDING_TAG = "ddpm.standing"  # of a checkpoint under a protocol: a Verdict
PATH_TAG = "ddpm.path"  # where a checkpoint lies
SHA256_TAG = "ddpm.sha256"  # of a checkpoint's weights
ALIAS_TAG = (
    "ddpm.alias"  # of a registered model's version: why an alias came to it or left it, which its description says too
)
NOTE_TAG = "ddpm.note"  # a fingerprint of MLflow's note on a run as this project wrote it: a person may have changed it
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: the id of the run above a run

# A tag of an experiment: begins those that hold views of the table of runs, as MLflow's UI writes them to share them.
SHARED_VIEW = "mlflow.sharedViewState."
LOCAL_UI = "http://127.0.0.1:5000"  # where `make ui` serves a database on disk

# Artifacts of a training.
CONFIG = "config.json"
DATA_CARD = "data/card.json"
CONTACT_SHEET = "data/contact_sheet.png"
CONTACT_SHEET_LAYOUT = "data/contact_sheet.json"
DIVERGED = "diverged.json"  # the batch at which a training stopped being finite
# Of an evaluation, a likelihood and a compression.
PROTOCOL = "protocol.json"
SAMPLES_LAYOUT = "samples/grid.json"
LIKELIHOOD_PROTOCOL = "likelihood/protocol.json"
COMPRESSION_CURVE = "compression/curve.json"
# Of a sweep.
SCHEDULES = "schedules.json"
TRIALS = "trials.json"
SUMMARY = "summary.json"

# Metrics of a training, as its records and checkpoints name them; what MLflow calls them says training_metric().
LOSS = "loss"
GRAD_NORM = "grad_norm"
PARAM_NORM = "param_norm"
LEARNING_RATE = "lr"
IMAGES_PER_SECOND = "images_per_second"
UTILISATION = "model_flops_utilisation"
DATA_WAIT_SHARE = "data_wait_share"
MEMORY_GIB = "memory_gib"
# Of a checkpoint's run, by which a table of runs sorts.
STEP = "step"
IMAGES_SEEN = "images_seen"
# Of an evaluation; those of features pass through Protocol.metric(), which names the extractor too.
KID = "kid"
PRECISION = "precision"
RECALL = "recall"
SPREAD = "spread"  # the standard deviation of the samples' features over that of the data's
SATURATION = "saturation"  # the share of the samples' values that are black or white
SATURATION_DATA = "saturation_data"  # that of the data's
SAMPLES_PER_SECOND = "samples_per_second"  # of one worker
EMA_ERROR = (
    "ema_error"  # the profile of an EMA made after the training: how far it is from the wanted one, over its norm
)
MEMORIZED = "memorized"  # the fraction of samples that look like copies of training images, by pixels
MEMORIZED_FEATURES = "memorized_features"  # by features
# Of a likelihood, in bits/dim but for the last.
BPD = "bpd"  # the whole bound
BPD_SE = "bpd_se"
RATE_BPD = "rate_bpd"  # L_1 + .. + L_T
DISTORTION_BPD = "distortion_bpd"  # L_0
PRIOR_BPD = "prior_bpd"  # L_T
RMSE = "rmse"  # of the x_0 predicted from x_1, on 0..255
# What follows a metric's name.
CI_LOW, CI_HIGH = "_ci_low", "_ci_high"  # the ends of its 95 % interval
STD = "_std"  # its standard deviation, over splits or subsets
INFINITY = "_infinity"  # its extrapolation to infinitely many samples
HELD_OUT = "_held_out"  # the same of images held out


def training_metric(name: str) -> str:
    """A training's metric as MLflow calls it: what stands before the slash is a section of its charts.

    >>> training_metric(LOSS), training_metric(IMAGES_PER_SECOND)
    ('train/loss', 'speed/images_per_second')
    """
    speed = name in (IMAGES_PER_SECOND, UTILISATION, DATA_WAIT_SHARE, MEMORY_GIB)
    return f"{'speed' if speed else 'train'}/{name}"


def record_metric(name: str) -> str:
    """What training_metric() was made of; earlier versions gave MLflow that itself."""
    return name.removeprefix("train/").removeprefix("speed/")


def best_metric(distance: str) -> str:
    """The metric of a training's run that holds the lowest distance of its checkpoints, and for STEP whose that is."""
    return f"best_{distance}"


def newest_metric(distance: str) -> str:
    """The metric of a training's run that holds the distance of its newest checkpoint."""
    return f"newest_{distance}"


def curve_metric(distance: str, protocol: str) -> str:
    """The metric of a training's run that holds the distance of its checkpoints under a protocol, given by its fingerprint."""
    return f"eval/{distance}_{protocol[:6]}"


def loss_quarter(number: int) -> str:
    """The metric of the loss over a quarter of the timesteps, 1..4."""
    return f"loss_q{number}"


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's folder, and of what is measured of it."""
    return f"step-{step:08d}"


def training_samples_path(step: int) -> str:
    """A grid of samples from a training that goes on."""
    return f"training/samples-{step:08d}.png"


def samples_path(step: int) -> str:
    """The grid of a checkpoint's first samples, laid out as SAMPLES_LAYOUT says."""
    return f"samples/{checkpoint_name(step)}.png"


def chain_path(step: int) -> str:
    """The distances of the x_0 predicted along the chain."""
    return f"progress/{checkpoint_name(step)}.json"


def neighbours_path(step: int) -> str:
    """What the nearest training images of a checkpoint's samples say."""
    return f"neighbours/{checkpoint_name(step)}.json"


def picture_path(step: int, file: str) -> str:
    """A file among the pictures of what a checkpoint does on the way."""
    return f"pictures/{checkpoint_name(step)}/{file}"


def pictures_path(step: int) -> str:
    """The list of those pictures."""
    return picture_path(step, "pictures.json")


def likelihood_path(step: int) -> str:
    """A checkpoint's bits/dim and curves."""
    return f"likelihood/{checkpoint_name(step)}.json"


def rung_path(steps: int) -> str:
    """What a sweep's trials came to at a rung."""
    return f"rungs/{steps:08d}.json"


def ranking_place(experiment_id: str, protocol: str) -> str:
    """Where in MLflow's UI the table of all checkpoints under a protocol is, given by its fingerprint, which its view is
    shared by; a link on a page of the UI itself."""
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={protocol}"


def ranking_link(tracking_uri: str, experiment_id: str, protocol: str) -> str:
    """The link to that table from elsewhere. A database on disk is looked at through `make ui`.

    >>> ranking_link("https://tracking/", "1", "ab12")
    'https://tracking/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=ab12'
    """
    base = tracking_uri.rstrip("/") if tracking_uri.startswith("http") else LOCAL_UI
    return f"{base}/{ranking_place(experiment_id, protocol)}"


def flatten(config: Any, prefix: str = "") -> dict[str, str]:
    """A nested configuration as MLflow parameters.

    >>> flatten({"unet": {"ch": 128, "ch_mult": (1, 2)}, "steps": 10})
    {'unet.ch': '128', 'unet.ch_mult': '1, 2', 'steps': '10'}
    """
    plain = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config
    flat: dict[str, str] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return flat
