"""What a GPU can do at best: dense FLOP/s of its tensor cores, by its maker's data sheet or by its multiprocessors and clock."""

import re
from dataclasses import dataclass
from typing import Any

from ddpm_core.configs import Precision

# By the data sheets: (part of the device's name, TF32, bfloat16). A longer name stands before one that is a part of it.
_SHEETS = (
    ("A100", 156e12, 312e12),
    ("H100 PCIe", 378e12, 756e12),
    ("H100 NVL", 418e12, 835e12),
    ("H100 80GB HBM3", 494e12, 989e12),
    ("H800 PCIe", 378e12, 756e12),
    ("H800", 494e12, 989e12),
    ("H200 NVL", 418e12, 835e12),
    ("H200", 494e12, 989e12),  # GH200 too
    ("B200", 1125e12, 2250e12),
    ("L40S", 183e12, 362e12),
    ("L4", 60e12, 121e12),
)
# By compute capability: FLOPs a clock that a multiprocessor does in (TF32, bfloat16), two a multiplication with its addition.
_A_CLOCK = {
    (8, 0): (1024, 2048),
    (8, 6): (512, 1024),
    (8, 9): (512, 1024),
    (9, 0): (2048, 4096),
    (10, 0): (4096, 8192),
    (10, 3): (4096, 8192),
    (12, 0): (512, 1024),
}
_HALVED = {(8, 6), (8, 9), (12, 0)}  # on GeForce cards, which add up in float32 at half the rate
_SLICES = 7  # of a GPU, for MIG


@dataclass(frozen=True)
class Peak:
    """FLOP/s that a GPU can do, and where the number comes from, in words."""

    flops: float
    source: str

    def describe(self) -> str:
        return f"{self.flops / 1e12:,.0f} TFLOP/s, {self.source}"


def peak_flops(name: str, precision: Precision, properties: Any = None) -> Peak | None:
    """The peak of a GPU's tensor cores, in TF32 for float32: by its data sheet, if one is noted here, else by its
    multiprocessors, their clock and compute capability; None for other kinds, or a CPU.

    name: as torch.cuda.get_device_name says it; a MIG slice ("MIG 3g.40gb") has its share. properties: those of
    torch.cuda.get_device_properties, None for a GPU that is not at hand.
    """
    column = 1 if precision == "bfloat16" else 0
    mig = re.search(r" MIG (\d)g\.", name)
    slices = int(mig.group(1)) if mig else _SLICES
    for part, *peaks in _SHEETS:
        if re.search(rf"{part}\b", name):
            share = "" if mig is None else f"{slices}/{_SLICES} of "
            return Peak(peaks[column] * slices / _SLICES, f"{share}the data sheet's for {part} in {_unit(precision)}")
    capability = (getattr(properties, "major", 0), getattr(properties, "minor", 0))
    kilohertz = getattr(properties, "clock_rate", 0)
    if capability not in _A_CLOCK or not kilohertz:
        return None
    a_clock = _A_CLOCK[capability][column] / (2 if "GeForce" in name and capability in _HALVED else 1)
    processors = properties.multi_processor_count  # a MIG slice's own
    return Peak(
        processors * a_clock * kilohertz * 1e3,
        f"of {processors} multiprocessors at {kilohertz / 1e6:.2f} GHz in {_unit(precision)}",
    )


def _unit(precision: Precision) -> str:
    return "bfloat16" if precision == "bfloat16" else "TF32"
