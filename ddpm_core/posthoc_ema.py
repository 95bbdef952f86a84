"""Moving averages whose length is chosen after the training: power-function profiles and their post-hoc reconstruction
(Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C).

After t updates the average counts the weights after update tau in proportion to tau^gamma, however long the training is. Its
length is sigma_rel, the standard deviation of that profile over t, from which gamma follows. Two averages are tracked; that of
another length is a sum of what they were at several steps, by the weights whose profile is nearest to its own.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpm_core.configs import TRACKED_LENGTHS

Vector = NDArray[np.floating[Any]]

SPACING = 1 / 16  # of the steps whose averages are used, relative to the step


def exponent(length: float) -> float:
    """gamma of the profile tau^gamma with a relative standard deviation sigma_rel = `length`, which is below 0.288."""
    # sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))    (Eq. 123), a cubic equation in gamma (Eq. 126, Algorithm 2)
    inverse = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


class Reconstruction(NamedTuple):
    """weights: float64 [steps, tracked lengths], adding up to 1, of the averages tracked at those steps. error: the L2 distance
    of their joint profile from the wanted one, over the norm of that.

    By Cauchy-Schwarz a reconstructed weight is off by at most error * |profile| * |theta - c|, for any constant c: the L2
    norms, over the time of training, of the wanted profile and of that weight's path.
    """

    weights: Vector
    error: float


def chosen_steps(steps: Iterable[int], step: int | None = None) -> list[int]:
    """Those of some steps, ascending, whose averages are used: each at least SPACING beyond the one before, and the last at
    least that far below `step`, the step that an average is wanted at, which then ends the list.

    What is left out is never missed later: the choice among those that were kept is the choice among all.
    """
    chosen: list[int] = []
    for each in sorted(steps):
        near = step is not None and each * (1 + SPACING) > step
        if not near and (not chosen or each >= chosen[-1] * (1 + SPACING)):
            chosen.append(each)
    return chosen if step is None else [*chosen, step]


def reconstruct(steps: Sequence[int], length: float) -> Reconstruction:
    """How to put the average of a length at the last of some steps together from those tracked at all of them: least squares
    over profiles (Algorithm 3), normalised as in the authors' code, so that what training does not change stays as it is."""
    t = np.repeat(np.asarray(steps, dtype=np.float64) / steps[-1], len(TRACKED_LENGTHS))
    gammas = np.tile([exponent(each) for each in TRACKED_LENGTHS], len(steps))
    end, gamma = np.ones(1), np.array([exponent(length)])
    gram, target = _products(t, gammas, t, gammas), _products(t, gammas, end, gamma)[:, 0]
    squared = float(_products(end, gamma, end, gamma)[0, 0])
    x = np.linalg.solve(gram, target)
    x /= x.sum()
    distance = max(0.0, squared - 2 * float(x @ target) + float(x @ gram @ x))
    return Reconstruction(x.reshape(len(steps), -1), float(np.sqrt(distance / squared)))


def _products(t: Vector, gamma: Vector, s: Vector, delta: Vector) -> Vector:
    """The inner products of profiles (gamma + 1) tau^gamma / t^(gamma + 1) on 0..t with others, of delta on 0..s."""
    t, gamma = t[:, None], gamma[:, None]
    least = np.minimum(t, s)
    # Eq. 151: (gamma + 1)(delta + 1) / (gamma + delta + 1) * min(t, s)^(gamma + delta + 1) / (t^(gamma + 1) s^(delta + 1))
    factor = (gamma + 1) * (delta + 1) / (gamma + delta + 1)
    return factor * (least / t) ** gamma * (least / s) ** delta * least / (t * s)
