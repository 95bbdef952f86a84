"""Names in MLflow: a configuration's values as parameters, and one name a thing."""

import doctest
from dataclasses import fields

from ddpm_core import records
from ddpm_core.presets import PRESETS
from ddpm_core.records import checkpoint_name, flatten


def test_the_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(records).failed == 0


def test_every_value_of_a_configuration_is_a_parameter_of_its_own() -> None:
    flat = flatten(PRESETS["tiny"])
    assert (flat["unet.ch_mult"], flat["unet.out_channels"], flat["optim.adam_betas"]) == ("1, 2", "None", "0.9, 0.999")
    assert (flat["diffusion.beta_start"], flat["horizontal_flip"]) == ("0.0001", "False")
    sizes = [len(fields(part)) for part in (PRESETS["tiny"].unet, PRESETS["tiny"].diffusion, PRESETS["tiny"].optim)]
    assert len(flat) == sum(sizes) + 3  # description, steps, horizontal_flip


def test_no_two_names_are_the_same() -> None:
    values = [value for name, value in vars(records).items() if name.isupper()]
    assert len(set(values)) == len(values)


def test_names_of_checkpoints_sort_by_step() -> None:
    steps = [1, 20, 300, 99_999_999]
    assert sorted(map(checkpoint_name, steps)) == [checkpoint_name(step) for step in steps]
