"""A checkpoint as a model that MLflow loads: images by number and seed, the weights left where they are."""

import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from support.measured_run import measured_run, record
from support.places import on_disk

from ddpm_core import images, rng
from ddpm_core.errors import InputError
from ddpm_core.samplers import sample
from pipelines.checkpoints.network import NetworkHolder
from pipelines.evaluate.subject import Subject
from pipelines.tracking.registry import Registry
from pipelines.tracking.tracker import Tracker

# What MLflow says of its own type hints when its pyfunc is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType")

META = "registered_model_meta"  # of MLflow, when it loads a model by a registered name
ADDRESS = "models:/digits@best-fid"


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A run whose checkpoint of step 20 the alias best-fid points at."""
    storage = tmp_path_factory.mktemp("storage")
    subject = measured_run(storage, {10: 9.0, 20: 4.0})
    tracker = Tracker(f"sqlite:///{storage}/mlflow.db", "pyfunc", storage / "mlartifacts" / "pyfunc")
    training = record(tracker, subject)
    model_id = training.model_of(subject.run.name, subject.checkpoints[1])
    Registry(tracker.client, "digits").set_alias("best-fid", model_id, training.run_id, {})
    return subject


@pytest.fixture
def storage(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its storage, whose database is MLflow's default."""
    storage = on_disk(subject.run.evaluations).parent.parent
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{storage}/mlflow.db")  # set_tracking_uri() has no way back
    return storage


def predicted(count: int, **params: int) -> Any:
    return mlflow.pyfunc.load_model(ADDRESS).predict(count, params=params or None)


def test_the_alias_of_the_best_loads_and_draws_its_samples(subject: Subject, storage: Path) -> None:
    model = mlflow.pyfunc.load_model(ADDRESS)
    drawn = model.predict(5)
    assert (drawn.shape, drawn.dtype) == ((5, 8, 8, 1), np.uint8)
    assert np.array_equal(model.predict(2), drawn[:2])
    diffusion, network = NetworkHolder("ema").of(subject.checkpoints[1])
    noise = rng.SampleNoise(0, torch.arange(4), (1, 8, 8), purpose="selection")
    expected = sample(diffusion, network, (4, 1, 8, 8), noise=noise, method="ancestral", steps=20)
    assert np.array_equal(drawn[:4], images.to_uint8(expected).numpy())
    seeded, faster = model.predict(2, params={"seed": 1}), model.predict(2, params={"steps": 3})
    assert not np.array_equal(seeded, drawn[:2])
    assert not np.array_equal(faster, drawn[:2])


def test_a_model_has_a_signature_and_one_small_file(storage: Path) -> None:
    model = mlflow.pyfunc.load_model(ADDRESS)
    signature = model.metadata.signature
    assert [spec.shape for spec in signature.outputs.inputs] == [(-1, 8, 8, 1)]
    assert {spec.name: spec.default for spec in signature.params.params} == {"seed": 0, "steps": 20}
    files = [path for path in (storage / "mlartifacts").rglob("models/*/artifacts/**/*") if path.name != META]
    assert [path.name for path in files] == ["MLmodel", "MLmodel"]
    assert all(path.stat().st_size < 2000 for path in files)


def test_what_cannot_be_drawn_is_refused_in_a_sentence(storage: Path) -> None:
    model = mlflow.pyfunc.load_model(ADDRESS)
    with pytest.raises(InputError, match="give one number of images, 1 or more"):
        model.predict(0)
    with pytest.raises(InputError, match="give one number of images, 1 or more"):
        model.predict([1, 2])
    with pytest.raises(InputError, match="steps 21: give 1 to 20"):
        model.predict(1, params={"steps": 21})


def test_weights_are_found_in_a_storage_that_moved_or_missed_in_a_sentence(storage: Path, tmp_path: Path) -> None:
    drawn = predicted(1)
    weights, elsewhere = storage / "train", tmp_path / "train"
    try:
        shutil.move(weights, elsewhere)
        with pytest.raises(
            InputError, match=r"are not at '.*step-00000020': if their storage has moved, give its path"
        ):
            mlflow.pyfunc.load_model(ADDRESS)
        there = mlflow.pyfunc.load_model(ADDRESS, model_config={"storage": str(tmp_path)})
        assert np.array_equal(there.predict(1), drawn)
    finally:
        shutil.move(elsewhere, weights)
    shutil.copytree(storage, tmp_path / "copy")
    files = next((tmp_path / "copy").rglob("models/*/artifacts"))
    hidden = storage.rename(storage.with_name("hidden"))
    try:  # a whole storage, with the model's files in it
        assert mlflow.pyfunc.load_model(str(files)).predict(1).shape == (1, 8, 8, 1)
    finally:
        hidden.rename(storage)


def test_a_checkpoint_that_was_made_anew_is_not_taken_for_the_models(subject: Subject, storage: Path) -> None:
    manifest = Path(str(subject.checkpoints[1].path)) / "manifest.json"
    before = manifest.read_text()
    sha256 = subject.checkpoints[1].weights_sha256("ema")
    try:
        manifest.write_text(before.replace(sha256, "0" * 64))
        with pytest.raises(InputError, match="was made anew since MLflow recorded this model"):
            mlflow.pyfunc.load_model(ADDRESS)
    finally:
        manifest.write_text(before)
