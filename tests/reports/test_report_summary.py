"""report.json and the Markdown: what programs and chats get is what the page says, whatever the records hold."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.processes import ROOT
from support.report_experiments import ALERT, CARD, DIGITS, FID, digits, page_of, summary_of, tracking_uri, writer_of

from reports.build import build_report

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

SCHEMA = json.loads((ROOT / "reports" / "report.schema.json").read_text())


def valid(facts: Any) -> Any:
    jsonschema.validate(facts, SCHEMA, cls=jsonschema.Draft202012Validator)
    return facts


def test_the_schema_is_one_and_refuses_what_is_missing_or_unknown() -> None:
    digits()
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    facts = summary_of("digits")
    for broken in ({**facts, "more": 1}, {key: value for key, value in facts.items() if key != "best"}):
        with pytest.raises(jsonschema.ValidationError):
            valid(broken)


def test_programs_get_what_the_page_says() -> None:
    ids = digits()
    facts, page = valid(summary_of("digits")), page_of("digits")
    assert facts["headline"] == page.root.all("h1")[0].text
    best = facts["best"]
    assert (best["run_id"], best["step"], best["value"], best["low"], best["high"]) == (ids.linear, 200, 9.0, 8.5, 9.5)
    assert (best["metric"], best["protocol"], best["images_seen"]) == ("fd_digits", DIGITS.fingerprint, 12_800)
    assert [other["step"] for other in best["indistinguishable"]] == [300]
    assert best["paper"] is None
    assert [p["checkpoints"] for p in facts["protocols"]] == [4, 3]
    assert [(each["bits_per_dim"], each["estimate"]) for each in facts["likelihoods"]] == [
        (5.1, False),
        (5.0, False),
        (5.2, True),
    ]
    assert facts["sweeps"][0]["conclusions"][0].startswith("By fd_digits: linear 9.6 is better")
    assert facts["previous"] is None


@pytest.mark.parametrize("values", [{}, {100: float("nan")}, {100: float("inf"), 200: 3.0}])
def test_a_summary_of_missing_and_broken_numbers_is_valid_json(values: dict[int, float], tmp_path: Path) -> None:
    name = f"summary-{len(values)}"
    writer = writer_of(name)
    train = writer.train("tiny-summary")
    writer.metrics(train, {"train/loss": {310: float("nan")}})
    if values:
        writer.evaluate(train, DIGITS, values, half_width=None)
    writer.likelihood(train, {100: float("nan")})
    facts = valid(summary_of(name))
    assert (facts["best"] is None) == (len(values) < 2)
    assert facts["likelihoods"][0]["bits_per_dim"] is None


def test_a_report_tells_what_the_one_before_it_named_the_best(tmp_path: Path) -> None:
    writer, output = writer_of("twice"), tmp_path / "report.html"
    train = writer.train("tiny-twice")
    evaluation = writer.evaluate(train, DIGITS, {100: 5.0})

    def build() -> tuple[str, Any]:
        build_report(tracking_uri(), "twice", output)
        return output.read_text(), valid(json.loads(output.with_suffix(".json").read_text()))

    page, facts = build()
    assert "previous report" not in page
    writer.metrics(
        evaluation, {"fd_digits": {200: 4.0}, "fd_digits_ci_low": {200: 3.5}, "fd_digits_ci_high": {200: 4.5}}
    )
    page, facts = build()
    assert facts["previous"]["best"]["step"] == 100
    assert "step 100 of tiny-twice was best with 5.00: this is 1.00 lower." in page
    assert "step 100 of tiny-twice was best" in output.with_suffix(".md").read_text()
    assert build() == (page, facts)  # the same records again: nothing changes, the comparison stays
    output.with_suffix(".json").write_text("{")
    assert build()[1]["previous"] is None
    build_report(tracking_uri(), "digits", output)  # of another experiment
    assert json.loads(output.with_suffix(".json").read_text())["previous"] is None


def test_numbers_of_two_protocols_are_not_set_against_each_other_over_time(tmp_path: Path) -> None:
    writer, output = writer_of("switched"), tmp_path / "report.html"
    train = writer.train("tiny-switched", card={**CARD, "name": "cifar10"})
    writer.evaluate(train, DIGITS, {100: 5.0})
    build_report(tracking_uri(), "switched", output)
    writer.evaluate(train, FID, {100: 50.0})
    build_report(tracking_uri(), "switched", output)
    assert "was best, by another protocol: the two numbers do not compare." in output.read_text()


def test_hostile_names_are_plain_text_in_markdown() -> None:
    writer = writer_of("markdown")
    writer.evaluate(writer.train(f"{ALERT} | **b** [x](http://evil)\n# big"), DIGITS, {100: 4.0})
    text = summary_of("markdown", suffix=".md")
    assert "\\<script\\>alert(1)\\</script\\> \\| \\*\\*b\\*\\* \\[x\\](http://evil) \\# big" in text
    assert f"- Protocol {DIGITS.fingerprint}: lowest fd\\_digits 4.00 (95 % interval 3.50 to 4.50), step 100 of" in text
    assert all(line == "" or line.startswith(("- ", "**")) for line in text.splitlines())
