"""The page of a plan: what must add up, what must be said of each line, and that unit costs were measured."""

import itertools
import json
import re
from dataclasses import replace

import pytest
from support.commands import run_job
from support.pages import missing
from support.processes import ROOT

from ddpm_core.costs import checkpoint_bytes, training_flops
from ddpm_core.presets import PRESETS
from pipelines.plan.config import PlanConfig
from pipelines.plan.driver import GROWTH, Page, plan
from pipelines.plan.page import describe_page, quantity
from pipelines.plan.unit_costs import read_unit_costs

# Enough samples for several rounds, few enough for a test.
CONFIG = PlanConfig(model="cifar10", workers=64, train_workers=8, images=50_000, checkpoints=4, samples=20_000)


@pytest.fixture(scope="module")
def page() -> Page:
    return plan(CONFIG)


def value(page: Page, stage: str, what: str) -> float:
    (row,) = (row for row in page.rows if (row.stage, row.what) == (stage, what))
    return row.value


def test_every_line_says_where_it_comes_from_and_lies_within_its_span(page: Page) -> None:
    for row in page.rows:
        assert row.low <= row.value * (1 + 1e-9), row
        assert row.value <= row.high * (1 + 1e-9), row
        assert row.basis
    text = describe_page(page)
    assert f"measured: unit costs on {read_unit_costs().machine}" in text
    assert "30% of 989 TFLOP/s, the data sheet's for H100 80GB HBM3 in bfloat16" in text
    for stage in ("preprocess", "train", "sweep", "evaluate", "nightly"):
        assert f"\n{stage}\n" in text


def test_hours_are_arithmetic_over_the_speed_that_is_assumed(page: Page) -> None:
    preset = PRESETS["cifar10"]
    flops = preset.steps * preset.optim.batch_size * training_flops(preset.unet)
    arithmetic = flops / (8 * 0.3 * 989e12) / 3600
    assert value(page, "train", "time") == pytest.approx(arithmetic + value(page, "train", "exchange"))
    slow = plan(replace(CONFIG, utilisation=0.15))
    assert value(slow, "train", "time") - value(slow, "train", "exchange") == pytest.approx(2 * arithmetic)


def test_disk_is_what_the_files_of_the_stages_hold(page: Page) -> None:
    assert value(page, "preprocess", "disk") == pytest.approx(50_000 * 32 * 32 * 3 / 1e9)
    kept = 5 + 800_000 // 50_000 + 1
    assert value(page, "train", "disk") == pytest.approx(
        kept * checkpoint_bytes(PRESETS["cifar10"].unet, PRESETS["cifar10"].optim) / 1e9
    )
    assert value(page, "evaluate", "disk") == pytest.approx(4 * 20_000 * 4 * (2048 + 1008) / 1e9, rel=0.05)
    assert value(page, "evaluate", "store requests") == 4 * (3 * 40 + 1)


def test_more_workers_are_never_slower_and_the_limit_moves_off_the_arithmetic(page: Page) -> None:
    for stage in ("preprocess", "train", "evaluate", "nightly"):
        limits = [limit for limit in page.limits if limit.stage == stage]
        assert [limit.workers for limit in limits] == sorted({64, *GROWTH})
        hours = [limit.hours for limit in limits]
        assert all(later <= earlier * 1.05 for earlier, later in itertools.pairwise(hours))
        assert limits[-1].limit not in ("arithmetic", "CPUs")
        assert all(limit.busy is None or 0 < limit.busy <= 1 for limit in limits)


def test_advice_is_given_only_if_workers_are_idle_and_names_what_it_changes() -> None:
    chunks, batches = plan(replace(CONFIG, workers=128, checkpoints=1)).notes
    assert chunks.startswith("evaluate with --chunk-size 250: ")
    assert chunks.endswith("; the protocol stays the same")
    assert batches.startswith("evaluate with --chunk-size 40 --batch-size 40: ")
    assert "under another protocol" in batches
    assert plan(replace(CONFIG, workers=8)).notes == []


def test_the_job_prints_a_page_and_the_same_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "tiny", "--images", "1797", "--samples", "1000", "--workers", "8"]
    assert run_job(monkeypatch, "plan.py", *words) == 0
    text = capsys.readouterr().out
    assert run_job(monkeypatch, "plan.py", *words, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["machine"] in text
    assert all(row["basis"] in text for row in content["rows"] if row["stage"] == "train")
    assert {row["source"] for row in content["rows"]} == {"measured", "computed", "assumed"}


@pytest.mark.parametrize(
    ("hours", "shown"), [(0.001, "3.6 s"), (0.5, "30 minutes"), (5.0, "5 hours"), (100.0, "4.17 days")]
)
def test_times_are_in_a_unit_that_suits_them(hours: float, shown: str) -> None:
    assert quantity(hours, "hours") == shown


def test_every_unit_cost_was_measured_and_says_of_what() -> None:
    costs = read_unit_costs()
    assert "cores" in costs.machine
    for name, cost in costs.costs.items():
        assert 0 < cost["low"] <= cost["value"] <= cost["high"], name
        assert cost["unit"], name
        assert cost["what"], name


def test_the_page_that_is_shown_is_one_that_is_printed() -> None:
    (shown,) = re.findall(r"```text\n(.*?)```", (ROOT / "jobs" / "README.md").read_text(), re.DOTALL)
    printed = describe_page(plan(PlanConfig(model="cifar10", images=50_000, workers=64)))
    lines = [" ".join(line.split()) for line in shown.splitlines() if line]
    assert missing(lines, "\n".join(" ".join(line.split()) for line in printed.splitlines())) == []
