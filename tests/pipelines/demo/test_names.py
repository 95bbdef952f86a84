"""Run names and fingerprints of the demo's first version: whoever has such results finds them again."""

from dataclasses import replace

from ddpm_core.protocol import Protocol, fingerprint
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.illustrate.pictures import PictureProtocol
from pipelines.sweep.config import ScheduleSweep
from pipelines.sweep.driver import sweep_identity
from pipelines.train.config import TrainConfig, config_for

DIGITS = "afc03747abd568c01d4e0b9a162e13395b412b7cdd850dbcf03c3b6cac01607f"
TRAIN = config_for("tiny", shards="digits", steps=1200, workers=2)
PROTOCOL = Protocol(
    num_samples=1000,
    seed=0,
    sampler="ddim",
    sampler_steps=20,
    spacing="uniform",
    clip_denoised=True,
    weights="ema",
    batch_size=100,
    precision="float32",
    extractor="digits",
    extractor_sha256="677fd910041652bcd6dd0d09818100c6e2c66f7f8c71edb709b65cfc5d9fda79",
    resize="none",
    reference="digits",
    reference_sha256=DIGITS,
    reference_images=1797,
)


def name_of(config: TrainConfig) -> str:
    return f"{config.preset}-{fingerprint(config.identity(DIGITS))}"


def test_trainings_keep_their_names() -> None:
    assert name_of(TRAIN) == "tiny-7a114954249b"
    assert name_of(replace(TRAIN, seed=1)) == "tiny-35df745d2e0d"
    quad = replace(TRAIN, seed=1, diffusion=replace(TRAIN.diffusion, schedule="quad"))
    assert name_of(quad) == "tiny-a20e933b924f"


def test_protocols_keep_their_fingerprints() -> None:
    assert (PROTOCOL.fingerprint, PROTOCOL.samples_fingerprint) == ("acec099d4ff7", "6426877a21a5")
    report = replace(PROTOCOL, purpose="report")
    assert (report.fingerprint, report.samples_fingerprint) == ("c92c4791f6fd", "7b323c650f06")


def test_pictures_keep_their_fingerprint() -> None:
    drawn = PictureProtocol(
        rows=4,
        seed=0,
        sampler="ddim",
        sampler_steps=20,
        spacing="uniform",
        weights="ema",
        precision="float32",
        data="digits",
        data_sha256=DIGITS,
    )
    assert fingerprint(drawn) == "600bc6274d1a"


def test_sweeps_keep_their_names() -> None:
    measured = EvaluateConfig(
        run="any",
        samples=1000,
        chunk_size=100,
        batch_size=100,
        sampler="ddim",
        sampler_steps=20,
        extractor="pixels",
    )
    config = ScheduleSweep(train=replace(TRAIN, seed=1, steps=200, workers=1), evaluate=measured)
    names = {"linear": ["tiny-35df745d2e0d"], "quad": ["tiny-a20e933b924f"]}
    assert fingerprint(sweep_identity(config, names, "pixels")) == "7ad94d399b8c"
    other = replace(config, evaluate=replace(measured, eta=0.5))
    assert fingerprint(sweep_identity(other, names, "pixels")) != "7ad94d399b8c"
