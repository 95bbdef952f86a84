"""What a training changed of the preset that it started from."""

from functools import cache

from ddpm_core.presets import PRESETS
from ddpm_core.records import PRESET_TAG, flatten
from reports.records.entities import RunRecord


def preset_of(run: RunRecord) -> str:
    """The name of the preset that a run started from, "" if it is not recorded."""
    return run.tags.get(PRESET_TAG, "")


@cache
def preset_parameters(name: str) -> dict[str, str]:
    """A preset's values as MLflow holds those of a run, empty for a preset that is not known here."""
    if name not in PRESETS:
        return {}
    return {key: value for key, value in flatten(PRESETS[name]).items() if key != "description"}


def changes(run: RunRecord) -> dict[str, str] | None:
    """What a run changed of its preset: parameter -> the preset's value. None for a preset that is not known here."""
    parameters = preset_parameters(preset_of(run))
    if not parameters:
        return None
    return {name: value for name, value in parameters.items() if run.params.get(name, value) != value}
