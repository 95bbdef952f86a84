"""Experiments as the pipelines log them, and a reader of the pages made from them.

All tests of reports share one temporary MLflow store, which takes seconds to make. The names of tags, metrics and artifacts
are written out here: a report must also read what was logged before.
"""

import atexit
import functools
import io
import json
import math
import shutil
import sqlite3
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric
from PIL import Image

from ddpm_core.protocol import INCEPTION, Protocol
from reports.build import build_report

ALERT = "<script>alert(1)</script>"

DIGITS = Protocol(
    num_samples=2048,
    seed=7,
    sampler="ancestral",
    sampler_steps=1000,
    spacing="uniform",
    clip_denoised=True,
    weights="ema",
    batch_size=256,
    precision="float32",
    extractor="digits",
    extractor_sha256="a" * 64,
    resize="none",
    reference="digits-train",
    reference_sha256="b" * 64,
    reference_images=1797,
)
FEWER = replace(DIGITS, num_samples=512)
FID = replace(DIGITS, num_samples=50_000, extractor=INCEPTION, reference="cifar10-train", reference_images=50_000)
CARD = {
    "name": "digits",
    "images": 1797,
    "shape": [8, 8, 1],
    "mean": [-0.39],
    "std": [0.75],
    "second_moment": 0.718,
    "source": "scikit-learn digits",
    "sha256": "c" * 64,
    "filter": None,
    "skipped": 0,
}

KINDS = (
    "progressive", "shared", "interpolation", "coarse_to_fine", "neighbours_pixels", "neighbours_features",
)  # fmt: skip


def png(width: int = 32, height: int = 32, shade: int = 128) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height), shade).save(buffer, "PNG")
    return buffer.getvalue()


class Writer:
    """Writes one experiment. Artifacts go straight to the artifact folder: the file is what a report
    reads."""

    def __init__(self, client: MlflowClient, folder: Path, name: str) -> None:
        self._client = client
        self._folder = folder / name
        self.experiment_id = client.create_experiment(name, artifact_location=self._folder.as_uri())

    def run(self, kind: str, name: str, tags: Mapping[str, str] | None = None, status: str = "FINISHED") -> str:
        tags = {"ddpm.kind": kind, "ddpm.fingerprint": name[-12:], **(tags or {})}
        run_id: str = self._client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id
        self._client.set_terminated(run_id, status)
        return run_id

    def metrics(self, run_id: str, values: Mapping[str, Mapping[int, float]], timestamp: int = 0) -> None:
        points = [Metric(name, v, timestamp, step) for name, at in values.items() for step, v in at.items()]
        for start in range(0, len(points), 1000):
            self._client.log_batch(run_id, metrics=points[start : start + 1000])

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self._client.set_tag(run_id, key, value)

    def share_view(self, protocol: str) -> None:
        """The table of the checkpoints under a protocol in MLflow's UI."""
        self._client.set_experiment_tag(self.experiment_id, f"mlflow.sharedViewState.{protocol}", "{}")

    def copies(self, run_ids: Sequence[str], amount: int) -> None:
        """So many copies of runs of this experiment with their metrics and artifacts, parents and children kept together:
        in SQL, as MLflow would take minutes."""
        tables = ("runs", "params", "tags", "metrics", "latest_metrics")
        places = ", ".join("?" * len(run_ids))
        with sqlite3.connect(tracking_uri().removeprefix("sqlite:///")) as database:
            originals = {
                table: database.execute(f"SELECT * FROM {table} WHERE run_uuid IN ({places})", run_ids).fetchall()
                for table in tables
            }
            for number in range(amount):
                fresh = {run_id: f"{number:04x}{run_id[4:]}" for run_id in run_ids}
                for table, rows in originals.items():
                    renamed = [tuple(self._renamed(value, fresh) for value in row) for row in rows]
                    database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", renamed)
                for run_id, copy in fresh.items():
                    shutil.copytree(self._folder / run_id, self._folder / copy)
        database.close()

    @staticmethod
    def _renamed(value: Any, fresh: Mapping[str, str]) -> Any:
        for run_id, copy in fresh.items():
            value = value.replace(run_id, copy) if isinstance(value, str) else value
        return value

    def file(self, run_id: str, path: str, content: bytes) -> None:
        target = self._folder / run_id / "artifacts" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def json(self, run_id: str, path: str, value: Any) -> None:
        self._client.log_dict(run_id, value, path)

    def train(
        self,
        name: str,
        params: Mapping[str, Any] | None = None,
        card: Any = CARD,
        status: str = "FINISHED",
        sections: bool = True,
    ) -> str:
        """sections: whether metrics have names with a section, or the names of earlier versions."""
        tags = {
            "ddpm.preset": "tiny",
            "ddpm.device": "2 x CPU",
            "ddpm.workers": "2",
            "ddpm.code_version": "0.1.0",
        }
        run_id = self.run("train", name, tags, status)
        params = {"optim.batch_size": 64, "optim.lr": 0.0002, "steps": 300, "seed": 0, **(params or {})}
        for key, value in params.items():
            self._client.log_param(run_id, key, value)
        steps = range(10, 310, 10)
        train, speed = ("train/", "speed/") if sections else ("", "")
        self.metrics(
            run_id,
            {
                f"{train}loss": {step: 1 / step for step in steps},
                f"{train}grad_norm": {step: 2 / step for step in steps},
                f"{train}lr": dict.fromkeys(steps, 0.0002),
                f"{speed}images_per_second": {step: 800.0 + step % 7 for step in steps},
                f"{train}param_norm": {step: 10 + step / 100 for step in steps},
                f"{speed}data_wait_share": dict.fromkeys(steps, 0.01),
                f"{speed}memory_gib": dict.fromkeys(steps, 0.5),
                **{f"{train}loss_q{quarter}": {step: quarter / step for step in steps} for quarter in (1, 2, 3, 4)},
            },
        )
        self.json(run_id, "data/card.json", card)
        self.file(run_id, "data/contact_sheet.png", png())
        return run_id

    def evaluate(
        self,
        parent: str,
        protocol: Protocol,
        distances: Mapping[int, float],
        half_width: float | None = 0.5,
        grids: bool = True,
        score: bool = True,
        status: str = "FINISHED",
        of_run: str = "",
    ) -> str:
        """`parent` is empty for weights from elsewhere, which `of_run` names."""
        tags = {**({"mlflow.parentRunId": parent} if parent else {}), "ddpm.fingerprint": protocol.fingerprint}
        run_id = self.run("evaluate", f"evaluate-{protocol.fingerprint}", {**tags, "ddpm.run": of_run}, status)
        self.json(run_id, "protocol.json", asdict(protocol))
        values = {protocol.distance: dict(distances)}
        if half_width is not None:
            for end, sign in (("low", -1), ("high", 1)):
                values[f"{protocol.distance}_ci_{end}"] = {
                    step: value + sign * half_width for step, value in distances.items() if math.isfinite(value)
                }
        if score:
            values[protocol.score] = {step: 5 + step / 1000 for step in distances}
            values[f"{protocol.score}_std"] = dict.fromkeys(distances, 0.1)
        self.metrics(run_id, values)
        if grids:
            layout = {"tile": [8, 8], "columns": 4, "count": 16, "indices": "0..15", "seed": protocol.seed}
            self.json(run_id, "samples/grid.json", layout)
            for step in distances:
                self.file(run_id, f"samples/step-{step:08d}.png", png(shade=step % 256))
        return run_id

    def further(self, run_id: str, protocol: Protocol, steps: Sequence[int]) -> None:
        """What an evaluation logs beside distance and score."""
        names = {"kid": 0.01, "kid_std": 0.001, "precision": 0.6, "recall": 0.5}
        values = {protocol.metric(name): dict.fromkeys(steps, value) for name, value in names.items()}
        for end, value in {"": 8.5, "_ci_low": 8.125, "_ci_high": 8.875}.items():
            values[f"{protocol.distance}_infinity{end}"] = dict.fromkeys(steps, value)
        values["samples_per_second"] = dict.fromkeys(steps, 512.0)
        self.metrics(run_id, values)
        for step in steps:
            points = [{"t": 999, "distance": 300.0}, {"t": 500, "distance": 100.0}, {"t": 0, "distance": 9.0}]
            self.json(run_id, f"progress/step-{step:08d}.json", points)

    def pictures(self, run_id: str, step: int, kinds: Sequence[str] = KINDS) -> None:
        """The pictures of a checkpoint, 2 x 3 tiles each."""
        folder = f"pictures/step-{step:08d}"
        for place, kind in enumerate(kinds):
            self.file(run_id, f"{folder}/{kind}.png", png(24, 16, shade=40 * place))
        facts = [
            {
                "kind": kind,
                "file": f"{kind}.png",
                "tile": [8, 8],
                "rows": 2,
                "columns": 3,
                "row_labels": [f"{kind} 0", f"{kind} 1"],
                "column_labels": ["t = 1,000", "t = 500", "t = 1"],
                "caption": f"What {kind} shows. ancestral sampling, seed 7.",
            }
            for kind in kinds
        ]
        self.json(run_id, f"{folder}/pictures.json", facts[::-1])

    def memorized(self, run_id: str, step: int, held_out: float | None = 0.02) -> None:
        """That 1 % of 1,000 samples stand out as copies in both spaces."""
        for name in ("memorized", "memorized_features_digits"):
            values = {name: 0.01, f"{name}_ci_low": 0.005, f"{name}_ci_high": 0.018}
            if held_out is not None:
                values[f"{name}_held_out"] = held_out
            self.metrics(run_id, {key: {step: value} for key, value in values.items()})
        facts = {"threshold": 0.5, "nearest": 50, "samples": 1000, "training_images": 1797}
        self.json(run_id, f"neighbours/step-{step:08d}.json", facts)

    def likelihood(
        self,
        parent: str,
        bits: Mapping[int, float],
        *,
        data: str = "digits",
        sha256: str = "c" * 64,
        images: int = 1797,
        strata: int | None = None,
        rows: Sequence[tuple[float, float]] = (),
    ) -> str:
        """Bits/dim by step, ± 0.01; where every term was evaluated also curves over T = 1000, which pass through `rows`
        (rate, rmse) after 1000, 900, .. steps sent."""
        protocol = {
            "images": images,
            "strata": strata,
            "seed": 0,
            "weights": "ema",
            "data": data,
            "data_sha256": sha256,
        }
        run_id = self.run("likelihood", f"likelihood-{data}-{images}-{strata}", {"mlflow.parentRunId": parent})
        self.json(run_id, "likelihood/protocol.json", protocol)
        for step, bpd in bits.items():
            values = {
                "bpd": bpd,
                "bpd_ci_low": bpd - 0.01,
                "bpd_ci_high": bpd + 0.01,
                "rate_bpd": bpd / 2,
                "distortion_bpd": bpd / 2,
                "prior_bpd": 2e-5,
                "rmse": 0.95,
            }
            curves = None
            if strata is None:
                known = list(rows) or [(1.8 - 0.2 * place, 1.0 + 7 * place) for place in range(10)]
                places = [divmod(t - 1, 100) for t in range(1, 1001)]  # between the rows another value at every t
                curves = {
                    "t": list(range(1, 1001)),
                    "rate_bpd": [known[row][0] - after / 2000 for row, after in places],
                    "rmse": [known[row][1] + after / 20 for row, after in places],
                }
            result = {"step": step, "values": values, "curves": curves}
            self.json(run_id, f"likelihood/step-{step:08d}.json", result)
        return run_id


@dataclass(frozen=True, kw_only=True)
class Ids:
    """The run ids of the `digits` experiment."""

    linear: str
    quad: str


@functools.cache
def tracking_uri() -> str:
    """The shared store, empty of experiments but MLflow's own."""
    return f"sqlite:///{_folder() / 'mlflow.db'}"


@functools.cache
def digits() -> Ids:
    """Everything there can be: two protocols, a sweep with a failed trial and one of another protocol, and a run of a kind
    that is not reported on."""
    writer = writer_of("digits")
    linear = writer.train("tiny-linear-0a0a0a0a0a0a")
    quad = writer.train("tiny-quad-1b1b1b1b1b1b", {"diffusion.schedule": "quad"})
    other = writer.train("tiny-cosine-2c2c2c2c2c2c", {"diffusion.schedule": "cosine"})
    writer.train("tiny-const-3d3d3d3d3d3d", status="FAILED")
    first = writer.evaluate(linear, DIGITS, {100: 40.0, 200: 9.0, 300: 9.6})
    writer.run("checkpoint", "step 100", {"mlflow.parentRunId": linear})
    writer.further(first, DIGITS, [100, 200, 300])
    writer.pictures(first, 200)
    writer.memorized(first, 200)
    writer.likelihood(linear, {200: 5.1, 300: 5.0})
    writer.likelihood(linear, {300: 5.2}, images=200, strata=16)
    # Lower than every distance of the leading protocol: a report that mixes them would name it the best.
    writer.evaluate(linear, FEWER, {200: 3.25, 300: 3.5})
    second = writer.evaluate(quad, DIGITS, {300: 12.0})
    third = writer.evaluate(other, FEWER, {300: 2.75})
    sweep = writer.run("sweep", "schedules-4e4e4e4e4e4e")
    trials = [("linear", linear, first, "finished"), ("quad", quad, second, "finished")]
    trials += [("cosine", other, third, "finished"), ("const", quad, None, "failed")]  # type: ignore[list-item]
    rows = [
        {
            "label": label,
            "point": label,
            "run_id": run_id,
            "evaluation_run_id": evaluation,
            "steps": 300,
            "status": status,
            "prior_bpd": 2.9e-5 if label == "linear" else None,
        }
        for label, run_id, evaluation, status in trials
    ]
    writer.json(sweep, "trials.json", rows)
    curve = {
        "t": [0, 500, 999],
        "betas": [1e-4, 0.01, 0.02],
        "alphas_cumprod": [0.9999, 0.08, 0.0],
        "log_snr": [9.2, -2.4, None],
    }
    writer.json(sweep, "schedules.json", {"linear": curve, "quad": curve})
    return Ids(linear=linear, quad=quad)


def writer_of(name: str) -> Writer:
    return Writer(MlflowClient(tracking_uri=tracking_uri()), _folder() / "artifacts", name)


@functools.cache
def page_of(experiment: str) -> "Page":
    """The report of an experiment, read."""
    output = build_report(tracking_uri(), experiment, _folder() / "pages" / f"{experiment}.html")
    return read_page(output.read_text(encoding="utf-8"))


def summary_of(experiment: str, suffix: str = ".json") -> Any:
    """What stands beside that report: report.json as a value, or the Markdown as text."""
    page_of(experiment)
    text = (_folder() / "pages" / f"{experiment}{suffix}").read_text(encoding="utf-8")
    return json.loads(text) if suffix == ".json" else text


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="report-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@dataclass(kw_only=True)
class Element:
    tag: str
    attributes: Mapping[str, str]
    children: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        parts = (child if isinstance(child, str) else child.text for child in self.children)
        return " ".join("".join(parts).split())

    def all(self, *tags: str) -> list["Element"]:
        """All elements below it with one of the tags, in the order of the page."""
        elements: list[Element] = []
        for child in self.children:
            if isinstance(child, Element):
                elements += [child] if child.tag in tags else []
                elements += child.all(*tags)
        return elements


@dataclass(frozen=True, kw_only=True)
class Page:
    source: str
    root: Element

    @property
    def text(self) -> str:
        (body,) = self.root.all("body")
        return body.text

    @property
    def elements(self) -> list[Element]:
        def walk(element: Element) -> list[Element]:
            below = [walk(child) for child in element.children if isinstance(child, Element)]
            return [element, *(inner for group in below for inner in group)]

        return walk(self.root)

    def tables(self, caption: str) -> list[list[list[str]]]:
        """The cells of every table whose caption begins so, without the head."""
        return [
            [[cell.text for cell in row.all("th", "td")] for row in table.all("tbody")[0].all("tr")]
            for table in self.root.all("table")
            if table.all("caption")[0].text.startswith(caption)
        ]

    def section(self, heading: str) -> Element:
        """The section under an h2."""
        (section,) = [s for s in self.root.all("section") if [h.text for h in s.all("h2")] == [heading]]
        return section


def read_page(source: str) -> Page:
    reader = _Tree()
    reader.feed(source)
    reader.close()
    assert [element.tag for element in reader.open] == ["document"], "an element is not closed"
    return Page(source=source, root=reader.open[0])


class _Tree(HTMLParser):
    _VOID = frozenset(("meta", "img", "br", "link", "input"))

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element(tag="document", attributes={})]

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute of {tag} is there twice"
        element = Element(tag=tag, attributes={name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in self._VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self._VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)
