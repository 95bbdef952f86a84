"""The laws of the page: the answer is right and leads, nothing is mixed, hidden, fetched or executed."""

import base64
import hashlib
import re
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.report_experiments import (
    ALERT,
    CARD,
    DIGITS,
    FEWER,
    FID,
    Page,
    digits,
    page_of,
    tracking_uri,
    writer_of,
)

import ddpm_core.commit
from ddpm_core.errors import InputError
from reports.build import TEMPLATES, build_report

SCRIPT = TEMPLATES / "report.js"

# MLflow 3.17 over SQLAlchemy 2.1, when it first touches a database.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")


@pytest.fixture
def full() -> Page:
    digits()
    return page_of("digits")


def test_the_headline_names_the_minimum_of_the_leading_protocol(full: Page) -> None:
    (headline,) = full.root.all("h1")
    assert headline.text == "Step 200 has the lowest fd_digits, 9.00"
    (hero,) = full.root.all("header")
    assert "Checkpoint of tiny-linear-0a0a0a0a0a0a. 95 % interval: 8.50 to 9.50." in hero.text
    assert DIGITS.describe() in hero.text
    assert "are not comparable" in hero.text
    assert "the minimum over checkpoints is lower than a fresh measurement" in hero.text


def test_results_of_different_protocols_never_share_a_table(full: Page) -> None:
    (many,) = full.tables(f"Checkpoints by fd_digits (protocol {DIGITS.fingerprint})")
    (few,) = full.tables(f"Checkpoints by fd_digits (protocol {FEWER.fingerprint})")
    assert [row[2] for row in many] == ["9.00", "9.60", "12.00", "40.00"]
    assert [row[2] for row in few] == ["2.75", "3.25", "3.50"]
    (trials,) = full.tables(f"Trials by fd_digits at their last evaluated step (protocol {DIGITS.fingerprint})")
    assert [row[0] for row in trials] == ["linear", "quad"]
    (others,) = full.tables(f"Trials by fd_digits at their last evaluated step (protocol {FEWER.fingerprint})")
    assert [row[0] for row in others] == ["cosine"]


def test_a_checkpoint_whose_interval_overlaps_is_not_distinguishable(full: Page) -> None:
    (rows,) = full.tables(f"Checkpoints by fd_digits (protocol {DIGITS.fingerprint})")
    assert [(row[1], row[4]) for row in rows] == [
        ("200", "best"),
        ("300", "not distinguishable"),
        ("300", "higher"),
        ("100", "higher"),
    ]
    assert "1 of the 3 other checkpoints is not distinguishable from the best" in full.text


def test_the_sweep_concludes_and_shows_its_failed_trial(full: Page) -> None:
    sweep = full.section("Sweep")
    assert (
        "By fd_digits: linear 9.6 is better than quad 12 at 95 % confidence. quad is 2.4 above linear (95 % interval 1.69 to "
        "3.11, of the samples' noise alone: each was trained with one seed)." in sweep.text
    )
    assert full.tables("Trials without a result") == [[["const", "300", "not measured", "failed"]]]
    assert "2.90 × 10⁻⁵" in sweep.text
    assert len(sweep.all("svg")) == 3


def test_samples_stand_in_step_order_with_seed_and_without_choice(full: Page) -> None:
    steps = [figure.text for figure in full.section("Samples").all("figure")]
    assert steps[:3] == [
        "step 100: fd_digits 40.00",
        "step 200: fd_digits 9.00 (best)",
        "step 300: fd_digits 9.60",
    ]
    (hero,) = full.root.all("header")
    assert hero.all("figcaption")[0].text.startswith("16 uncurated samples: indices 0..15 of seed 7, none picked.")
    (image,) = hero.all("img")
    assert image.attributes["src"].startswith("data:image/png;base64,")
    assert int(image.attributes["width"]) >= 500


def test_how_it_was_made_is_told(full: Page) -> None:
    (configuration,) = full.tables("Configuration of tiny-linear")
    assert ["optim.lr", "0.0002", "0.002"] in configuration
    making = full.section("How it was made").text
    for value in (
        "2 x CPU",
        "1,797",
        "8 × 8 × 1",
        DIGITS.fingerprint,
        "diffusion.schedule = quad",
    ):
        assert value in making
    assert f"mlflow runs describe --run-id {digits().linear}" in making
    assert f"mlflow ui --backend-store-uri {tracking_uri()}" in making


def test_images_seen_are_steps_times_the_batch(full: Page) -> None:
    (rows,) = full.tables(f"Checkpoints by fd_digits (protocol {DIGITS.fingerprint})")
    assert rows[0][-1] == "12,800"


def test_the_page_is_accessible(full: Page) -> None:
    (html,) = full.root.all("html")
    assert html.attributes["lang"] == "en"
    levels = [int(heading.tag[1]) for heading in full.root.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    for strip in (element for element in full.elements if element.attributes.get("class") == "at"):
        assert ": " in strip.all("title")[0].text
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(image.attributes["alt"] for image in full.root.all("img"))
    for drawing in full.root.all("svg"):
        assert drawing.attributes["role"] == "img"
        assert " ".join(drawing.attributes["aria-label"].split()) == drawing.all("title")[0].text
    for table in full.root.all("table"):
        assert len(table.all("caption")) == 1
        assert {cell.attributes["scope"] for cell in table.all("th")} == {"col", "row"}
        assert {cell.tag for cell in (row.all("th", "td")[0] for row in table.all("tr"))} == {"th"}
    ids = [element.attributes["id"] for element in full.elements if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    links = [link.attributes["href"] for link in full.root.all("a") if link.attributes["href"].startswith("#")]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_figures_are_well_formed_and_refer_to_themselves(full: Page) -> None:
    drawings = re.findall(r"<svg.*?</svg>", full.source, re.DOTALL)
    assert len(drawings) == 21
    assert drawings[0].count("opacity: 0.16") == 1  # step 300, not distinguishable from step 200
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        ids = {element.get("id") for element in root.iter()}
        used = set(re.findall(r"url\(#([^)]+)\)", drawing)) | set(re.findall(r'href="#([^"]+)"', drawing))
        assert used
        assert used <= ids
        assert not re.search("#0102f[0-9]", drawing), "a placeholder colour is left"


def test_nothing_is_fetched_and_nothing_runs(full: Page) -> None:
    policy = next(e for e in full.root.all("meta") if "content-security-policy" in str(e.attributes).lower())
    (script,) = full.root.all("script")
    digest = base64.b64encode(hashlib.sha256("".join(map(str, script.children)).encode()).digest()).decode()
    assert policy.attributes["content"] == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert_nothing_is_fetched(full)


def test_building_again_gives_the_same_bytes_and_changes_no_store(full: Page, tmp_path: Path) -> None:
    store = Path(tracking_uri().removeprefix("sqlite:///"))
    before = hashlib.sha256(store.read_bytes()).hexdigest()
    again = build_report(tracking_uri(), "digits", tmp_path / "again.html")
    assert again.read_text(encoding="utf-8") == full.source
    assert hashlib.sha256(store.read_bytes()).hexdigest() == before


def test_markup_in_any_name_shows_as_text() -> None:
    writer = writer_of(f"{ALERT} hostile".replace("/", "∕"))
    card = {
        **CARD,
        "name": ALERT,
        "source": ALERT,
        "filter": f'"{ALERT}',
        "sha256": "'><img src=x onerror=alert(1)>",
    }
    train = writer.train(ALERT, {"unet.b": ALERT, "preset": ALERT}, card)
    evaluation = writer.evaluate(train, DIGITS, {100: 4.0, 200: 3.0})
    other = writer.train(f"$x_1^2$ {ALERT}", {"unet.b": "2"}, card)
    writer.evaluate(other, DIGITS, {100: 5.0})
    sweep = writer.run("sweep", f"sweep {ALERT}")
    trial = {"label": ALERT, "point": ALERT, "run_id": train, "evaluation_run_id": evaluation}
    failed = {**trial, "label": f"b {ALERT}", "status": f"failed {ALERT}", "steps": None}
    writer.json(sweep, "trials.json", [{**trial, "status": "finished", "steps": 200}, failed])
    curve = {"t": [0, 1], "betas": [0.1, 1], "alphas_cumprod": [1, 0], "log_snr": [1, 0]}
    writer.json(sweep, "schedules.json", {ALERT: curve, f"b {ALERT}": curve})
    page = page_of(f"{ALERT} hostile".replace("/", "∕"))
    assert [script.children[0] for script in page.root.all("script")] == [SCRIPT.read_text()]
    assert not page.root.all("b")
    assert not [name for element in page.elements for name in element.attributes if name.startswith("on")]
    assert f"Checkpoint of {ALERT}" in page.text
    assert "$x_1^2$" in page.text
    assert_nothing_is_fetched(page)


def test_a_run_without_anything_says_so() -> None:
    writer = writer_of("bare")
    writer.run("train", "tiny-bare", status="RUNNING")
    page = page_of("bare")
    assert page.root.all("h1")[0].text == "No checkpoint has been evaluated yet"
    assert [heading.text for heading in page.root.all("h2")] == ["How it was made", "Not in this report"]
    assert [link.attributes["href"] for link in page.root.all("nav")[0].all("a")] == ["#making", "#absent"]
    absent = [item.text for item in page.section("Not in this report").all("li")]
    assert absent[0] == (
        "Checkpoints: none of this experiment has been evaluated. python jobs/evaluate.py --run tiny-bare"
    )
    assert [line.partition(":")[0] for line in absent[1:]] == [
        "Training curves", "Samples by training step", "Chains, latents and interpolations", "Copies of training images",
        "The paper's tables", "Likelihood", "Compression", "Sweep", "Data card", "Contact sheet of the training data",
    ]  # fmt: skip
    assert not page.root.all("img", "svg")


def test_a_run_without_evaluation_still_shows_its_training() -> None:
    writer_of("untested").train("tiny-untested")
    page = page_of("untested")
    assert "Last loss: tiny-untested has 0.003333." in page.text
    assert len(page.section("Training").all("svg")) == 8


def test_one_checkpoint_is_not_called_a_minimum() -> None:
    writer = writer_of("single")
    writer.evaluate(writer.train("tiny-single"), DIGITS, {100: 4.0}, half_width=None, grids=False, score=False)
    page = page_of("single")
    assert page.root.all("h1")[0].text == "Step 100 has fd_digits 4.000"
    assert "Its interval is not measured." in page.text
    assert "It is the only checkpoint evaluated" in page.text
    assert "optimistic" not in page.text
    assert "Samples by training step: no sample grid was stored." in page.section("Not in this report").text
    (rows,) = page.tables("Checkpoints by")
    assert rows[0][3] == "not measured"


def test_values_that_are_not_finite_are_shown_and_never_ranked() -> None:
    writer = writer_of("diverging")
    train = writer.train("tiny-diverging")
    writer.metrics(train, {"train/loss": {310: float("nan")}})
    writer.evaluate(train, DIGITS, {100: float("inf"), 200: 6.0, 300: float("nan")})
    page = page_of("diverging")
    assert page.root.all("h1")[0].text == "Step 200 has fd_digits 6.00"
    (rows,) = page.tables("Checkpoints by")
    assert [(row[0], row[1], row[2], row[4]) for row in rows] == [
        ("1", "200", "6.00", "best"),
        ("–", "100", "infinite", "not a finite number"),
        ("–", "300", "not a number", "not a finite number"),
    ]
    assert "The last loss of tiny-diverging is not a finite number." in page.section("Needs attention").text
    assert "1 value not finite and left out" in page.section("Training").text


def test_an_experiment_with_only_broken_values_names_no_best() -> None:
    writer = writer_of("only-nan")
    writer.evaluate(writer.train("tiny-nan"), DIGITS, {100: float("nan")})
    page = page_of("only-nan")
    assert page.root.all("h1")[0].text == "No evaluated checkpoint has a finite fd_digits"
    assert not page.section("Checkpoints").all("svg")


def test_records_that_cannot_be_used_are_named() -> None:
    writer = writer_of("damaged")
    train = writer.train("tiny-damaged", card="not a card", status="FAILED")
    good = writer.evaluate(train, DIGITS, {100: 5.0, 200: 4.0})
    writer.file(good, "samples/step-00000200.png", b"not a picture")
    altered = writer.evaluate(train, FEWER, {100: 1.0}, grids=False)
    writer.file(altered, "protocol.json", b"{}")
    changed = writer.evaluate(train, FID, {100: 0.75}, grids=False)
    writer.json(changed, "protocol.json", asdict(DIGITS))
    absent = writer.run("evaluate", "no-protocol", {"mlflow.parentRunId": train})
    writer.metrics(absent, {"fd_digits": {100: 0.5}})
    writer.evaluate("0" * 32, DIGITS, {100: 0.25}, grids=False)
    sweep = writer.run("sweep", "unreadable")
    writer.file(sweep, "trials.json", b"[{]")
    page = page_of("damaged")
    assert page.root.all("h1")[0].text == "Step 200 has the lowest fd_digits, 4.00"
    text = page.section("Needs attention").text
    for remark in (
        "protocol.json that this version cannot read; its numbers are left out",
        "protocol.json that does not match its fingerprint; its numbers are left out",
        "Run no-protocol has no protocol.json",
        "is of no training run in this experiment and is left out",
        "artifact trials.json that is not JSON",
        "data/card.json that this version cannot read",
        "Training run tiny-damaged failed.",
    ):
        assert remark in text
    assert [figure.text for figure in page.section("Samples").all("figure")] == ["step 100: fd_digits 5.00"]


def test_an_fid_stands_beside_the_paper() -> None:
    writer = writer_of("cifar10")
    card = {**CARD, "name": "cifar10", "images": 50_000, "shape": [32, 32, 3]}
    writer.evaluate(writer.train("cifar10-5f5f5f5f5f5f", card=card), FID, {1000: 5.0, 2000: 3.42}, half_width=0.05)
    page = page_of("cifar10")
    assert page.root.all("h1")[0].text == "Step 2,000 has the lowest FID, 3.420"
    assert "The paper reports 3.17 for CIFAR-10 (Table 1, against the training set); this is 0.250 higher." in page.text
    fid, score = (figure.text for figure in page.section("Checkpoints").all("figure"))
    assert "Dotted: the paper's 3.17 (Table 1, against the training set), which was measured alike." in fid
    assert "Dotted: the paper's 9.46 (Table 1), which was measured alike." in score


def test_five_hundred_checkpoints_are_fast_and_small() -> None:
    writer = writer_of("many")
    distances = {step: 10 + abs(step - 40_000) / 1000 for step in range(100, 50_100, 100)}
    writer.evaluate(writer.train("tiny-many"), DIGITS, distances)
    start = time.monotonic()
    page = page_of("many")
    assert time.monotonic() - start < 30
    assert len(page.source) < 2_000_000
    assert page.root.all("h1")[0].text == "Step 40,000 has the lowest fd_digits, 10.00"
    (rows,) = page.tables("Checkpoints by")
    assert len(rows) == 200
    assert "300 further rows are in MLflow only." in page.text
    assert len(page.section("Samples").all("img")) == 12


def test_a_report_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits()
    output = tmp_path / "new" / "report.html"
    assert build_report(tracking_uri(), "digits", output) == output
    assert sorted(path.name for path in output.parent.iterdir()) == ["report.html", "report.json", "report.md"]
    output.write_text("the report of yesterday")

    def full_disk(path: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(ddpm_core.commit, "_flush", full_disk)
    with pytest.raises(OSError, match="no space left"):
        build_report(tracking_uri(), "digits", output)
    assert output.read_text() == "the report of yesterday"
    assert sorted(path.name for path in output.parent.iterdir()) == ["report.html", "report.json", "report.md"]


@pytest.mark.parametrize("name", ["report.pdf", "report", "folder.html"])
def test_an_output_that_is_no_html_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match=r"Output .* is not the name of an \.html file; give one"):
        build_report(tracking_uri(), "digits", tmp_path / name)


def assert_nothing_is_fetched(page: Page) -> None:
    assert len(page.source) < 10_000_000
    assert len(page.root.all("script")) == 1  # the page's own, which its policy names by hash
    assert not page.root.all("link", "iframe", "object", "embed", "base", "form")
    for element in page.elements:
        if element.tag == "a" and element.attributes["href"].startswith("http"):
            assert element.attributes["href"].startswith("http://127.0.0.1:5000/#/experiments/")  # a click away
            continue
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"):
            assert element.attributes.get(name, "#").startswith(
                ("#", "data:image/png;base64,", "data:image/webp;base64,")
            )
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)\)", page.source))
    assert "@import" not in page.source
