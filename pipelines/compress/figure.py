"""A measured curve for a person: in lines, and as a figure."""

from typing import Any

from matplotlib.figure import Figure

from ddpm_core.records import IMAGES_PER_SECOND


def describe_curve(curve: dict[str, Any]) -> list[str]:
    """The curve in lines. curve: what measure_curve returned."""
    lossless, theory, account, overhead = (curve[name] for name in ("lossless", "theory", "account", "overhead"))
    speed = curve[IMAGES_PER_SECOND]
    totals = (
        f"lossless {lossless['coded']:.3f} bits/dim; the bound {theory['total']:.3f} ({overhead['total']:+.1%}); "
        f"PNG {lossless['png']:.3f}, WebP {lossless['webp']:.3f}"
    )
    lossy = (
        f"lossy part {account['lossy']:.3f} bits/dim; L_1 + .. + L_T {theory['lossy']:.3f} ({overhead['lossy']:+.1%}); "
        f"the coded steps' KL {account['kl']:.3f} ({account['lossy'] / account['kl'] - 1.0:+.1%})"
    )
    lines = [totals, lossy, f"{speed['encode']:.3g} images/s encoded, {speed['decode']:.3g} decoded"]
    points = [("coded", point) for point in curve["coded"]]
    points += [(name, point) for name, of_format in curve["lossy"].items() for point in of_format]
    return lines + [f"{name}: {point['rate']:.3f} bits/dim, RMSE {point['rmse']:.2f}" for name, point in points]


def draw_curve(curve: dict[str, Any]) -> Figure:
    """Distortion against rate, as the right panel of the paper's Fig. 5."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = [
        ("files cut at their checks", curve["coded"], "o-"),
        ("JPEG", curve["lossy"]["JPEG"], "s:"),
        ("WebP", curve["lossy"]["WEBP"], "^:"),
    ]
    for label, points, style in lines:
        axes.plot([point["rate"] for point in points], [point["rmse"] for point in points], style, ms=4, label=label)
    theory = curve["theory"]
    axes.plot(theory["rate"], theory["rmse"], "k--", lw=1, label="theory: L_T + .. + L_t")
    for (name, rate), style in zip(curve["lossless"].items(), ("-", ":", "-."), strict=True):
        axes.axvline(rate, color="grey", lw=1, ls=style, label=f"{name} lossless, {rate:.2f}")
    axes.set(xlabel="bits/dim", ylabel="RMSE of 0..255", xscale="symlog", ylim=(0, None), xlim=(0, None))
    axes.legend(fontsize=8)
    return figure
