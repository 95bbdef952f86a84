"""Each section says what was measured, as the contract with the pipelines has it, and what is missing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.report_experiments import (
    ALERT,
    DIGITS,
    FID,
    KINDS,
    Page,
    digits,
    page_of,
    png,
    read_page,
    summary_of,
    tracking_uri,
    writer_of,
)

from ddpm_core.errors import InputError
from reports.build import build_report

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")


@pytest.fixture
def full() -> Page:
    digits()
    return page_of("digits")


def test_a_checkpoint_shows_everything_that_was_measured_of_it(full: Page) -> None:
    (rows,) = full.tables(f"Checkpoints by fd_digits (protocol {DIGITS.fingerprint})")
    assert rows[0][5:10] == ["5.20 ± 0.10", "8.50 ± 0.38", "0.01000", "0.6000", "0.5000"]
    assert rows[2][6:10] == ["not measured"] * 4  # of the run that was evaluated without them


@pytest.mark.parametrize(
    ("measured", "sentence"),
    [
        (("precision",), "95 % intervals of the precision; recall has none."),
        (("precision", "recall"), "95 % intervals of their means at this number of samples"),
    ],
)
def test_the_chart_of_precision_and_recall_says_which_of_them_have_intervals(
    measured: tuple[str, ...], sentence: str
) -> None:
    name = f"fractions-{len(measured)}"
    writer = writer_of(name)
    evaluation = writer.evaluate(writer.train("tiny-linear-0f0f0f0f0f0f"), DIGITS, {100: 10.0, 200: 9.0}, score=False)
    writer.further(evaluation, DIGITS, [100, 200])
    for metric in measured:
        ends = {f"{DIGITS.metric(metric)}_ci_{end}": {100: 0.4, 200: 0.7} for end in ("low", "high")}
        writer.metrics(evaluation, ends)
    assert sentence in page_of(name).text


def test_an_extrapolated_distance_that_was_logged_without_an_interval_is_shown_without() -> None:
    writer = writer_of("extrapolated")
    evaluation = writer.evaluate(writer.train("tiny-linear-0e0e0e0e0e0e"), DIGITS, {100: 9.0}, score=False)
    writer.metrics(evaluation, {f"{DIGITS.distance}_infinity": {100: 8.5}})
    page = page_of("extrapolated")
    (rows,) = page.tables(f"Checkpoints by fd_digits (protocol {DIGITS.fingerprint})")
    assert rows[0][5] == "8.50"
    assert "at n → ∞" in page.text
    assert "the intercept is too low, by 8 % of what it corrects" in page.text


def test_the_curves_of_a_protocol_are_there_and_say_what_they_are(full: Page) -> None:
    alts = [drawing.attributes["aria-label"] for drawing in full.section("Checkpoints").all("svg")]
    leading = alts[:5]
    assert leading[0] == (
        "fd_digits against training step for 2 runs: lowest 9.000 at step 200. 1 checkpoint cannot be told apart from it."
    )
    assert [alt.split()[0] for alt in leading[2:]] == ["Kernel", "Precision", "fd_digits"]
    assert "along the chain: from 300.0 to 9.000" in leading[4]


@pytest.mark.parametrize("measured", [True, False])
def test_the_scores_chart_draws_their_interval_or_says_that_it_is_the_spread(measured: bool) -> None:
    name = f"scores-{measured}".lower()
    writer = writer_of(name)
    run = writer.train("tiny-linear-0c0c0c0c0c0c")
    evaluation = writer.evaluate(run, DIGITS, {100: 10.0, 200: 9.0})  # scores 5.1 and 5.2, each with a spread of 0.1
    if measured:
        ends = {"low": {100: 4.98, 200: 5.08}, "high": {100: 5.22, 200: 5.32}}
        writer.metrics(evaluation, {f"{DIGITS.score}_ci_{end}": values for end, values in ends.items()})
    page = page_of(name)
    (drawing,) = (
        each
        for each in page.section("Checkpoints").all("svg")
        if each.attributes["aria-label"].startswith(DIGITS.score)
    )
    assert ("5.10 (4.98 to 5.22)" if measured else "5.100 (5.000 to 5.200)") in drawing.text
    captions = page.section("Checkpoints").text
    assert (
        "95 % intervals of its mean over splits; the table's ± is one standard deviation over them" in captions
    ) == measured
    assert ("± one standard deviation over splits" in captions) != measured


def test_samplers_of_one_checkpoint_stand_against_their_network_calls() -> None:
    writer = writer_of("samplers")
    run = writer.train("tiny-linear-0a0a0a0a0a0a")
    ddim = replace(DIGITS, sampler="ddim", sampler_steps=10)
    for protocol, distance in [
        (ddim, 20.0),
        (replace(ddim, sampler_steps=50), 10.0),
        (replace(ddim, eta=0.5), 30.0),
        (replace(DIGITS, sampler="ancestral", sampler_steps=1000, var_type="fixedsmall"), 9.8),
        (replace(ddim, sampler_steps=50, seed=1), 1.0),  # of other samples: no matter of the sampler
    ]:
        writer.evaluate(run, protocol, {100: distance, 200: distance + 1})
    page = page_of("samplers")
    (rows,) = page.tables("Samplers of step 200 of tiny-linear-0a0a0a0a0a0a")
    assert [row[:3] for row in rows] == [
        ["ancestral, fixedsmall, uniform", "1,000", "10.80"],
        ["ddim, η 0, uniform", "50", "11.00"],
        ["ddim, η 0, uniform", "10", "21.00"],
        ["ddim, η 0.5, uniform", "10", "31.00"],
    ]
    assert [row[4] for row in rows] == ["best", "not distinguishable", "higher", "higher"]
    titles = [title.text for title in page.section("Checkpoints").all("h3")]
    assert "fd_digits, 2,048 samples, ddim, η 0.5, uniform, 10 steps" in titles
    (drawing,) = page.section("Samplers").all("svg")
    assert drawing.attributes["aria-label"].endswith("against network calls, for 3 samplers.")
    assert "50 network calls" in drawing.text
    digits()
    assert "network calls" not in page_of("digits").text  # each checkpoint was measured with one sampler


def test_lengths_of_one_checkpoints_ema_stand_beside_its_own() -> None:
    writer = writer_of("lengths")
    run = writer.train("tiny-linear-0b0b0b0b0b0b")
    writer.evaluate(run, DIGITS, {200: 15.0})
    for length, distance in [(0.05, 12.0), (0.1, 10.0), (0.15, 20.0)]:
        evaluation = writer.evaluate(run, replace(DIGITS, ema_length=length), {200: distance})
        writer.metrics(evaluation, {"ema_error": {200: 0.4 * length}})
    page = page_of("lengths")
    (rows,) = page.tables("Lengths of the EMA of step 200 of tiny-linear-0b0b0b0b0b0b")
    assert [row[:2] for row in rows] == [
        ["0.1", "10.00"],
        ["0.05", "12.00"],
        ["the training's own", "15.00"],
        ["0.15", "20.00"],
    ]
    assert [row[3] for row in rows] == ["4.0 %", "2.0 %", "", "6.0 %"]
    assert [row[4] for row in rows][0::3] == ["best", "higher"]
    assert [title.text for title in page.section("Checkpoints").all("h3")] == [
        "fd_digits, 2,048 samples, the training's own EMA",
        "fd_digits, 2,048 samples, EMA length 0.05",
        "fd_digits, 2,048 samples, EMA length 0.1",
        "fd_digits, 2,048 samples, EMA length 0.15",
    ]
    (drawing,) = page.section("EMA length").all("svg")
    assert drawing.attributes["aria-label"].endswith("against the length of its EMA, for 3 lengths.")
    assert "lowest fd_digits: 10.00 at length 0.1" in drawing.text
    assert "the training's own EMA" in drawing.text
    digits()
    assert "EMA length" not in page_of("digits").text


def test_every_training_curve_is_there(full: Page) -> None:
    alts = " ".join(drawing.attributes["aria-label"] for drawing in full.section("Training").all("svg"))
    for what in (
        "Training loss.", "by quarter of t", "gradient", "parameters", "Learning rate", "Images a second", "waiting", "memory",
    ):  # fmt: skip
        assert what in alts
    assert "utilisation" not in alts  # was not logged


def test_pictures_stand_in_order_with_labels_and_open_without_a_script(full: Page) -> None:
    samples = full.section("Samples")
    titles = [heading.text for heading in samples.all("h4")]
    assert titles == [
        "Progressive generation",
        "Samples that share a latent",
        "Interpolations between images",
        "Interpolations, coarse to fine",
        "Nearest training images in pixel space",
        "Nearest training images in feature space",
    ]
    (first,) = [f for f in samples.all("figure") if "What progressive shows." in f.text]
    assert [label.text for label in first.all("summary")[0].all("span") if not label.all("span")] == [
        "t = 1,000", "t = 500", "t = 1", "progressive 0", "progressive 1",
    ]  # fmt: skip
    assert first.all("img")[0].attributes["alt"] == (
        "Progressive generation: 2 x 3 images. Rows: progressive 0 and progressive 1. "
        "Columns: t = 1,000, t = 500 and t = 1."
    )
    # A details element opens by click, Enter and Space; every picture of the page is in one.
    zoomed = [image for element in full.root.all("summary") for image in element.all("img")]
    assert len(zoomed) == len(full.root.all("img"))


def test_copies_of_training_images_are_told_with_their_baseline(full: Page) -> None:
    text = full.section("Samples").text
    assert (
        "Of 1,000 samples of step 200, 1.00 % stand out as copies in pixel space (95 % interval 0.500 % to 1.80 %): "
        "nearer to one of 1,797 training images than 0.5 times the mean distance of the 50 nearest. "
        "Of held-out images 2.00 % do." in text
    )
    assert "in feature space" in text


def test_pictures_of_another_checkpoint_are_told_as_such() -> None:
    writer = writer_of("other-pictures")
    evaluation = writer.evaluate(writer.train("tiny-pictures"), DIGITS, {100: 4.0, 200: 3.0})
    writer.pictures(evaluation, 100, kinds=[*KINDS, "novel_kind"])
    page = page_of("other-pictures")
    samples = page.section("Samples")
    assert "Copies of training images: no nearest neighbours were looked up." in page.section("Not in this report").text
    assert "Of step 100." in samples.text
    assert len(samples.all("h4")) == 6
    assert "Copies of training images" not in samples.text


@pytest.mark.parametrize(
    "change",
    [{"file": "../../secret.png"}, {"file": "a/../../../secret.png"}, {"tile": [7, 8]}, {"rows": 0}, {"tile": None}],
)
def test_a_picture_that_is_not_as_it_says_is_left_out(change: dict[str, object]) -> None:
    name = f"odd-pictures-{next(iter(change))}-{len(str(change))}"
    writer = writer_of(name)
    evaluation = writer.evaluate(writer.train("tiny-odd"), DIGITS, {100: 4.0})
    facts = {"kind": ALERT, "file": "a.png", "tile": [8, 8], "rows": 2, "columns": 3, "caption": ALERT}
    writer.file(evaluation, "pictures/step-00000100/a.png", png(24, 16))
    writer.file(evaluation, "secret.png", png(24, 16))
    writer.file(evaluation, "pictures/step-00000100/a/b.png", png(24, 16))  # a folder that a path could lead through
    writer.json(evaluation, "pictures/step-00000100/pictures.json", [{**facts, **change}])
    page = page_of(name)
    assert not page.section("Samples").all("h4")
    assert (
        "Chains, latents and interpolations: no picture of them was stored. python jobs/evaluate.py --run tiny-odd"
        in page.section("Not in this report").text
    )


def test_an_alarm_comes_before_the_headline() -> None:
    writer = writer_of("alarming")
    tag = {"ddpm.alarm": f"The lowest FID rose {ALERT}."}
    evaluation = writer.evaluate(writer.train("tiny-alarm"), DIGITS, {100: 4.0})
    writer.tag(evaluation, tag)
    (hero,) = page_of("alarming").root.all("header")
    assert hero.text.index(f"tiny-alarm: The lowest FID rose {ALERT}.") < hero.text.index("Step 100 has fd_digits")
    assert summary_of("alarming")["alarms"] == [f"tiny-alarm: The lowest FID rose {ALERT}."]


def test_likelihoods_of_different_images_or_terms_share_no_table(full: Page) -> None:
    section = full.section("Likelihood")
    captions = [table.all("caption")[0].text for table in section.all("table")]
    assert len(captions) == 3
    assert captions[0].startswith(
        "Negative log-likelihood on 1,797 images of digits (the training set), EMA weights, all terms"
    )
    assert "L₀ and 16 drawn terms, an estimate" in captions[1]
    (whole,) = full.tables("Negative log-likelihood on 1,797 images")
    assert [row[:4] for row in whole] == [
        ["tiny-linear-0a0a0a0a0a0a", "300", "≤ 5.0000", "4.9900 to 5.0100"],
        ["tiny-linear-0a0a0a0a0a0a", "200", "≤ 5.1000", "5.0900 to 5.1100"],
    ]


def test_rate_and_distortion_are_drawn_in_three_panels_and_tabled(full: Page) -> None:
    section = full.section("Likelihood")
    assert len(section.all("svg")) == 3
    (rows,) = full.tables("Rate and distortion, as in Table 4: 1,797 images of digits, step 300")
    assert [row[0] for row in rows] == ["1,000", *(str(steps) for steps in range(900, 0, -100))]
    assert rows[0] == ["1,000", "1.80000", "1.00000"]  # having x_1 costs everything and leaves little
    assert rows[-1] == ["100", "0.00000", "64.00000"]
    assert "paper" not in section.all("table")[-1].all("thead")[0].text  # the paper's are of CIFAR-10


def test_data_that_the_paper_has_no_number_for_stands_beside_nothing(full: Page) -> None:
    absent = full.section("Not in this report").text
    assert "The paper's tables: they are of CIFAR-10 and LSUN, and have no number for the data" in absent
    assert "Beside the paper" not in [heading.text for heading in full.root.all("h2")]


def test_the_cost_adds_up_from_logged_speeds(full: Page, tmp_path: Path) -> None:
    (rows,) = full.tables("Cost of tiny-linear")
    assert [row[0] for row in rows] == [
        "Training (CPU worker hours)", "Evaluation (CPU worker hours)", "Together (CPU worker hours)",
    ]  # fmt: skip
    # 300 steps of 64 images at 800 to 806 images a second on 2 workers; 3 checkpoints of 2,048 samples at 512 a second
    hours = [float(row[1]) for row in rows]
    assert hours[0] == pytest.approx(2 * 300 * 64 / 803 / 3600, rel=0.01)
    assert hours[1] == pytest.approx(3 * 2048 / 512 / 3600, rel=0.01)
    assert hours[2] == pytest.approx(hours[0] + hours[1], rel=0.01)
    output = build_report(tracking_uri(), "digits", tmp_path / "r.html", watts=500)
    (priced,) = read_page(output.read_text()).tables("Cost of tiny-linear")
    assert priced[3][0] == "Energy at 500 W a device"
    assert float(priced[3][1].removesuffix(" kWh")) == pytest.approx(hours[2] * 0.5, rel=0.01)


def test_what_was_changed_of_the_preset_is_told(full: Page) -> None:
    making = full.section("How it was made").text
    assert "Preset tiny, with optim.lr 0.0002 (preset: 0.002), steps 300 (preset: 1200)." in making
    assert "Train the leading run again" in making
    assert "python jobs/train_lsun.py tiny --shards SHARDS --optim.lr 0.0002 --steps 300" in making


def test_a_report_of_one_run_or_sweep_holds_no_other(full: Page, tmp_path: Path) -> None:
    ids = digits()
    for name in (ids.quad, "tiny-quad-1b1b1b1b1b1b"):
        build_report(tracking_uri(), "digits", tmp_path / "one.html", run=name)
        page = read_page((tmp_path / "one.html").read_text())
        assert page.root.all("h1")[0].text == "Step 300 has fd_digits 12.00"
        assert "tiny-linear" not in page.text
        assert "Sweep: none was run in this experiment." in page.section("Not in this report").text
    build_report(tracking_uri(), "digits", tmp_path / "one.html", run="schedules-4e4e4e4e4e4e")
    page = read_page((tmp_path / "one.html").read_text())
    assert "linear 9.6 is better than quad 12" in page.section("Sweep").text
    assert "tiny-const" not in page.text
    assert json.loads((tmp_path / "one.json").read_text())["run"] == "schedules-4e4e4e4e4e4e"
    with pytest.raises(InputError, match=r"Run 'tiny-quad' is no training run and no sweep with trials in experiment"):
        build_report(tracking_uri(), "digits", tmp_path / "two.html", run="tiny-quad")
    assert not (tmp_path / "two.html").exists()


def test_weights_from_elsewhere_are_reported_without_a_training() -> None:
    writer = writer_of("foreign")
    writer.evaluate("", replace(FID, reference="cifar10"), {790_000: 3.21}, half_width=0.05, of_run="google-ddpm")
    page = page_of("foreign")
    assert page.root.all("h1")[0].text == "Step 790,000 has FID 3.210"
    assert "Checkpoint of google-ddpm." in page.text
    assert "The paper reports 3.17 for CIFAR-10 (Table 1, against the training set); this is 0.040 higher." in page.text
    assert "Training curves: no loss" in page.section("Not in this report").text
    (rows,) = page.tables("Table 1 of the paper")
    assert rows[-1][:3] == ["Ours: google-ddpm, step 790,000", "795.00 ± 0.10", "3.210"]


def test_a_sweep_of_several_seeds_concludes_from_their_spread() -> None:
    writer, rows = writer_of("seeds"), []
    for label, values in (("linear", [9.0, 9.4]), ("quad", [9.3, 12.0]), ("cosine", [20.0])):
        for seed, value in enumerate(values):
            run = writer.train(f"tiny-{label}-{seed}")
            evaluation = writer.evaluate(run, DIGITS, {300: value}, half_width=0.01, grids=False)
            rows.append(
                {
                    "label": f"{label}, seed {seed}",
                    "point": label,
                    "run_id": run,
                    "evaluation_run_id": evaluation,
                    "status": "finished",
                }
            )
    lost = {
        "label": "const, seed 0",
        "point": "const",
        "status": "stopped",
        "steps": 100,
        "reason": "21 is wholly above 9",
    }
    sweep = writer.run("sweep", "seeds")
    writer.json(sweep, "trials.json", [*rows, lost])
    writer.json(sweep, "summary.json", {"conclusion": "linear has the lowest fd_digits, 9.2 +- 0.28 (2 seeds)"})
    page = page_of("seeds")
    text = page.section("Sweep").text
    assert "linear has the lowest fd_digits, 9.2 ± 0.28 (2 seeds)." in text  # the sweep's own words, and no second ones
    assert "to be told apart" not in text
    assert "stopped: 21 is wholly above 9" in text
    assert "Each setting was trained once" not in text
    (settings,) = page.tables("Settings by mean fd_digits over seeds")
    assert settings == [
        ["linear", "2", "9.20", "0.28", "9.00 to 9.40"],
        ["quad", "2", "10.65", "1.91", "9.30 to 12.00"],
        ["cosine", "1", "20.00", "one seed", "20.00 to 20.00"],
    ]


def test_a_run_of_two_thousand_checkpoints_gives_one_page_of_them() -> None:
    writer = writer_of("two-thousand")
    distances = {step: 10 + abs(step - 150_000) / 1000 for step in range(100, 200_100, 100)}
    evaluation = writer.evaluate(writer.train("tiny-2000"), DIGITS, distances, grids=False, score=False)
    assert evaluation
    page = page_of("two-thousand")
    assert page.root.all("h1")[0].text == "Step 150,000 has the lowest fd_digits, 10.00"
    assert "1,800 further rows are in MLflow only." in page.text
    assert len(page.source) < 2_000_000


def test_coded_files_stand_beside_their_bound_and_other_formats() -> None:
    writer_of("uncompressed").train("tiny-coded")
    command = "python jobs/compress.py curve --run tiny-coded --data TEST_SHARDS"
    assert command in page_of("uncompressed").section("Not in this report").text
    writer = writer_of("compressed")
    run = writer.train("tiny-coded")
    curve = {
        "protocol": {"step": 300, "data": "digits-test", "images": 4, "steps": 50},
        "coded": [{"rate": 0.5, "rmse": 20.0}, {"rate": 4.0, "rmse": 1.0}],
        "theory": {"rate": [4.2, 0.4], "rmse": [0.9, 20.0], "total": 5.0},
        "lossy": {
            "JPEG": [{"rate": 1.0, "rmse": 30.0, "quality": 5}],
            "WEBP": [{"rate": 4.3, "rmse": 25.0, "quality": 5}],
        },
        "lossless": {"coded": 5.25, "png": 6.0, "webp": 4.75},
        "overhead": {"lossy": 0.096, "total": 0.05},
    }
    writer.json(
        writer.run("compression", "tiny-coded-compression-abcdef", {"mlflow.parentRunId": run}),
        "compression/curve.json",
        curve,
    )
    page = page_of("compressed")
    section = page.section("Compression")
    assert len(section.all("svg")) == 1
    (rows,) = page.tables("Bits/dim of whole images")
    assert rows == [
        ["WebP, lossless", "4.750", "-5.0 %"],
        ["these files", "5.250", "+5.0 %"],
        ["PNG", "6.000", "+20.0 %"],
        ["the variational bound", "5.000", ""],
    ]
    assert "9.6 % above L₁ + … + L_T" in section.text
    assert "WebP needs more than 4.20 bits/dim." in section.all("figure")[0].text
    assert "WebP" not in section.all("svg")[0].text
