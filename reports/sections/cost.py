"""What the leading run cost in device hours, from the speeds that were logged, and in energy, if a wattage is given."""

import math
from itertools import pairwise

from ddpm_core.records import CPU_DEVICE, DEVICE_TAG, IMAGES_PER_SECOND, SAMPLES_PER_SECOND, WORKERS_TAG
from reports.drawing.elements import Column, Row, Table
from reports.formatting import number
from reports.records.entities import EvaluationRecord, RunRecord
from reports.records.store import Store


def cost_table(store: Store, run: RunRecord, watts: float | None) -> Table:
    """Device hours of training and evaluation. Time between a kill and the resumption is not in them; likelihoods and
    pictures log no speed and are not either."""
    device = "CPU worker" if run.tags.get(DEVICE_TAG, "").endswith(CPU_DEVICE) else "GPU"
    trained = training_hours(store, run)
    measured = [hours for each in run.evaluations if (hours := evaluation_hours(store, each)) is not None]
    evaluated = sum(measured) if measured else None
    lines = [(f"Training ({device} hours)", number(trained, 3)), (f"Evaluation ({device} hours)", number(evaluated, 3))]
    if trained is not None or evaluated is not None:
        total = (trained or 0.0) + (evaluated or 0.0)
        lines.append((f"Together ({device} hours)", number(total, 3)))
        if watts is not None:
            lines.append((f"Energy at {number(watts, 3)} W a device", f"{number(total * watts / 1000, 3)} kWh"))
    return Table(
        caption=f"Cost of {run.name}, from the logged speeds of training and sampling",
        columns=(Column(title="What", wraps=True), Column(title="Amount", numeric=True)),
        rows=tuple(Row(cells=line) for line in lines),
    )


def training_hours(store: Store, run: RunRecord) -> float | None:
    """Images between two records over the speed logged at the later one, times the workers; None if that was not logged."""
    batch, workers = run.batch_size, run.tags.get(WORKERS_TAG, "")
    if batch is None or not workers.isdecimal() or IMAGES_PER_SECOND not in run.latest:
        return None
    speed = store.training_history(run.run_id, IMAGES_PER_SECOND)
    points = [
        (step, value) for step, value in zip(speed.steps, speed.values, strict=True) if value > 0 and value < math.inf
    ]
    if not points:
        return None
    steps = pairwise([0, *(step for step, _ in points)])
    seconds = sum((end - start) * batch / value for (start, end), (_, value) in zip(steps, points, strict=True))
    return int(workers) * seconds / 3600


def evaluation_hours(store: Store, evaluation: EvaluationRecord) -> float | None:
    """Samples over the speed of one worker, summed over checkpoints. The same samples measured against a second reference
    are not made again: a test set counts nothing. None if the speed was not logged."""
    if evaluation.protocol.against == "test" or SAMPLES_PER_SECOND not in evaluation.metrics:
        return None
    speeds = store.history(evaluation.run_id, SAMPLES_PER_SECOND).values
    return sum(evaluation.protocol.num_samples / speed for speed in speeds if speed > 0) / 3600
