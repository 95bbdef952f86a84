"""A large experiment is reported in the time it takes to read it."""

import time

import pytest
from support.report_experiments import DIGITS, page_of, writer_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]


def test_five_hundred_runs_of_a_hundred_checkpoints_take_a_minute() -> None:
    writer = writer_of("five-hundred")
    steps = range(100, 10_100, 100)
    train = writer.train("tiny-0a1b2c3d4e5f")
    evaluation = writer.evaluate(train, DIGITS, {step: 10 + abs(step - 4000) / 1000 for step in steps}, grids=False)
    writer.metrics(
        evaluation, {DIGITS.metric(name): dict.fromkeys(steps, 0.5) for name in ("kid", "precision", "recall")}
    )
    writer.copies([train, evaluation], 499)
    start = time.process_time()  # of this process, which alone works: the wall's clock also counts what runs beside it
    page = page_of("five-hundred")
    seconds = time.process_time() - start
    print(f"500 runs of 100 checkpoints: {seconds:.0f} s, {len(page.source) / 1e6:.1f} MB")
    assert page.root.all("h1")[0].text == "Step 4,000 has the lowest fd_digits, 10.00"
    assert "49,800 further rows are in MLflow only." in page.text
    assert "Training runs500" in page.root.all("header")[0].text
    assert len(page.source) < 10_000_000
    assert seconds < 60
