"""MLflow's own UI in a browser: where a link or a click leads. Wants Chromium, and playwright-core of npm in the folder that
DDPM_NODE_MODULES names:

    npm install --prefix DIR playwright-core && export DDPM_NODE_MODULES=DIR/node_modules
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from support.measured_run import measured_run, record
from support.mlflow_server import Server

from ddpm_core.records import LOCAL_UI
from pipelines.evaluate.records import Records
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.ui import log_report

pytestmark = pytest.mark.slow

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
PLAYWRIGHT = Path(os.environ.get("DDPM_NODE_MODULES", "/nowhere")) / "playwright-core"
# Run with a page that has opened the address, and ends with what `value` is.
SCRIPT = """
const { chromium } = require(process.argv[1]);
(async () => {
  const browser = await chromium.launch({ executablePath: process.argv[2], args: ["--no-sandbox"] });
  const page = await browser.newPage({ viewport: { width: 1700, height: 950 } });
  page.setDefaultTimeout(60000);
  await page.goto(process.argv[3]);
  const rows = async (count) => {
    await page.waitForFunction((n) => document.querySelectorAll(".ag-center-cols-container .ag-row").length === n, count);
    return page.evaluate(() => [...document.querySelectorAll(".ag-center-cols-container .ag-row")]
      .sort((a, b) => a.getAttribute("row-index") - b.getAttribute("row-index"))
      .map((row) => Object.fromEntries([...row.querySelectorAll(".ag-cell")]
        .map((cell) => [cell.getAttribute("col-id"), cell.textContent.trim()]))));
  };
  let value;
  BODY
  console.log(JSON.stringify(value));
  await browser.close();
})().catch((error) => { console.error(error); process.exit(1); });
"""
FID, STANDING = "metrics.`fid`", "tags.`ddpm.standing`"
DISTANCES = {10: 9.0, 20: 5.0, 30: 4.0, 40: 4.5, 50: 8.0}


def browse(address: str, body: str) -> Any:
    """What a script leaves in `value`, in a page at an address."""
    if not CHROMIUM or not PLAYWRIGHT.is_dir():
        pytest.skip("no Chromium is installed, or DDPM_NODE_MODULES names no folder with playwright-core")
    command = ["node", "-e", SCRIPT.replace("BODY", body), str(PLAYWRIGHT), CHROMIUM, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, TrackedRun, str]]:
    """(the UI's address, a training's run, the link to the ranking of its checkpoints), beside a second protocol whose
    distances are lower."""
    storage = tmp_path_factory.mktemp("ui")
    tracker = Tracker(f"sqlite:///{storage}/mlflow.db", "church", storage / "mlartifacts" / "church")
    record(tracker, measured_run(storage, {10: 1.0, 20: 2.0}, samples=500))
    subject = measured_run(storage, DISTANCES)
    training = record(tracker, subject)
    link = Records(subject, lambda: tracker).link(subject.protocol("train", "selection"))
    page = storage / "report.html"
    page.write_text("<!DOCTYPE html><title>r</title><p>The whole report.</p>")
    log_report(tracker, page)
    server = Server(tracker.uri, storage / "mlartifacts")
    yield server.uri, training, link.replace(LOCAL_UI, server.uri)
    server.kill()


def test_the_link_shows_the_checkpoints_of_one_protocol_the_best_first(ranked: tuple[str, TrackedRun, str]) -> None:
    rows = browse(ranked[2], "value = await rows(5);")
    assert [float(row[FID]) for row in rows] == sorted(DISTANCES.values())
    assert [row[STANDING] for row in rows[:2]] == ["best", "not distinguishable"]
    assert rows[0]["metrics.`step`"] == "30"
    assert rows[0]["attributes.`Dataset`"].startswith("synthetic")


def test_clicks_on_sort_and_fid_show_the_best_first(ranked: tuple[str, TrackedRun, str]) -> None:
    """From the table as a filter alone leaves it, in the order in which the runs were made."""
    address, training, link = ranked
    protocol = link.rpartition("=")[2]
    condition = quote(f"tags.`ddpm.kind` = 'checkpoint' AND tags.`ddpm.protocol` = '{protocol}'")
    place = f"{address}/#/experiments/{training.experiment_id}/runs?workflowType=machine_learning"
    clicks = """
      await rows(1);  // the training, its checkpoints folded away
      await page.getByRole("button", { name: /Sort/ }).click();
      await page.getByRole("menuitemcheckbox", { name: "fid", exact: true }).click();
      await rows(5);
      await page.getByRole("button", { name: /Sort/ }).click();
      await page.getByRole("button", { name: "Sort ascending" }).click();
      await page.waitForFunction(() =>
        document.querySelector(".ag-center-cols-container .ag-row[row-index='0'] [col-id='metrics.`fid`']")
          ?.textContent.trim() === "4");
      value = await rows(5);
    """
    rows = browse(f"{place}&searchFilter={condition}", clicks)
    assert [float(row[FID]) for row in rows] == sorted(DISTANCES.values())


def test_a_trainings_page_shows_its_note_and_the_note_leads_on(ranked: tuple[str, TrackedRun, str]) -> None:
    address, training, _ = ranked
    place = f"{address}/#/experiments/{training.experiment_id}/runs/{training.run_id}"
    follow = """
      await page.locator("strong", { hasText: "Step 30 is the best of 5" }).waitFor();
      const source = await page.locator("[data-testid=note-editor-preview-content] img").getAttribute("src");
      const link = page.locator("[data-testid=note-editor-preview-content] a", { hasText: "Report" });
      await page.goto(new URL(await link.getAttribute("href"), page.url()).href);
      const frame = page.frameLocator("iframe").first();
      await frame.getByText("The whole report.").waitFor();
      value = source;
    """
    assert browse(place, follow).startswith("get-artifact?path=samples")
