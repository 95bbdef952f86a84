"""Command lines that a reader can run: what fills a missing cell, and what trains the run again."""

import shlex

from ddpm_core.records import CPU_DEVICE, DEVICE_TAG
from reports.records.entities import RunRecord
from reports.verdicts.presets import changes, preset_of

_JOBS = {
    "cifar10": "jobs/train_cifar10.py",
    "celebahq256": "jobs/train_celebahq.py",
    "lsun_church": "jobs/train_lsun.py church",
    "lsun_bedroom": "jobs/train_lsun.py bedroom",
    "lsun_bedroom_large": "jobs/train_lsun.py bedroom-large",
    "lsun_cat": "jobs/train_lsun.py cat",
    "tiny": "jobs/train_lsun.py tiny",
}
# The databases as LSUN names them.
_SOURCES = {"lsun_church": "church_outdoor_train_lmdb", "lsun_bedroom": "bedroom_train_lmdb", "lsun_cat": "cat"}
# Options beside the preset's that decide the result or how long it takes, with their defaults.
_FURTHER = {"seed": "0", "shuffle_window": "None", "execution.precision": "None", "workers": "1"}
_PLACE = {"storage": "runs", "experiment": "ddpm"}  # the options, with their defaults


def evaluate(run: RunRecord, *options: str) -> str:
    """Evaluate a run: by default under the paper's protocol, 50,000 ancestral samples of the averaged weights."""
    return f"python jobs/evaluate.py --run {shlex.quote(run.name)}{_place(run)}{_joined(options)}"


def likelihood(run: RunRecord, *options: str) -> str:
    """Measure a run's bits/dim, term by term."""
    return f"python jobs/evaluate.py likelihood --run {shlex.quote(run.name)}{_place(run)}{_joined(options)}"


def compression(run: RunRecord) -> str:
    """Code images with a run's model, and set the files beside the theory."""
    return f"python jobs/compress.py curve --run {shlex.quote(run.name)} --data TEST_SHARDS --output curve{_place(run)}"


def train(preset: str, *options: str) -> str:
    """Train a preset, on shards to be named."""
    return f"python {_JOBS[preset]} --shards SHARDS{_joined(options)}"


def lsun_reference(preset: str) -> tuple[str, str]:
    """(the shards of 50,000 LSUN images that Table 3's FIDs are against, the command that makes them)."""
    shards = f"{preset}-50000"
    source = f"--source {_SOURCES[preset]} --output {shards} --image-size 256 --images 50000"
    return shards, f"python jobs/preprocess.py {source}"


def reproduce(run: RunRecord) -> str | None:
    """Train a run again: its preset, and what was changed. None for a preset that is not known here."""
    preset, changed = preset_of(run), changes(run)
    if changed is None or preset not in _JOBS:
        return None
    defaults = dict(_FURTHER)
    if run.tags.get(DEVICE_TAG, CPU_DEVICE).endswith(CPU_DEVICE):
        defaults["execution.precision"] = "float32"  # on a GPU it may not be what it is by default
    further = [name for name, default in defaults.items() if run.params.get(name, default) != default]
    options = [_option(name, run.params[name]) for name in (*sorted(changed), *further)]
    shards = shlex.quote(run.params.get("shards", "SHARDS"))
    return f"python {_JOBS[preset]} --shards {shards}{_joined(options)}{_place(run)}"


def _option(name: str, value: str) -> str:
    """A parameter as MLflow holds it -> an option: several values are separated by blanks, a switch has none."""
    group, _, last = name.replace("_", "-").rpartition(".")
    if value in ("True", "False"):
        return f"--{group}{'.' if group else ''}{'' if value == 'True' else 'no-'}{last}"
    words = " ".join(shlex.quote(word) for word in value.split(", "))
    return f"--{name.replace('_', '-')} {words}"


def _place(run: RunRecord) -> str:
    """Where the run's files and records are, if not at their defaults: what is measured shall stand in the same report."""
    values = {name: run.params.get(name, default) for name, default in _PLACE.items()}
    return "".join(f" --{name} {shlex.quote(value)}" for name, value in values.items() if value != _PLACE[name])


def _joined(options: tuple[str, ...] | list[str]) -> str:
    return "".join(f" {option}" for option in options)
