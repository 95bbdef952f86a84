"""What a person must know before relying on the numbers: alarms of the nightly evaluation, and what went wrong."""

import math

from ddpm_core.records import ALARM_TAG, LOSS
from reports.records.entities import ExperimentRecord

SHOWN = 10  # sentences


def alarms(record: ExperimentRecord) -> tuple[str, ...]:
    """What the nightly evaluation warned of, of trainings and of their checkpoints."""
    pairs = [
        (run.name, text)
        for run in record.runs
        for text in (run.tags.get(ALARM_TAG, ""), *(evaluation.alarm for evaluation in run.evaluations))
    ]
    return tuple(f"{name}: {text}" for name, text in pairs if text)


def attention(record: ExperimentRecord) -> tuple[str, ...]:
    """Records that could not be used, runs that failed, losses that are not finite, evaluations that are not whole."""
    sentences = list(record.remarks)
    for run in record.runs:
        if run.status in ("FAILED", "KILLED") and not run.foreign:
            sentences.append(f"Training run {run.name} {'failed' if run.status == 'FAILED' else 'was killed'}.")
        if not math.isfinite(run.latest.get(LOSS, 0.0)):
            sentences.append(f"The last loss of {run.name} is not a finite number.")
        for evaluation in run.evaluations:
            if not evaluation.checkpoints:
                sentences.append(f"An evaluation of {run.name} ({evaluation.run_id}) has no result.")
            elif evaluation.status in ("FAILED", "KILLED"):
                sentences.append(
                    f"An evaluation of {run.name} ({evaluation.run_id}) did not end well: some are missing."
                )
    if len(sentences) > SHOWN:
        sentences[SHOWN:] = [f"And {len(sentences) - SHOWN:,} more of the kind."]
    return tuple(sentences)
