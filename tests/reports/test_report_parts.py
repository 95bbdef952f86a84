"""Figures, pictures and numbers: what a reader sees is what was measured, at a size a page can carry."""

import base64
import doctest
import io
import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from ddpm_core.verdicts import listed
from reports import formatting
from reports.drawing import figures, pictures
from reports.drawing.figures import Line, LinePoint, by_step, curve, smoothed, thinned
from reports.formatting import counted, number, shortened
from reports.records.entities import GridLayout
from reports.records.store import Series
from reports.sections.samples import spread

LAYOUT = GridLayout(tile=(8, 8), columns=4, count=16, indices="0..15", seed=0)


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


def coded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_the_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(formatting).failed == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured"),
        (float("nan"), "not a number"),
        (float("inf"), "infinite"),
        (0.0, "0"),
        (-1.5, "−1.500"),
        (9.9999, "10.00"),
        (0.00099999, "0.001000"),
        (1234567.0, "1,234,567"),
        (2.5e-7, "2.500 × 10⁻⁷"),
    ],
)
def test_numbers_have_sensible_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_words_around_numbers_agree_with_them() -> None:
    assert (counted(1, "run"), counted(1200, "run")) == ("1 run", "1,200 runs")
    assert [listed([]), listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]
    assert shortened("x" * 30 + "3f2a9c10b7de").endswith("…xxxx3f2a9c10b7de")


def test_the_same_figure_gives_the_same_text_and_another_name_other_ids() -> None:
    line = Line(
        label="a", points=[LinePoint(1, 3.0, (2.0, 4.0)), LinePoint(2, 1.0, (0.5, 1.5)), LinePoint(3, 2.0, (1.5, 2.5))]
    )

    def draw(name: str) -> str:
        return by_step(name, [line, line], metric="fd", alt="words", mark_lowest=True, batch_size=64)

    assert draw("one") == draw("one")
    ids = [set(re.findall(r'id="([^"]+)"', draw(name))) for name in ("one", "two")]
    assert ids[0]
    assert ids[1]
    assert not ids[0] & ids[1]


def test_a_figure_marks_the_minimum_in_words() -> None:
    line = Line(label="a", points=[LinePoint(100, 3.0), LinePoint(200, float("nan")), LinePoint(300, 1.25)])
    text = "".join(ElementTree.fromstring(by_step("n", [line], metric="fd", alt="x", mark_lowest=True)).itertext())
    assert "lowest fd: 1.250 at step 300" in text


def test_points_that_cannot_be_told_from_the_best_are_shaded() -> None:
    """Two more marks, for two such points; the chart passes on which these are."""
    near = Line(label="a", points=[LinePoint(1, 1.0, close=True), LinePoint(2, 1.1, close=True), LinePoint(3, 9.0)])
    far = Line(label="a", points=[point._replace(close=False) for point in near.points])
    plain = by_step("n", [far], metric="fd", alt="x", mark_lowest=True)
    assert by_step("n", [near], metric="fd", alt="x", mark_lowest=True).count("<use") == plain.count("<use") + 2


def strips_of(svg: str) -> list[tuple[list[str], float, float]]:
    """(lines of words, left, right) of each strip of a figure."""
    root = ElementTree.fromstring(svg)
    areas = [
        (strip.findtext("title") or "", strip.find("rect")) for strip in root.iter("g") if strip.get("class") == "at"
    ]
    return [
        (text.split("\n"), float(area.attrib["x"]), float(area.attrib["x"]) + float(area.attrib["width"]))
        for text, area in areas
        if area is not None
    ]


def test_a_figure_says_every_value_where_it_is_pointed_at() -> None:
    one = Line(
        label="one", points=[LinePoint(100, 14.0, (9.7, 18.3)), LinePoint(200, float("nan")), LinePoint(300, 9.0)]
    )
    two = Line(label="two", points=[LinePoint(100, 20.0), LinePoint(200, 8.0)])
    strips = strips_of(by_step("n", [one, two], metric="fd", alt="x", mark_lowest=True))
    assert [words for words, _, _ in strips] == [
        ["step 100", "one: 14.0 (9.7 to 18.3)", "two: 20.00"],
        ["step 200", "two: 8.000"],
        ["step 300", "one: 9.000"],
    ]
    alone = strips_of(by_step("n", [one], metric="fd", alt="x"))
    assert alone[0][0] == ["step 100", "fd: 14.0 (9.7 to 18.3)"]


def test_strips_cover_a_plot_without_gap_and_a_long_one_keeps_its_lowest() -> None:
    points = [LinePoint(step, 10 + abs(step - 4_321) / 1000) for step in range(1, 10_000, 10)]
    strips = strips_of(by_step("n", [Line(label="a", points=points)], metric="fd", alt="x", mark_lowest=True))
    assert 20 < len(strips) <= 40
    assert ["step 4,321", "fd: 10.00"] in [words for words, _, _ in strips]
    edges = [(right, left) for (_, _, right), (_, left, _) in pairwise(strips)]
    assert all(right == pytest.approx(left, abs=0.11) for right, left in edges)


def test_a_point_read_off_beside_its_line_says_where_it_lies() -> None:
    ours = figures.Relation(label="ours", points=[(x / 1000, 1.0) for x in range(1001)])
    paper = figures.Relation(label="paper", points=[(0.5, 2.0)], marks=True)
    texts = [words for words, _, _ in strips_of(figures.relation("n", [ours, paper], x="rate", y="rmse", alt="x"))]
    assert [words[1:] for words in texts if len(words) == 3] in (
        [["ours: 1.000", "paper: 2.000"]],
        [["ours: 1.000", "paper: 2.000 (at rate: 0.5000)"]],
    )


def test_a_legend_stands_above_the_plot() -> None:
    names = [f"lsun_bedroom_large-{i:012d}" for i in range(figures.MAX_LINES)]
    lines = [Line(label=name, points=[LinePoint(1, 1.0), LinePoint(2, 2.0)]) for name in names]
    for small in (False, True):
        root = ElementTree.fromstring(by_step("n", lines, metric="fd", alt="x", small=small))
        tops = {float(area.attrib["y"]) for area in root.iter("rect") if "x" in area.attrib}
        heights = [re.search(r"translate\(\S+ (\S+)\)", text.get("transform", "")) for text in root.iter("text")]
        lowest = [
            float(text.get("y") or (place[1] if place else "nan"))
            for text, place in zip(root.iter("text"), heights, strict=True)
            if "lsun" in (text.text or "")
        ]
        assert len(lowest) == len(names)
        assert max(lowest) < min(tops)


def test_lines_differ_without_their_colour() -> None:
    lines = [Line(label=str(i), points=[LinePoint(1, i), LinePoint(2, i + 1.0)]) for i in range(figures.MAX_LINES)]
    drawing = by_step("grey", lines, metric="fd", alt="x")
    dashes = {
        re.search("stroke-dasharray: ([^;]+)", style)[1] if "dasharray" in style else ""  # type: ignore[index]
        for style in re.findall(r'style="(fill: none; [^"]*var\(--c[^"]*)"', drawing)
    }
    assert len(dashes) == figures.MAX_LINES


def test_a_figure_takes_any_name_and_no_finite_value() -> None:
    odd = ["$x$ <b>&", "_hidden", "漢字", ""]
    lines = [Line(label=name, points=[LinePoint(1, float("nan")), LinePoint(2, float("inf"))]) for name in odd]
    root = ElementTree.fromstring(by_step("odd", lines, metric="fd", alt="<&>", mark_lowest=True, batch_size=8))
    assert root.get("aria-label") == "<&>"
    assert {"$x$ <b>&", "_hidden", "漢字"} <= {element.text for element in root.iter("text")}


def test_a_long_curve_is_thinned_without_losing_a_spike() -> None:
    steps, values = np.arange(100_000), np.ones(100_000)
    values[54_321], values[77_777] = 100.0, -5.0
    few_steps, few = thinned(steps, values)
    assert len(few) <= 1000
    assert {54_321, 77_777} <= set(few_steps.tolist())
    assert (few.max(), few.min()) == (100.0, -5.0)
    assert np.all(np.diff(few_steps) > 0)
    assert (
        len(curve("long", [("a", Series(steps=tuple(steps), values=tuple(values)))], metric="loss", alt="x")) < 60_000
    )


def test_a_smoothed_line_passes_a_spike_by() -> None:
    values = np.ones(300)
    values[150] = 1000.0
    _, smooth = smoothed(np.arange(300), values)
    assert smooth.max() == 1.0


def test_tiles_are_set_apart_in_a_square_and_keep_their_order_and_pixels() -> None:
    wide = GridLayout(tile=(16, 16), columns=8, count=15, indices="0..14", seed=0)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 128), dtype=np.uint8)
    apart = Image.open(io.BytesIO(pictures.square_sheet(coded(Image.fromarray(pixels)), wide)))
    shades, alpha = (np.asarray(band) for band in apart.split())
    assert apart.size == (67, 67)
    ninth = pixels[16:32, 0:16]  # tile 8 begins the second row of eight, and the third of four
    assert (shades[34:50, 0:16] == ninth).all()
    assert (alpha[34:50, 0:16] == 255).all()
    assert (alpha[16] == 0).all()
    assert (alpha[51:67, 51:67] == 0).all()  # there is no tile 15
    first = Image.open(io.BytesIO(pictures.square_sheet(coded(Image.fromarray(pixels)), wide, most=4)))
    assert first.size == (33, 33)
    assert (np.asarray(first.split()[0])[17:33, 17:33] == pixels[0:16, 48:64]).all()


def test_tiles_too_small_to_be_read_are_enlarged_each_for_itself() -> None:
    small = GridLayout(tile=(8, 8), columns=2, count=2)
    pixels = np.concatenate([np.full((8, 8), 10, np.uint8), np.full((8, 8), 200, np.uint8)], axis=1)
    shown = Image.open(io.BytesIO(pictures.square_sheet(coded(Image.fromarray(pixels)), small)))
    shades, alpha = (np.asarray(band) for band in shown.split())
    assert shown.size == (132, 64)
    assert (shades[:, :64] == 10).all()  # the neighbour does not bleed in
    assert (shades[:, 68:] == 200).all()
    assert (alpha[:, 64:68] == 0).all()


@pytest.mark.parametrize("layout", [None, LAYOUT, GridLayout(tile=(0, 0), columns=0, count=0, indices="", seed=0)])
def test_a_grid_that_is_not_of_the_stated_tiles_is_left_as_it_is(layout: GridLayout | None) -> None:
    content = coded(Image.new("RGB", (30, 30)))
    assert pictures.square_sheet(content, layout) == content


def test_a_small_picture_is_enlarged_by_a_whole_factor() -> None:
    shown = pictures.inline(coded(Image.new("L", (71, 71))), target=576, budget=10_000)
    assert (shown.width, shown.height, shown.reduced) == (568, 568, 1)
    assert decoded(shown.uri).size == (71, 71)


def test_a_large_picture_is_reduced_to_its_budget_and_says_so() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    shown = pictures.inline(coded(Image.fromarray(noise)), target=576, budget=100_000)
    assert shown.lossy
    assert decoded(shown.uri).size == (512 // shown.reduced, 512 // shown.reduced)
    assert len(shown.uri) < 140_000
    assert f"at 1/{shown.reduced} of its width" in shown.note


@pytest.mark.parametrize("content", [b"", b"<svg onload='alert(1)'/>", b"\x89PNG\r\n\x1a\n broken"])
def test_only_a_png_that_decodes_is_shown(content: bytes) -> None:
    with pytest.raises(pictures.UnreadablePicture):
        pictures.inline(content, target=100, budget=1000)


def test_a_few_steps_stand_for_many_with_the_ends_and_the_best_among_them() -> None:
    chosen = spread(list(range(0, 5000, 10)), keep=3330)
    assert len(chosen) == 12
    assert chosen == sorted(chosen)
    assert {0, 3330, 4990} <= set(chosen)
    assert spread([1, 2, 3], keep=2) == [1, 2, 3]
