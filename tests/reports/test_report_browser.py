"""The page in a browser: nothing is asked for, nothing complains, everyone can use it. Wants Chromium, and the packages
axe-core and html-validate of npm in the folder that DDPM_NODE_MODULES names:

    npm install --prefix DIR axe-core html-validate && export DDPM_NODE_MODULES=DIR/node_modules
"""

import functools
import html
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.processes import ROOT
from support.report_experiments import CARD, DIGITS, FID, digits, page_of, writer_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
OWN = re.compile(r"https?://([a-z0-9-]+\.)*(google|googleapis|gvt1)\.com/")  # what Chromium itself asks for


def npm(path: str) -> Path:
    file = Path(os.environ.get("DDPM_NODE_MODULES", "")) / path
    if not os.environ.get("DDPM_NODE_MODULES") or not file.exists():
        pytest.skip(f"DDPM_NODE_MODULES names no folder with {path.split('/')[0]}")
    return file


def browse(page: str, folder: Path, *options: str) -> tuple[str, list[str], set[str]]:
    """(the document after its scripts ran, console lines, addresses that were asked for)"""
    if not CHROMIUM:
        pytest.skip("no Chromium is installed")
    (folder / "page.html").write_text(page, encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=60000",
        f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}", *options,
        "--dump-dom", f"file://{folder / 'page.html'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    events = json.loads((folder / "net.json").read_text())["events"]
    urls = {event["params"]["url"] for event in events if "url" in (event.get("params") or {})}
    # A page from a file asks for itself through no network.
    asked = {url for url in urls if not OWN.match(url)}
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], asked


def with_script(page: str, script: str) -> str:
    """The page with a script of the test's after its own, which its policy would refuse."""
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    return page.replace("</body>", f"<script>{script}</script></body>")


def returning(script: str) -> str:
    """A script that leaves the JSON of the promise `script` as the document's only element."""
    return (
        f'addEventListener("load", () => Promise.resolve({script}).then((value) => {{'
        'const element = document.createElement("pre"); element.id = "value";'
        "element.textContent = JSON.stringify(value); document.body.replaceChildren(element); }));"
    )


def value_of(document: str) -> Any:
    element = re.search(r'<pre id="value">(.*?)</pre>', document, re.DOTALL)
    assert element, "the script left no value"
    return json.loads(html.unescape(element[1]))


@functools.cache
def everything() -> str:
    """A page with all that a report can hold: alarm, tables of the paper, pictures, a sweep."""
    digits()
    writer = writer_of("browser")
    card = {**CARD, "name": "cifar10", "images": 50_000, "shape": [32, 32, 3]}
    run = writer.train("cifar10-a", {"diffusion.mean_type": "eps", "diffusion.loss_type": "mse"}, card)
    protocol = replace(FID, reference="cifar10")
    steps = range(100, 3100, 100)
    evaluation = writer.evaluate(run, protocol, {step: 3 + abs(step - 2000) / 500 for step in steps})
    writer.further(evaluation, protocol, list(steps))
    writer.pictures(evaluation, 2000)
    writer.memorized(evaluation, 2000)
    writer.tag(evaluation, {"ddpm.alarm": "The lowest FID rose."})
    writer.likelihood(run, {2000: 3.7}, data="cifar10-test", sha256="d" * 64, images=10_000)
    return page_of("browser").source


def test_no_address_is_asked_for_and_the_console_stays_empty(tmp_path: Path) -> None:
    _, console, asked = browse(everything(), tmp_path)
    assert console == []
    assert asked == set()


def test_a_foreign_script_and_picture_would_be_refused(tmp_path: Path) -> None:
    """That the test above can fail, and that the policy holds."""
    page = everything().replace("</body>", '<script>x()</script><img src="http://192.0.2.1/a.png" alt=""></body>')
    _, console, asked = browse(page, tmp_path)
    assert len([line for line in console if "Content Security Policy" in line]) == 2
    assert asked == set()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing(width: int, scheme: str, tmp_path: Path) -> None:
    axe = npm("axe-core/axe.min.js").read_text(encoding="utf-8").replace("</script", "<\\/script")
    script = axe + returning(
        "axe.run().then((r) => [r.passes.length, r.violations.map((v) => [v.impact, v.id, v.nodes.length])])"
    )
    options = [f"--window-size={width},900", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    passed, violations = value_of(browse(with_script(everything(), script), tmp_path, *options)[0])
    assert passed > 30
    assert violations == []


@pytest.mark.parametrize("experiment", ["browser", "digits"])
def test_the_html_is_valid(experiment: str, tmp_path: Path) -> None:
    program = npm("html-validate/bin/html-validate.mjs")
    everything()
    (tmp_path / "page.html").write_text(page_of(experiment).source, encoding="utf-8")
    # A region that scrolls is no section with a heading of its own.
    rules = {"extends": ["html-validate:standard"], "rules": {"prefer-native-element": "off"}, "root": True}
    (tmp_path / ".htmlvalidate.json").write_text(json.dumps(rules))
    done = subprocess.run(
        ["node", program, "page.html"], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout


def test_tables_sort_by_value_and_pictures_open_and_close_by_key(tmp_path: Path) -> None:
    script = """(() => {
      const table = document.querySelector("table.sortable"), heads = table.tHead.rows[0].cells;
      const column = (place) => [...table.tBodies[0].rows].map((row) => row.cells[place].textContent);
      const press = (place) => { heads[place].querySelector("button").click(); return column(place); };
      const made = column(1), up = press(1), state = heads[1].ariaSort, down = press(1), distance = press(2);
      const zoom = document.querySelector("details.zoom"), summary = zoom.querySelector("summary");
      summary.click();
      const open = [zoom.open, getComputedStyle(summary).position];
      document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
      return { made, up, state, down, distance, open, closed: zoom.open,
        wide: document.documentElement.scrollWidth <= innerWidth };
    })()"""
    state = value_of(browse(with_script(everything(), returning(script)), tmp_path, "--window-size=390,900")[0])
    steps = [f"{step:,}" for step in range(100, 3100, 100)]
    assert state["made"][0] == "2,000"
    assert (state["up"], state["down"]) == (steps, steps[::-1])
    assert state["state"] == "ascending"
    assert state["distance"] == sorted(state["distance"], key=float)
    assert (state["open"], state["closed"]) == ([True, "fixed"], False)
    assert state["wide"], "the page is wider than a phone"


def test_figures_say_their_values_to_pointer_and_key_and_without_a_script_as_titles(tmp_path: Path) -> None:
    script = """(() => {
      const chart = document.querySelector(".chart"), places = [...chart.querySelectorAll(".at")];
      const tip = () => document.querySelector(".tip")?.textContent, slider = chart.querySelector("input");
      places[3].dispatchEvent(new PointerEvent("pointerenter", { pointerType: "mouse" }));
      const pointed = tip();
      chart.firstElementChild.dispatchEvent(new PointerEvent("pointerleave", { pointerType: "mouse" }));
      const left = tip() ?? "none";
      slider.focus();
      slider.stepUp();
      slider.dispatchEvent(new Event("input"));
      return { pointed, left, keyed: tip(), said: slider.getAttribute("aria-valuetext"),
        sliders: document.querySelectorAll(".chart input").length, charts: document.querySelectorAll(".chart").length,
        names: chart.querySelectorAll("title").length };
    })()"""
    state = value_of(browse(with_script(everything(), returning(script)), tmp_path)[0])
    assert state["pointed"] == "step 400\nFID: 6.20 (5.70 to 6.70)"
    assert state["left"] == "none"
    assert state["keyed"] == "step 500\nFID: 6.00 (5.50 to 6.50)"
    assert state["said"] == "step 500, FID: 6.00 (5.50 to 6.50)"
    assert state["sliders"] == state["charts"] > 5
    assert state["names"] == 0  # else the browser would show them too
    assert "<title>step 400\nFID: 6.20 (5.70 to 6.70)</title>" in everything()


def test_what_was_not_measured_sorts_last_both_ways(tmp_path: Path) -> None:
    cells = ["2.9 × 10⁻⁵", "not measured", "−1.5", "1,234.5", "≤ 3.75", "infinite", "9.0 ± 0.1", "–"]
    rows = "".join(f"<tr><td>{cell}</td></tr>" for cell in cells)
    table = f'<table class="sortable"><thead><tr><th class="n">x</th></tr></thead><tbody>{rows}</tbody></table>'
    source = (ROOT / "reports" / "templates" / "report.js").read_text(encoding="utf-8")
    script = """(() => {
      const sorted = () => { document.querySelector("button").click();
        return [...document.querySelectorAll("td")].map((cell) => cell.textContent); };
      return [sorted(), sorted()];
    })()"""
    page = f"<!DOCTYPE html><meta charset=utf-8><body>{table}<script>{source}</script></body>"
    up, down = value_of(browse(with_script(page, returning(script)), tmp_path)[0])
    known = ["−1.5", "2.9 × 10⁻⁵", "≤ 3.75", "9.0 ± 0.1", "1,234.5", "infinite"]
    assert up == [*known, "not measured", "–"]
    assert down == [*known[::-1], "not measured", "–"]


def test_sixty_four_samples_of_256_pixels_fit_into_ten_megabytes() -> None:
    # Noise at half resolution: harder to compress than photographs, whose PNG has about two bytes a pixel.
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((2048, 2048)).save(buffer, "PNG", compress_level=1)
    assert len(buffer.getvalue()) > 8_000_000
    writer = writer_of("large-grid")
    steps = range(100, 1300, 100)
    evaluation = writer.evaluate(writer.train("tiny-large"), DIGITS, dict.fromkeys(steps, 4.0))
    layout = {"tile": [256, 256], "columns": 8, "count": 64, "indices": "0..63", "seed": 7}
    writer.json(evaluation, "samples/grid.json", layout)
    for step in steps:
        writer.file(evaluation, f"samples/step-{step:08d}.png", buffer.getvalue())
    page = page_of("large-grid")
    assert len(page.section("Samples").all("img")) == 12
    assert len(page.source) < 10_000_000
    assert re.search(r"Compressed( and at 1/\d of its width)? to keep this file small", page.text)
