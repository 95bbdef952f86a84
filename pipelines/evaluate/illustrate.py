"""What is shown of one checkpoint besides its numbers: pictures and nearest training images, made and put into MLflow."""

import torch
from torch import Tensor

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.protocol import fingerprint
from pipelines.evaluate.evaluator import Evaluator
from pipelines.evaluate.neighbours import Memorization, look_up
from pipelines.evaluate.pictures import Picture, PictureProtocol, draw_pictures
from pipelines.evaluate.worker import sample_checkpoints
from pipelines.runtime.chunks import load_chunk


def illustrate(evaluator: Evaluator, checkpoint: Checkpoint) -> Memorization | None:
    """Draw the pictures and look up the neighbours that are asked for, or find them there; what the latter say."""
    config, dataset = evaluator.config, evaluator.references["train"]
    if not (config.pictures or config.nearest):
        return None
    protocol = evaluator.protocol("train", config.noise)
    pictures: list[Picture] = []
    memorization = None
    with evaluator.tracked({"train": protocol}) as runs:
        if config.pictures:
            drawn = PictureProtocol(
                rows=config.pictures,
                seed=protocol.seed,
                sampler=protocol.sampler,
                sampler_steps=protocol.sampler_steps,
                spacing=protocol.spacing,
                weights=protocol.weights,
                precision=protocol.precision,
                data=dataset.name,
                data_sha256=dataset.sha256,
            )
            folder = evaluator.storage / "evaluate" / evaluator.name / f"pictures-{fingerprint(drawn)}"
            pictures += draw_pictures(
                checkpoint, dataset, drawn, folder / checkpoint.path.name, evaluator.pool, evaluator.say
            )
        if config.nearest:
            samples = first_samples(evaluator, checkpoint)
            memorization = look_up(
                samples,
                evaluator.references.get("test"),
                dataset,
                evaluator.spec,
                evaluator.samples(config.noise) / checkpoint.path.name / f"neighbours-{dataset.sha256[:12]}",
                seed=protocol.seed,
                pool=evaluator.pool,
                say=evaluator.say,
            )
            pictures += memorization.pictures(samples, dataset)
            evaluator.say(f"evaluate: step {checkpoint.step:,} has {memorization.describe(protocol)}")
        run, name = runs["train"], checkpoint.path.name
        if memorization is not None:
            evaluator.log(run, checkpoint, protocol, memorization.values(protocol))
            run.log_json(f"neighbours/{name}.json", memorization.facts())
        files = {picture.kind: picture.png() for picture in pictures}
        facts = [picture.facts(files[picture.kind]) for picture in pictures]
        if run.read_json(f"pictures/{name}/pictures.json") != facts:
            for picture in pictures:
                run.log_bytes(f"pictures/{name}/{picture.kind}.png", files[picture.kind])
            run.log_json(f"pictures/{name}/pictures.json", facts)
    return memorization


def first_samples(evaluator: Evaluator, checkpoint: Checkpoint) -> Tensor:
    """The samples 0, 1, .. of a checkpoint that are looked up, uint8 [n,h,w,c]; those whose images an earlier evaluation
    did not keep are made again."""
    chunks = [indices for indices in evaluator.chunks if indices.start < evaluator.config.nearest]
    config = evaluator.config
    folder = evaluator.samples(config.noise)
    settings = evaluator.settings(evaluator.protocol("train", config.noise))
    for _ in sample_checkpoints([checkpoint], chunks, folder, settings, evaluator.spec, evaluator.pool, evaluator.say):
        pass
    images = [load_chunk(folder / checkpoint.path.name, indices)[0]["images"] for indices in chunks]
    return torch.cat(images)[: evaluator.config.nearest]
