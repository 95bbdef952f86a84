"""Experiments as the pipelines log them, in one temporary MLflow store that all report tests share (MLflow
takes seconds to create a database), and a reader of the pages made from them."""

import atexit
import functools
import io
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric
from PIL import Image

from ddpm_core.protocol import FINGERPRINT_TAG, INCEPTION, KIND_TAG, Protocol
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
        tags = {KIND_TAG: kind, FINGERPRINT_TAG: name[-12:], **(tags or {})}
        run_id: str = self._client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id
        self._client.set_terminated(run_id, status)
        return run_id

    def metrics(self, run_id: str, values: Mapping[str, Mapping[int, float]], timestamp: int = 0) -> None:
        points = [Metric(name, v, timestamp, step) for name, at in values.items() for step, v in at.items()]
        for start in range(0, len(points), 1000):
            self._client.log_batch(run_id, metrics=points[start : start + 1000])

    def file(self, run_id: str, path: str, content: bytes) -> None:
        target = self._folder / run_id / "artifacts" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def json(self, run_id: str, path: str, value: Any) -> None:
        self._client.log_dict(run_id, value, path)

    def train(
        self, name: str, params: Mapping[str, Any] | None = None, card: Any = CARD, status: str = "FINISHED"
    ) -> str:
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
        self.metrics(
            run_id,
            {
                "loss": {step: 1 / step for step in steps},
                "grad_norm": {step: 2 / step for step in steps},
                "lr": dict.fromkeys(steps, 0.0002),
                "images_per_second": {step: 800.0 + step % 7 for step in steps},
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
    ) -> str:
        tags = {"mlflow.parentRunId": parent, FINGERPRINT_TAG: protocol.fingerprint}
        run_id = self.run("evaluate", f"evaluate-{protocol.fingerprint}", tags, status)
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
    """Everything there can be: two protocols, a sweep with a failed trial and one of another protocol."""
    writer = writer_of("digits")
    linear = writer.train("tiny-linear-0a0a0a0a0a0a")
    quad = writer.train("tiny-quad-1b1b1b1b1b1b", {"diffusion.schedule": "quad"})
    other = writer.train("tiny-cosine-2c2c2c2c2c2c", {"diffusion.schedule": "cosine"})
    writer.train("tiny-const-3d3d3d3d3d3d", status="FAILED")
    first = writer.evaluate(linear, DIGITS, {100: 40.0, 200: 9.0, 300: 9.6})
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
            "values": {"diffusion.schedule": label},
            "run_id": run_id,
            "evaluation_run_id": evaluation,
            "steps": 300,
            "status": status,
            "prior_bpd": 2.9e-5 if label == "linear" else None,
        }
        for label, run_id, evaluation, status in trials
    ]
    writer.json(sweep, "trials.json", rows)
    curve = {"t": [0, 500, 999], "alphas_cumprod": [0.9999, 0.08, 0.0], "log_snr": [9.2, -2.4, None]}
    writer.json(sweep, "schedules.json", {"linear": curve, "quad": curve})
    return Ids(linear=linear, quad=quad)


def writer_of(name: str) -> Writer:
    return Writer(MlflowClient(tracking_uri=tracking_uri()), _folder() / "artifacts", name)


@functools.cache
def page_of(experiment: str) -> "Page":
    """The report of an experiment, read."""
    output = build_report(tracking_uri(), experiment, _folder() / "pages" / f"{experiment}.html")
    return read_page(output.read_text(encoding="utf-8"))


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
        found: list[Element] = []
        for child in self.children:
            if isinstance(child, Element):
                found += [child] if child.tag in tags else []
                found += child.all(*tags)
        return found


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
        (found,) = [s for s in self.root.all("section") if [h.text for h in s.all("h2")] == [heading]]
        return found


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
