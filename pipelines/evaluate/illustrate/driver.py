"""What is shown of one checkpoint besides its numbers: pictures and nearest training images, made and put into MLflow."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.protocol import Protocol, fingerprint
from ddpm_core.records import neighbours_path, picture_path, pictures_path
from pipelines.evaluate.illustrate.pictures import Picture, PictureProtocol, draw_pictures
from pipelines.evaluate.records import Records
from pipelines.evaluate.subject import Subject
from pipelines.runtime.fan_out import Pool
from pipelines.storage.chunks import load_chunks
from pipelines.tracking.run import TrackedRun

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.evaluate.illustrate.neighbours import Memorization


def illustrate(subject: Subject, records: Records, checkpoint: Checkpoint, pool: Pool) -> "Memorization | None":
    """Draw the pictures and look up the neighbours that are asked for, or find them there; what the latter say."""
    config = subject.config
    if not (config.pictures or config.nearest):
        return None
    protocol = subject.protocol("train", config.noise)
    pictures: list[Picture] = []
    memorization = None
    with records.open({"train": protocol}) as runs:
        if config.pictures:
            pictures += pictures_of(subject, checkpoint, protocol, pool)
        if config.nearest:
            memorization, nearest = memorization_of(subject, checkpoint, protocol, pool)
            pictures += nearest
            records.log(runs["train"], checkpoint, protocol, memorization.values(protocol))
            runs["train"].log_json(neighbours_path(checkpoint.step), memorization.facts())
        log_pictures(runs["train"], checkpoint, pictures)
    return memorization


def pictures_of(subject: Subject, checkpoint: Checkpoint, protocol: Protocol, pool: Pool) -> list[Picture]:
    """Progressive generation, shared latents and interpolations (Fig. 6 to 9)."""
    dataset = subject.references["train"]
    drawn = PictureProtocol(
        rows=subject.config.pictures,
        seed=protocol.seed,
        sampler=protocol.sampler,
        sampler_steps=protocol.sampler_steps,
        spacing=protocol.spacing,
        eta=protocol.eta,
        var_type=protocol.var_type,
        ema_length=protocol.ema_length,
        weights=protocol.weights,
        precision=protocol.precision,
        data=dataset.name,
        data_sha256=dataset.sha256,
    )
    folder = subject.run.pictures(fingerprint(drawn)) / checkpoint.path.name
    return draw_pictures(checkpoint, dataset, drawn, folder, pool)


def memorization_of(
    subject: Subject, checkpoint: Checkpoint, protocol: Protocol, pool: Pool
) -> "tuple[Memorization, list[Picture]]":
    """How many of the first samples look memorized, and those nearest to training images."""
    from pipelines.evaluate.illustrate.neighbours import find_neighbours  # here: with torchmetrics

    dataset = subject.references["train"]
    samples = first_samples(subject, checkpoint, pool)
    memorization = find_neighbours(
        samples,
        subject.references.get("test"),
        dataset,
        subject.extractor,
        subject.samples(subject.config.noise) / checkpoint.path.name / f"neighbours-{dataset.sha256[:12]}",
        seed=protocol.seed,
        pool=pool,
    )
    pool.say(f"evaluate: step {checkpoint.step:,} has {memorization.describe(protocol)}")
    return memorization, memorization.pictures(samples, dataset)


def first_samples(subject: Subject, checkpoint: Checkpoint, pool: Pool) -> "Tensor":
    """The samples 0, 1, .. of a checkpoint that are looked up, uint8 [n,h,w,c]; those whose images an earlier evaluation
    did not keep are made again."""
    import torch

    from pipelines.evaluate.worker import sample_checkpoints

    nearest, noise = subject.config.nearest, subject.config.noise
    chunks = [indices for indices in subject.chunks if indices.start < nearest]
    folder = subject.samples(noise)
    for _ in sample_checkpoints([checkpoint], chunks, folder, subject.settings(noise), subject.extractor.spec, pool):
        pass
    images = [chunk["images"] for _, chunk, _ in load_chunks(folder / checkpoint.path.name, chunks)]
    return torch.cat(images)[:nearest]


def log_pictures(run: TrackedRun, checkpoint: Checkpoint, pictures: Sequence[Picture]) -> None:
    """Put pictures into MLflow, unless the same are there."""
    step = checkpoint.step
    files = {picture.kind: picture.png() for picture in pictures}
    facts = [picture.facts(files[picture.kind]) for picture in pictures]
    if run.read_json(pictures_path(step)) != facts:
        for kind, png in files.items():
            run.log_bytes(picture_path(step, f"{kind}.png"), png)
        run.log_json(pictures_path(step), facts)
