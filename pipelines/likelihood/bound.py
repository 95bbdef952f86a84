"""From the chunks' files to a likelihood's values and curves."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ddpm_core.likelihood import Bound, rate_distortion
from ddpm_core.pixel_range import SCALE
from ddpm_core.records import BPD, BPD_SE, CI_HIGH, CI_LOW, DISTORTION_BPD, PRIOR_BPD, RATE_BPD, RMSE
from ddpm_core.verdicts import mean_interval
from pipelines.storage.chunks import load_chunks
from pipelines.storage.locations import Location


def merge_chunks(folder: Location, chunks: Sequence[range]) -> tuple[dict[str, float], dict[str, list[float]] | None]:
    """(values, curves) of a whole measurement: those of `bound_values`, and of `curves_by_timestep` or None for an estimate.

    Keeps a few chunks in memory, four numbers an image and three a timestep.
    """
    columns: dict[str, list[Tensor]] = {"total": [], "prior": [], "decoder": [], "mse": []}
    sums: dict[str, Tensor] = {}
    for _, stored, _ in load_chunks(folder, chunks):
        if "terms" in stored:
            for name, rows in [("terms", stored["terms"]), ("mse", stored["mse"]), ("root", stored["mse"].sqrt())]:
                for row in rows:  # one by one, so that the rounding does not depend on where chunks end
                    sums[name] = sums[name].add_(row) if name in sums else row.clone()
        of_image = by_image(stored)
        for name, column in columns.items():
            column.append(of_image[name])
    total, prior, decoder, mse = (torch.cat(column) for column in columns.values())
    means = {name: of_timestep / len(total) for name, of_timestep in sums.items()}
    return bound_values(total, prior, decoder, mse), curves_by_timestep(means, prior.mean()) if means else None


def by_image(stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a chunk says of each image, float64 [b]: total L, prior L_T, decoder L_0, and the mse of x_0 predicted from x_1."""
    if "terms" not in stored:  # an estimate, whose chunks hold just that
        return stored
    terms, prior, mse = stored["terms"], stored["prior"], stored["mse"]
    # Clones, because a view would keep all T columns in memory.
    return {
        "total": Bound(terms, prior, mse).total,
        "prior": prior,
        "decoder": terms[:, 0].clone(),
        "mse": mse[:, 0].clone(),
    }


def bound_values(total: Tensor, prior: Tensor, decoder: Tensor, mse: Tensor) -> dict[str, float]:
    """Means over images, in bits/dim (paper, Eq. 5 and section 4.3), from float64 [n] of each.

    bpd: L, with its standard error and 95 % interval for images like these: they cover the choice of images, the noise and
    the drawn terms. rate_bpd: L_1 + .. + L_T. distortion_bpd: L_0. prior_bpd: L_T. rmse: of x_0 predicted from x_1, on
    0..255.
    """
    low, high = mean_interval(total.tolist())
    return {
        BPD: float(total.mean()),
        BPD_SE: float(total.std()) / math.sqrt(len(total)),  # s / sqrt(n), of which the interval is a multiple
        BPD + CI_LOW: low,
        BPD + CI_HIGH: high,
        RATE_BPD: float((total - decoder).mean()),
        DISTORTION_BPD: float(decoder.mean()),
        PRIOR_BPD: float(prior.mean()),
        RMSE: SCALE * float(mse.mean().sqrt()),  # mse is in units of [-1, 1]
    }


def curves_by_timestep(means: Mapping[str, Tensor], prior: Tensor) -> dict[str, list[float]]:
    """Fig. 5 and Table 4 over the paper's t = 1..T, which is the table's row T - t + 1.

    terms_bpd: L_{t-1}. rate_bpd: what having x_t costs, L_T + L_{T-1} + .. + L_t. rmse: of x_0 predicted from x_t, on
    0..255, as the root of the mean over all images; rmse_mean_of_roots: as the mean of the images' roots.

    means: of the terms, the mse and its root over images, float64 [T] each.
    """
    curve = rate_distortion(Bound(means["terms"][None], prior[None], means["mse"][None]))
    return {
        "t": list(range(1, len(means["terms"]) + 1)),
        "terms_bpd": means["terms"].tolist(),
        RATE_BPD: curve.rate.tolist(),
        RMSE: curve.distortion.tolist(),
        "rmse_mean_of_roots": (SCALE * means["root"]).tolist(),
    }
