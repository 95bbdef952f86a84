"""Peaks of GPUs: the data sheets', and those that multiprocessors and clock make, which are the same where both are known."""

from types import SimpleNamespace

import pytest

from ddpm_core.configs import Precision
from ddpm_core.devices import peak_flops


def properties(name: str, capability: tuple[int, int], processors: int, megahertz: int) -> SimpleNamespace:
    major, minor = capability
    return SimpleNamespace(
        name=name, major=major, minor=minor, multi_processor_count=processors, clock_rate=1000 * megahertz
    )


@pytest.mark.parametrize(
    ("name", "bfloat16", "tf32"),
    [
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 494e12),
        ("NVIDIA H100 NVL", 835e12, 418e12),
        ("NVIDIA GH200 480GB", 989e12, 494e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA B200", 2250e12, 1125e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 312e12 * 3 / 7, 156e12 * 3 / 7),
        ("NVIDIA H100 80GB HBM3 MIG 7g.80gb", 989e12, 494e12),
    ],
)
def test_peaks_are_the_data_sheets_and_a_slices_its_share(name: str, bfloat16: float, tf32: float) -> None:
    expected_of: dict[Precision, float] = {"bfloat16": bfloat16, "float32": tf32}
    for precision, expected in expected_of.items():
        peak = peak_flops(name, precision)
        assert peak is not None
        assert peak.flops == pytest.approx(expected)
        assert "data sheet's" in peak.source
        assert ("/7 of" in peak.source) == ("MIG" in name)


@pytest.mark.parametrize(
    ("name", "capability", "processors", "megahertz", "bfloat16", "tf32"),
    [  # by the makers' data sheets, at the clocks that they state
        ("another name", (8, 0), 108, 1410, 312e12, 156e12),
        ("NVIDIA GeForce RTX 3090", (8, 6), 82, 1695, 71.2e12, 35.6e12),
        ("NVIDIA A40", (8, 6), 84, 1740, 149.7e12, 74.8e12),
        ("NVIDIA GeForce RTX 4090", (8, 9), 128, 2520, 165.2e12, 82.6e12),
        ("another name", (9, 0), 132, 1830, 989e12, 494e12),
        ("NVIDIA GeForce RTX 5090", (12, 0), 170, 2407, 209.5e12, 104.8e12),
        ("NVIDIA RTX PRO 6000 Blackwell", (12, 0), 188, 2617, 503.8e12, 251.9e12),
    ],
)
def test_multiprocessors_and_clock_make_the_data_sheets_peak(
    name: str, capability: tuple[int, int], processors: int, megahertz: int, bfloat16: float, tf32: float
) -> None:
    gpu = properties(name, capability, processors, megahertz)
    expected_of: dict[Precision, float] = {"bfloat16": bfloat16, "float32": tf32}
    for precision, expected in expected_of.items():
        peak = peak_flops(name, precision, gpu)
        assert peak is not None
        assert peak.flops == pytest.approx(expected, rel=0.01)
        assert peak.source.startswith(f"of {processors} multiprocessors at {megahertz / 1000:.2f} GHz")


def test_a_gpu_of_which_nothing_is_known_has_no_peak() -> None:
    assert peak_flops("", "float32") is None
    assert peak_flops("NVIDIA GeForce GTX 1080", "bfloat16") is None
    assert peak_flops("NVIDIA GeForce GTX 1080", "bfloat16", properties("", (6, 1), 20, 1733)) is None
    assert peak_flops("NVIDIA A40", "bfloat16", properties("", (8, 6), 84, 0)) is None  # a clock that cannot be read
    assert peak_flops("NVIDIA A1000", "bfloat16") is None
