"""Reading MLflow: what is not there is said in a sentence, and nothing is created by looking."""

import sqlite3
from pathlib import Path

import pytest
from support.report_experiments import DIGITS, digits, page_of, tracking_uri, writer_of

from ddpm_core.errors import InputError
from reports.build import build_report
from reports.records.records import read_experiment
from reports.records.store import Series, Store, public_uri

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")


def test_a_store_that_does_not_exist_is_not_created(tmp_path: Path) -> None:
    missing = tmp_path / "mlflow.db"
    with pytest.raises(InputError) as raised:
        read_experiment(Store(f"sqlite:///{missing}"), "digits")
    assert str(raised.value) == (
        f"Tracking store sqlite:///{missing} does not exist: there is no file {missing}; "
        "train first, or give the address that the training used."
    )
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    text = tmp_path / "notes.db"
    text.write_text("not a database, but long enough to be read as the header of one " * 20)
    with pytest.raises(InputError, match=r"is not an SQLite database \(file is not a database\); give"):
        read_experiment(Store(f"sqlite:///{text}"), "digits")


def test_a_database_of_something_else_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    before = other.read_bytes()
    with pytest.raises(InputError, match="is an SQLite database without MLflow's tables; give"):
        read_experiment(Store(f"sqlite:///{other}"), "digits")
    assert other.read_bytes() == before


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_folder_that_does_not_exist_is_not_created(tmp_path: Path, prefix: str) -> None:
    with pytest.raises(InputError, match="is not a folder; give the address"):
        read_experiment(Store(f"{prefix}{tmp_path}/mlruns"), "digits")
    assert not list(tmp_path.iterdir())


def test_an_unknown_experiment_is_answered_with_those_there_are() -> None:
    digits()
    with pytest.raises(InputError) as raised:
        read_experiment(Store(tracking_uri()), "digit")
    assert str(raised.value).startswith(
        f"Experiment 'digit' is not in the tracking store {tracking_uri()}, which holds "
    )
    assert "'digits'" in str(raised.value)
    assert str(raised.value).endswith("; name one of those.")


def test_an_experiment_without_a_training_run_gives_no_report(tmp_path: Path) -> None:
    writer_of("prepared").run("preprocess", "shards")
    with pytest.raises(InputError, match=r"has no training run \(of its 1 runs none has the tag ddpm.kind = train\)"):
        build_report(tracking_uri(), "prepared", tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_metrics_by_the_names_of_earlier_versions_are_read_alike() -> None:
    pages = {}
    for name, sections in (("sections", True), ("flat", False)):
        writer = writer_of(f"named-{name}")
        writer.evaluate(writer.train("tiny-named", sections=sections), DIGITS, {100: 5.0, 200: 4.0})
        pages[name] = page_of(f"named-{name}")
    flat, sectioned = pages["flat"], pages["sections"]
    assert flat.section("Training").text == sectioned.section("Training").text
    assert flat.tables("Cost of") == sectioned.tables("Cost of")
    assert flat.tables("Cost of")[0][0][1] == "0.0133"
    charts = [len(page.section("Training").all("svg")) for page in pages.values()]
    assert charts[0] == charts[1] > 5


def test_a_training_that_a_later_version_went_on_with_is_read_by_the_later_names() -> None:
    writer = writer_of("gone-on")
    run = writer.train("tiny-gone-on", sections=False)
    writer.metrics(run, {"train/loss": {10: 7.0, 400: 0.25}})
    store = Store(tracking_uri())
    (record,) = read_experiment(store, "gone-on").runs
    assert record.latest["loss"] == 0.25
    assert store.training_history(run, "loss") == Series(steps=(10, 400), values=(7.0, 0.25))
    assert store.training_history(run, "lr").steps[-1] == 300


def test_the_run_that_holds_the_report_changes_no_report() -> None:
    writer = writer_of("reported")
    writer.evaluate(writer.train("tiny-reported"), DIGITS, {100: 5.0, 200: 4.0})
    before = page_of("reported").source
    writer.run("report", "report")
    page_of.cache_clear()
    assert page_of("reported").source == before


def test_a_protocols_table_in_mlflow_is_linked_if_there_is_one() -> None:
    writer = writer_of("ranked")
    writer.evaluate(writer.train("tiny-ranked"), DIGITS, {100: 5.0, 200: 4.0})
    place = f"http://127.0.0.1:5000/#/experiments/{writer.experiment_id}/runs?"
    links = [element.attributes.get("href", "") for element in page_of("ranked").root.all("a")]
    assert not any(link.startswith(place) for link in links)
    writer.share_view(DIGITS.fingerprint)
    page_of.cache_clear()
    links = [element.attributes.get("href", "") for element in page_of("ranked").root.all("a")]
    assert f"{place}workflowType=machine_learning&viewStateShareKey={DIGITS.fingerprint}" in links


def test_a_repeated_step_counts_as_it_was_written_last() -> None:
    writer = writer_of("resumed")
    run = writer.run("train", "tiny-resumed")
    writer.metrics(run, {"loss": {10: 1.0, 20: 0.5, 30: 0.4}}, timestamp=1000)
    writer.metrics(run, {"loss": {20: 0.25}}, timestamp=2000)
    store = Store(tracking_uri())
    store.runs(store.experiment_id("resumed"))
    assert store.history(run, "loss") == Series(steps=(10, 20, 30), values=(1.0, 0.25, 0.4))


def test_infinity_comes_back_as_infinity() -> None:
    writer = writer_of("infinite")
    run = writer.run("train", "tiny-infinite")
    writer.metrics(run, {"loss": {1: float("inf"), 2: float("-inf")}})
    assert Store(tracking_uri()).history(run, "loss").values == (float("inf"), float("-inf"))


def test_records_are_what_was_logged() -> None:
    ids = digits()
    record = read_experiment(Store(tracking_uri()), "digits")
    assert record.remarks == ()
    assert [run.name[:10] for run in record.runs] == ["tiny-linea", "tiny-quad-", "tiny-cosin", "tiny-const"]
    run = record.runs[0]
    assert (run.run_id, run.batch_size, run.status) == (ids.linear, 64, "FINISHED")
    assert run.card is not None
    assert (run.card.shape, run.card.filter, run.card.skipped) == ((8, 8, 1), None, 0)
    evaluation = next(e for e in run.evaluations if e.protocol == DIGITS)
    point = evaluation.checkpoints[1]
    assert (point.step, point.distance, point.low, point.high) == (200, 9.0, 8.5, 9.5)
    assert (point.score, point.score_std) == (5.2, 0.1)
    assert evaluation.samples[200] == "samples/step-00000200.png"
    assert [trial.status for trial in record.sweeps[0].trials] == [
        "finished",
        "finished",
        "finished",
        "failed",
    ]
    assert record.updated is not None


def test_the_value_at_a_step_is_that_step_and_no_neighbour() -> None:
    series = Series(steps=(10, 20), values=(1.0, 2.0))
    assert [series.at(step) for step in (5, 10, 15, 20, 25)] == [None, 1.0, None, 2.0, None]


def test_a_password_does_not_reach_the_page() -> None:
    assert public_uri("postgresql://me:secret@host:5432/mlflow") == "postgresql://host:5432/mlflow"
    assert public_uri("https://host/mlflow") == "https://host/mlflow"
    assert public_uri("sqlite:////data/mlflow.db") == "sqlite:////data/mlflow.db"
