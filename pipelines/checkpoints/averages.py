"""EMA of any length, put together from the averages that a training with post-hoc EMA tracks (ddpm_core/posthoc_ema.py).

A checkpoint that is deleted leaves its averages as averages-STEP-SHA256.safetensors in the run's folder, if they are among
those that are used: of 160 checkpoints at equal distances, 48.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64
from safetensors import SafetensorError

from ddpm_core import typed
from ddpm_core.checkpoint import AVERAGES, Checkpoint, checkpoint_name, open_checkpoint
from ddpm_core.commit import MANIFEST, committed_file
from ddpm_core.configs import TRACKED_LENGTHS
from ddpm_core.errors import InputError
from ddpm_core.posthoc_ema import chosen_steps, reconstruct
from pipelines.checkpoints.store import commit_weights, saved_checkpoints
from pipelines.runtime.progress import Say
from pipelines.storage.lease import MAKING, sole_writer
from pipelines.storage.locations import Location, delete, entries, is_there

if TYPE_CHECKING:
    from torch import Tensor

KEPT = re.compile(r"averages-(\d{8,})-([0-9a-f]{64})\.safetensors")
FAR = 0.05  # of a profile from the wanted one, relative to its norm: above it, that is said


def kept_averages(folder: Location) -> dict[int, Location]:
    """The files that deleted checkpoints of a run have left, by step."""
    named = [(path, KEPT.fullmatch(path.name)) for path in entries(folder)]
    return {int(match[1]): path for path, match in named if match}


def keep_averages(folder: Location, saved: Sequence[int], gone: Sequence[int]) -> None:
    """Before some of the saved checkpoints are deleted: keep of these what is used, if the run tracks averages. Raises OSError
    if that fails."""
    kept = kept_averages(folder)
    for step in sorted(set(gone) & set(chosen_steps({*kept, *saved}))):
        try:
            facts = open_checkpoint(folder / checkpoint_name(step)).files.get(AVERAGES)
        except InputError:  # deleted meanwhile
            continue
        if facts is None:
            continue
        target = folder / f"averages-{step:08d}-{facts['sha256']}.safetensors"
        if not target.is_file():
            _copy(folder / checkpoint_name(step) / AVERAGES, target)
        if step in kept and kept[step].name != target.name:  # of a training that went on otherwise from an earlier step
            delete(kept[step])


def _copy(source: Location, target: Location) -> None:
    if not isinstance(source, Path):
        assert not isinstance(target, Path)  # in the same folder
        source.fs.cp_file(source.path, target.path)  # fs.copy would take a name with brackets for a pattern
        return
    assert isinstance(target, Path)
    with committed_file(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(source, temporary)


def averaged_checkpoint(checkpoint: Checkpoint, length: float, folder: Location, say: Say) -> Checkpoint:
    """A checkpoint's step with an EMA of another length, as a checkpoint of its own in a folder, made if it is not there.

    Raises InputError if its run tracks no averages, or one that is needed is damaged. Says if those that the run kept are too
    few for this length.
    """
    run = checkpoint.path.parent
    if AVERAGES not in checkpoint.files:
        raise InputError(
            f"checkpoint {str(checkpoint.path)!r} has no averages to make an EMA of length {length:g} from: train with "
            "--optim.posthoc-ema, which is another run, or leave --ema-length out"
        )
    kept = kept_averages(run)
    saved = {each.step for each in saved_checkpoints(run) if AVERAGES in each.files}
    steps = chosen_steps((step for step in {*kept, *saved} if step < checkpoint.step), checkpoint.step)
    weights, error = reconstruct(steps, length)
    if error > FAR:
        say(
            f"checkpoints: step {checkpoint.step:,} has averages of {len(steps)} steps to make an EMA of length {length:g} from, "
            f"whose profile is {error:.0%} off the wanted one: take a later step, a length nearer to "
            f"{' or '.join(f'{each:g}' for each in TRACKED_LENGTHS)}, or train with a smaller --checkpoint-every"
        )
    source = checkpoint.files[AVERAGES]["sha256"]  # which holds all of the training up to here
    made_of = {"length": length, "steps": steps, "error": error, "averages_sha256": source}
    place = folder / checkpoint.path.name

    def found() -> Checkpoint | None:
        there = open_checkpoint(place) if is_there(place / MANIFEST) else None
        return there if there is not None and there.made_of == made_of else None

    made = found()
    if made is None:
        with sole_writer(folder, "EMA weights", say, wait=MAKING):  # who reads it would find it gone for a moment
            made = found()
            if made is None:
                ema = averaged_weights(checkpoint, steps, weights)
                commit_weights(folder, {"step": checkpoint.step, "ema": ema}, {**checkpoint.config, "made_of": made_of})
                made = open_checkpoint(place)
    return made


def averaged_weights(
    checkpoint: Checkpoint, steps: Sequence[int], weights: Float64[np.ndarray, "steps lengths"]
) -> "dict[str, Tensor]":
    """The sum of the averages that a checkpoint's run tracked up to some steps, float32, added up in float64."""
    import torch  # here: one that is made already is found without

    from ddpm_core.training import averages_of

    run = checkpoint.path.parent
    total: dict[str, Tensor] = {}
    for step, row in zip(steps, weights.tolist(), strict=True):
        averages = checkpoint.averages() if step == checkpoint.step else read_averages(run, step)
        for tracked, weight in zip(TRACKED_LENGTHS, row, strict=True):
            for name, tensor in averages_of(averages, f"{tracked:g}").items():
                total.setdefault(name, torch.zeros(tensor.shape, dtype=torch.float64)).add_(tensor, alpha=weight)
    return {name: tensor.float() for name, tensor in total.items()}


def read_averages(run: Location, step: int) -> "dict[str, Tensor]":
    """The averages that a run tracked up to a step, of its checkpoint or what that has left. Raises InputError if neither is
    there, or it is damaged."""
    kept = kept_averages(run).get(step)
    if kept is None:
        try:
            return open_checkpoint(run / checkpoint_name(step)).averages()
        except InputError:
            kept = kept_averages(run).get(step)  # if it was deleted in this moment
            if kept is None:
                raise
    content = typed.read_whole(kept)
    if hashlib.sha256(content).hexdigest() not in kept.name:
        raise InputError(f"file {str(kept)!r} is damaged (sha256 differs): delete it, and do without its averages")
    from safetensors.torch import load

    try:
        return load(content)
    except SafetensorError as error:
        raise InputError(f"file {str(kept)!r} is no safetensors file ({error}): delete it") from error
