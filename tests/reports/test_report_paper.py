"""The paper's tables beside ours: only what was measured as the paper's stands there, and a missing cell says its command."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from support.report_experiments import CARD, FID, Page, page_of, writer_of

from ddpm_core.presets import PRESETS
from ddpm_core.protocol import Protocol
from ddpm_core.records import flatten
from pipelines.train.config import config_for
from reports.records.entities import CheckpointRecord, DataCard, EvaluationRecord, RunRecord
from reports.sections import commands
from reports.sections.paper_tables import paper_tables
from reports.verdicts import paper
from reports.verdicts.presets import changes
from reports.verdicts.ranking import rank

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

CIFAR10_CARD = {**CARD, "name": "cifar10", "images": 50_000, "shape": [32, 32, 3]}
TRAIN = replace(FID, reference="cifar10")
L_SIMPLE = {"diffusion.mean_type": "eps", "diffusion.loss_type": "mse", "diffusion.var_type": "fixedlarge"}


def rows_of(page: Page, caption: str) -> list[list[str]]:
    (rows,) = page.tables(caption)
    return rows


def commands_of(page: Page) -> list[str]:
    """The commands of missing cells, of all tables in order."""
    lists = page.section("Beside the paper").all("ol")
    return [item.text for each in lists for item in each.all("li")]


def test_a_number_measured_as_the_papers_stands_in_its_cell() -> None:
    writer = writer_of("as-the-paper")
    run = writer.train("cifar10-a", L_SIMPLE, CIFAR10_CARD)
    writer.evaluate(run, TRAIN, {1000: 3.4, 2000: 3.2}, half_width=0.05)
    writer.evaluate(run, replace(TRAIN, purpose="report"), {2000: 3.25}, half_width=0.05)
    test = replace(TRAIN, reference="cifar10-test", reference_images=10_000, against="test")
    writer.evaluate(run, test, {2000: 5.3}, half_width=0.05)
    rows = [(row.rate, row.rmse) for row in reversed(paper.TABLE_4)]
    writer.likelihood(run, {2000: 3.76}, data="cifar10-test", sha256="d" * 64, images=10_000, rows=rows[::-1])
    writer.likelihood(run, {2000: 3.73}, data="cifar10", images=50_000, strata=32)
    page = page_of("as-the-paper")
    table = rows_of(page, "Table 1 of the paper")
    assert len(table) == len(paper.TABLE_1) + 1
    assert table[-2] == ["DDPM (L_simple)", "9.46 ± 0.11", "3.17", "≤ 3.75", "≤ 3.72"]
    # On samples that it was not chosen by.
    assert table[-1] == [
        "Ours: cifar10-a, step 2,000", "7.00 ± 0.10", "3.250", "≤ 3.760 ± 0.010", "≤ 3.730 ± 0.010 (estimate)",
    ]  # fmt: skip
    numbers = {row[0]: row[1:] for row in rows_of(page, "Numbers in the paper's text")}
    assert numbers["FID against the test set"] == ["5.24", "5.300"]
    assert numbers["NLL, test less training set (bits/dim)"] == ["at most 0.03", "0.030"]
    assert numbers["L_T (bits/dim)"] == ["about 1 × 10⁻⁵", "2.00 × 10⁻⁵"]
    assert commands_of(page) == []
    table_4 = rows_of(page, "Table 4 of the paper beside ours: 10,000 images of cifar10-test, step 2,000")
    assert [row[1] for row in table_4] == [row[2] for row in table_4]  # ours were made to be the paper's
    assert table_4[0] == ["1,000", "1.77581", "1.77581", "0.95136", "0.95136"]
    of_test, of_training = page.tables("Negative log-likelihood on")
    assert of_test[-1] == ["the paper, L_simple", "–", "≤ 3.75", "–", "1.78", "1.97", "about 1 × 10⁻⁵", "0.95"]
    assert len(of_training) == 1  # an estimate, which the paper's is not
    assert "crosses: Table 4 of the paper" in page.section("Likelihood").all("figure")[0].text


@pytest.mark.parametrize(
    ("change", "departure"),
    [
        ({"num_samples": 10_000}, "10,000 samples instead of 50,000"),
        ({"sampler": "ddim", "sampler_steps": 50}, "50 ddim steps instead of 1,000 ancestral ones"),
        ({"weights": "raw"}, "raw weights instead of their moving average"),
        ({"clip_denoised": False}, "predictions of x_0 that are not clipped instead of clipped ones"),
        ({"var_type": "fixedsmall"}, "the variance fixedsmall instead of the training's own"),
        ({"reference_images": 49_999}, "49,999 reference images instead of 50,000"),
    ],
)
def test_a_number_measured_otherwise_stands_in_no_cell(change: Mapping[str, Any], departure: str) -> None:
    protocol: Protocol = replace(TRAIN, **change)
    point = CheckpointRecord(step=1000, distance=3.0, low=2.95, high=3.05)
    evaluation = EvaluationRecord(run_id="e", status="FINISHED", protocol=protocol, checkpoints=(point,))
    card = DataCard(name="cifar10", images=50_000, shape=(32, 32, 3))
    run = RunRecord(
        run_id="r", name="cifar10-b", status="FINISHED", params=L_SIMPLE, tags={}, latest={}, card=card,
        evaluations=(evaluation,),
    )  # fmt: skip
    table_1 = paper_tables([run], rank([run]), run)[0]
    assert table_1.table.rows[-1].cells == (
        "Ours: cifar10-b", "not measured [1]", "not measured [1]", "not measured [2]", "not measured [3]",
    )  # fmt: skip
    assert table_1.note == f"Measured otherwise, and so in no cell: FID 3.000 with {departure}."


def test_missing_cells_name_the_commands_that_fill_them() -> None:
    writer = writer_of("unmeasured")
    run = "cifar10 $(reboot)"
    writer.train(run, {**L_SIMPLE, "storage": "/data/my runs", "experiment": "unmeasured"}, CIFAR10_CARD)
    page = page_of("unmeasured")
    where = "--run 'cifar10 $(reboot)' --storage '/data/my runs' --experiment unmeasured"
    assert commands_of(page)[:3] == [
        f"python jobs/evaluate.py {where}",
        f"python jobs/evaluate.py likelihood {where} --data CIFAR10_TEST_SHARDS",
        f"python jobs/evaluate.py likelihood {where}",
    ]
    assert f"python jobs/evaluate.py {where} --test-reference CIFAR10_TEST_SHARDS" in commands_of(page)
    assert rows_of(page, "Table 4 of the paper beside ours: the test set")[3] == [
        "700",
        "0.02866",
        "not measured",
        "24.43656",
        "not measured",
    ]
    command = f"python jobs/evaluate.py likelihood {where} --data CIFAR10_TEST_SHARDS"
    assert command in page.section("Not in this report").text


def test_a_likelihood_of_some_images_or_raw_weights_is_not_the_papers() -> None:
    writer = writer_of("partial-likelihood")
    run = writer.train("cifar10-c", L_SIMPLE, CIFAR10_CARD)
    writer.likelihood(run, {300: 3.5}, data="cifar10-test", sha256="d" * 64, images=500)
    page = page_of("partial-likelihood")
    assert rows_of(page, "Table 1 of the paper")[-1][3].startswith("not measured")
    assert "3.5" in page.section("Likelihood").text
    # Curves of some images are drawn, and not beside the paper's points.
    assert "Table 4 of the paper" not in page.section("Likelihood").all("figure")[0].text
    assert "the paper, L_simple" not in page.section("Likelihood").text
    missing = page.section("Not in this report").text
    assert "Rate and distortion of the whole test set, as the paper's: not measured. python jobs/evaluate.py" in missing


def test_an_ablation_stands_beside_table_2() -> None:
    writer = writer_of("ablation")
    objectives = {
        "fixed": ({**L_SIMPLE, "diffusion.loss_type": "kl"}, 13.6),
        "simple": (L_SIMPLE, 3.3),
        "learned": ({**L_SIMPLE, "diffusion.loss_type": "kl", "diffusion.var_type": "learned"}, None),
    }
    for name, (params, fid) in objectives.items():
        run = writer.train(f"cifar10-{name}", params, CIFAR10_CARD)
        if fid is not None:
            writer.evaluate(run, TRAIN, {1000: fid}, half_width=0.05, grids=False)
    page = page_of("ablation")
    rows = rows_of(page, "Table 2 of the paper")
    assert [(row[3], row[4]) for row in rows] == [
        ("23.69", "not measured [1]"),
        ("13.22", "not measured [2]"),
        ("–", "not measured [3]"),
        ("–", "not measured [4]"),
        ("13.51", "13.600"),
        ("3.17", "3.300"),
    ]
    text = page.section("Beside the paper").text
    assert (
        "--diffusion.mean-type xprev --diffusion.loss-type kl --diffusion.var-type learned --unet.out-channels 6"
        in text
    )
    assert "python jobs/evaluate.py --run cifar10-learned" in text  # trained, and only to be evaluated


def test_lsun_stands_in_the_column_of_its_data_set() -> None:
    writer = writer_of("church")
    card = {**CARD, "name": "church_outdoor_train", "shape": [256, 256, 3]}
    run = writer.train("lsun_church-a", L_SIMPLE, card)
    writer.evaluate(run, replace(FID, reference="church"), {1000: 8.0}, half_width=0.05, grids=False)
    page = page_of("church")
    rows = rows_of(page, "Table 3 of the paper")
    assert rows[-2][2:] == ["–", "–"]
    assert rows[-1] == ["Ours: lsun_church-a, step 1,000", "not measured [1]", "8.000", "not measured [2]"]
    for name, source in (("lsun_bedroom", "bedroom_train_lmdb"), ("lsun_cat", "cat")):
        make = f"python jobs/preprocess.py --source {source} --output {name}-50000 --image-size 256 --images 50000"
        assert make in page.text
        assert f"python jobs/evaluate.py --run RUN --reference {name}-50000" in page.text
    assert [command.split(" --shards")[0] for command in commands_of(page)] == [
        "python jobs/train_lsun.py bedroom", "python jobs/train_lsun.py cat",
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_run_of_a_preset_changed_nothing_of_it(name: str) -> None:
    """What the pipelines log of a configuration is compared with the preset value by value."""
    config = config_for(name, shards="/data/shards")
    run = RunRecord(
        run_id="1", name="a", status="FINISHED", params=flatten(config), tags={"ddpm.preset": name}, latest={}
    )
    assert changes(run) == {}
    assert changes(replace(run, params=flatten(replace(config, steps=7)))) == {"steps": str(PRESETS[name].steps)}
    assert changes(replace(run, tags={"ddpm.preset": "unknown"})) is None


def test_the_command_to_train_again_is_read_as_the_same_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was changed: numbers, words, several values at once, blanks in a path."""
    from jobs import training
    from jobs.train_lsun import RECIPES as NAMES

    base = config_for(
        "lsun_church", shards="/data/my shards", seed=3, storage="/shared/runs", workers=8, experiment="my church"
    )
    config = replace(
        base,
        unet=replace(base.unet, ch_mult=(1, 2, 4), attn_resolutions=(16, 8)),
        diffusion=replace(base.diffusion, schedule="quad", beta_end=0.01),
        optim=replace(base.optim, lr=1e-4, adam_eps_hat=True),
        horizontal_flip=False,
    )
    run = RunRecord(
        run_id="1", name="a", status="FINISHED", params=flatten(config), tags={"ddpm.preset": "lsun_church"}, latest={}
    )
    assert set(changes(run) or {}) == {
        "unet.ch_mult", "unet.attn_resolutions", "diffusion.schedule", "diffusion.beta_end", "optim.lr",
        "optim.adam_eps_hat", "horizontal_flip",
    }  # fmt: skip
    command = commands.reproduce(run)
    assert command is not None
    asked = []

    def train(config: Any, say: Any) -> None:
        asked.append(config)
        raise InterruptedError

    monkeypatch.setattr("sys.argv", shlex.split(command)[1:])
    monkeypatch.setattr("pipelines.train.driver.train", train)
    with pytest.raises(InterruptedError):
        training.train_job(NAMES, "")
    assert asked == [config]
    on_gpu = replace(
        run, params={**run.params, "execution.precision": "float32"}, tags={**run.tags, "ddpm.device": "8 x H100"}
    )
    assert "--execution.precision float32" in (commands.reproduce(on_gpu) or "")  # by default it would be bfloat16
    assert "precision" not in (commands.reproduce(replace(on_gpu, tags=run.tags)) or "")


def test_the_papers_table_is_of_its_data_alone() -> None:
    writer = writer_of("celeba")
    writer.train("celebahq256-a", L_SIMPLE, {**CARD, "name": "celebahq256"})
    page = page_of("celeba")
    assert "The paper's tables: they are of CIFAR-10 and LSUN, and have no number for the data" in page.text
    assert not re.search(r"3\.17|7\.89", page.text)
