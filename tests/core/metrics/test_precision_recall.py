"""Improved precision and recall against a double loop and scikit-learn."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_core.metrics import PrecisionRecall, precision_recall
from ddpm_core.rng import permutation


def features(seed: int, n: int, d: int = 3, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def measured(generated: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    metric = PrecisionRecall(reference, k=k)
    metric.update(generated, torch.arange(len(generated)))
    manifolds = metric.compute()
    return manifolds.precision.item(), manifolds.recall.item()


def share_inside(queries: Tensor, points: Tensor, k: int) -> float:
    """The definition, with loops over points and numpy for one distance."""
    x, y = points.double().numpy(), queries.double().numpy()
    radii = [np.sort([np.linalg.norm(a - b) for j, b in enumerate(x) if j != i])[k - 1] for i, a in enumerate(x)]
    return float(np.mean([any(np.linalg.norm(q - a) <= r for a, r in zip(x, radii, strict=True)) for q in y]))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rows", [1024, 7, 4, 11])
def test_precision_and_recall_equal_the_definition(k: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_recall, "_ROWS", rows)
    generated, reference = features(0, 40, shift=0.7), features(1, 33)
    expected = share_inside(generated, reference, k), share_inside(reference, generated, k)
    assert 0.1 < min(expected) < max(expected) < 1  # the case can tell
    assert expected[0] != expected[1]
    assert measured(generated, reference, k) == expected


def share_inside_by_scipy(queries: Tensor, points: Tensor, k: int) -> float:
    x, y = points.double().numpy(), queries.double().numpy()
    radii = np.sort(cdist(x, x, "sqeuclidean"), axis=1)[:, k]
    return float((cdist(y, x, "sqeuclidean") <= radii).any(1).mean())


def clustered(seed: int) -> Tensor:
    """Of 40 points each, much nearer to each other than the rounding of a float32 distance."""
    return (features(seed, 10, 32) * 30).repeat(40, 1) + 1e-3 * features(seed + 10, 400, 32)


CASES: dict[str, Callable[[int], Tensor]] = {
    "far from 0": lambda seed: (
        features(seed, 400, 32) + 5e3
    ),  # where float32 rounds a squared distance to multiples of 64
    "clusters": clustered,
    "clusters and others": lambda seed: torch.cat([clustered(seed)[:200], features(seed, 200, 32)]),
    "squares that underflow": lambda seed: 1e-25 * features(seed, 400, 32),
    "squares that overflow": lambda seed: 1e25 * features(seed, 400, 32),
    "one point far away": lambda seed: torch.cat([features(seed, 399, 32), torch.full((1, 32), 1e6)]),
    "float64": lambda seed: features(seed, 400, 32).double() + 1e6,
    "bfloat16": lambda seed: features(seed, 400, 32).bfloat16(),
}


@pytest.mark.parametrize("rows", [512, 150])
@pytest.mark.parametrize("case", CASES)
def test_the_rounding_of_float32_decides_nothing(case: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_recall, "_ROWS", rows)
    generated, reference = CASES[case](0), CASES[case](1)
    generated[::7] = reference[::7]  # copies, at distance 0
    expected = share_inside_by_scipy(generated, reference, 3), share_inside_by_scipy(reference, generated, 3)
    assert measured(generated, reference) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert measured(generated, reference) == expected


class Largest(TorchDispatchMode):
    """Remembers how many values the largest tensor has that is made under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.values = max(self.values, tensor.numel())
        return made


def test_no_more_than_a_block_of_distances_is_held_at_any_number_of_images() -> None:
    generated, reference = features(10, 5_000), features(11, 4_000)
    with Largest() as largest:
        measured(generated, reference)
    assert 512 * 512 <= largest.values <= 512 * (512 + 8 * 3 + 4)  # and the nearest so far


def test_radii_equal_scikit_learns_neighbours() -> None:
    points = features(2, 300, d=20).double()
    distances, _ = NearestNeighbors(n_neighbors=4).fit(points.numpy()).kneighbors(points.numpy())  # itself first
    np.testing.assert_allclose(precision_recall.squared_radii(points, 3).sqrt(), distances[:, 3], rtol=1e-10)


def test_a_set_against_itself_and_against_a_far_one() -> None:
    a = features(3, 50, d=8)
    assert measured(a, a) == (1.0, 1.0)
    assert measured(a, a + 1000) == (0.0, 0.0)


def test_a_dropped_mode_costs_recall_and_not_precision() -> None:
    reference = torch.cat([features(4, 200), features(5, 200, shift=100.0)])
    precision, recall = measured(features(6, 200), reference)
    assert precision > 0.8
    assert 0.4 < recall <= 0.5


def test_copies_lie_inside_the_empty_balls_of_their_copies() -> None:
    # Five copies of a point have radius 0 at k = 3; a sixth is at distance 0 only if no rounding is left.
    points = features(7, 30, d=200) * 30
    assert torch.equal(precision_recall.squared_radii(points.repeat(5, 1), 3), torch.zeros(150).double())
    assert measured(points.repeat(5, 1), points.repeat(6, 1)) == (1.0, 1.0)
    assert measured(points.repeat(5, 1) * (1 + 1e-5), points.repeat(6, 1)) == (0.0, 0.0)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(30)), st.integers(1, 29))
def test_any_partition_and_order_merge_to_the_same(order: list[int], cut: int) -> None:
    generated, reference = features(8, 30, shift=0.5), features(9, 25)
    metric = PrecisionRecall(reference)
    for part in (order[:cut], order[cut:]):
        other = PrecisionRecall(reference)
        other.update(generated[part], torch.tensor(part))
        metric.merge_state(other.statistics())
    assert tuple(value.item() for value in metric.compute()[:2]) == measured(generated, reference)


def test_the_smallest_sets_have_one_neighbour_more_than_none() -> None:
    """Balls of radius 1 around 0 and 1 hold 0.5 and not 5; those around 0.5 and 5, of radius 4.5, hold both 0 and 1."""
    reference, generated = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.5], [5.0]])
    metric = PrecisionRecall(reference, k=1)
    metric.update(generated, torch.arange(2))
    assert tuple(value.item() for value in metric.compute()[:2]) == (0.5, 1.0)


def test_arguments_that_are_wrong_are_named() -> None:
    with pytest.raises(ValueError, match=r"^k must be in 1..4, below the reference's size; it is 5"):
        PrecisionRecall(features(0, 5), k=5)
    with pytest.raises(ValueError, match=r"^k must be below the number of samples, 3; it is 3"):
        measured(features(0, 3), features(1, 9))
    metric = PrecisionRecall(features(0, 9))
    with pytest.raises(ValueError, match="PrecisionRecall has seen no samples"):
        metric.compute()
    metric.update(features(1, 4), torch.tensor([0, 1, 2, 1]))
    with pytest.raises(ValueError, match=r"^indices must be distinct; sample 1 came more than once"):
        metric.compute()
    with pytest.raises(ValueError, match=r"^reference must be finite"):
        PrecisionRecall(torch.full((5, 2), torch.inf))


def test_the_error_of_recall_is_that_of_halves_of_the_samples_with_radii_of_their_own() -> None:
    generated, real = features(0, 120).double(), features(1, 150, shift=0.4).double()
    metric = PrecisionRecall(real)
    metric.update(generated, torch.arange(120))
    unused, variances = torch.zeros(150, dtype=torch.float64), []
    for division in range(8):
        order = permutation(0, "recall-halves", division, 120)
        halves = [generated[order[:60]], generated[order[60:]]]
        one, other = (
            precision_recall.inside_manifolds(half, real, precision_recall.squared_radii(half, 3), unused)[1].double()
            for half in halves
        )
        alone, together = (one - other).square().mean() / 300, (one.mean() - other.mean()).square() / 2
        variances.append((alone + together) / 2)
    assert metric.compute().recall_error.item() == pytest.approx(torch.stack(variances).mean().sqrt().item(), rel=1e-12)


def test_halves_that_have_no_k_neighbours_give_no_error() -> None:
    for n, known in ((7, False), (8, True)):
        metric = PrecisionRecall(features(0, 20))
        metric.update(features(1, n), torch.arange(n))
        assert metric.compute().recall_error.isfinite().item() == known
