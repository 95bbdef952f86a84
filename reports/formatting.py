"""Numbers, counts and lists as text for a person: sensible digits, thousands by commas, a real minus and exponent."""

import math
import re

NOT_MEASURED = "not measured"
NOT_RECORDED = "not recorded"

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MINUS = str.maketrans("-", "−")


def typeset(sentence: str) -> str:
    """A sentence that a terminal shows too, with a real minus and a plus-minus that stays with its numbers.

    >>> typeset("20.5 above (95 % interval -3 to 1.5e-05)")
    '20.5 above (95 % interval −3 to 1.5e-05)'
    """
    return re.sub(r"(?<!\S)-(?=\d)", "−", sentence).replace(" +- ", "\u00a0±\u00a0")


def number(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits; below 0.001 and from 10 million on as m × 10ⁿ.

    >>> number(23456.7), number(0.02954), number(2.911e-05, 2), number(None)
    ('23,457', '0.02954', '2.9 × 10⁻⁵', 'not measured')
    """
    if value is None or not math.isfinite(value):
        return _without_digits(value)
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    power = int(exponent)
    if not -3 <= power < 7:
        return f"{mantissa.translate(_MINUS)} × 10{str(power).translate(_SUPERSCRIPTS)}"
    return fixed(value, max(0, digits - 1 - power))


def fixed(value: float | None, decimals: int) -> str:
    """A number with a fixed number of decimals, so that a column of them lines up."""
    if value is None or not math.isfinite(value):
        return _without_digits(value)
    return f"{value:,.{decimals}f}".translate(_MINUS)


def _without_digits(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    return "not a number" if math.isnan(value) else ("infinite" if value > 0 else "minus infinite")


def decimals_for(value: float, low: float | None = None, high: float | None = None) -> int:
    """How many decimals a measured value deserves: two significant digits of its interval's half width, or four of the
    value if no interval is known.

    >>> decimals_for(12.3456, 11.9, 12.8), decimals_for(12.3456), decimals_for(0.0123)
    (2, 2, 5)
    """
    if low is not None and high is not None and 0 < high - low < math.inf:
        scale, digits = (high - low) / 2, 2
    else:
        scale, digits = abs(value), 4
    if scale == 0 or not math.isfinite(scale):
        return 0
    return min(8, max(0, digits - 1 - math.floor(math.log10(scale))))


def count(amount: int | None) -> str:
    """A whole number with its thousands marked."""
    return NOT_MEASURED if amount is None else f"{amount:,}"


def counted(amount: int, noun: str) -> str:
    """A count with its noun: '1 checkpoint', '1,200 checkpoints'."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def shortened(text: str) -> str:
    """A long name with its middle left out; the end stays, for fingerprints stand there."""
    return text if len(text) <= 32 else f"{text[:15]}…{text[-16:]}"
