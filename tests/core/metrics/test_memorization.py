"""Nearest neighbours and the rule that calls samples memorized."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_core.metrics.memorization import NEAREST, Neighbours, memorized, merge_neighbours, nearest, nearness


def brute_force(queries: np.ndarray, items: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(squared distances, numbers) of the nearest items; of integers, so they are exact."""
    squared = np.array([[((query - item) ** 2).sum() for item in items] for query in queries])
    order = np.argsort(squared, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(squared, order, 1), order


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 40), st.integers(1, 12))
def test_nearest_items_are_those_of_brute_force_however_they_are_divided(
    seed: int, queries: int, items: int, each: int
) -> None:
    rng = np.random.default_rng(seed)
    # Few levels and dimensions: many distances are equal, and the lower number must win.
    x, y = rng.integers(0, 4, (queries, 3)).astype(float), rng.integers(0, 4, (items, 3)).astype(float)
    parts = [nearest(torch.tensor(x), torch.tensor(y[at : at + each]), at, 7) for at in range(0, items, each)]
    neighbours = merge_neighbours(parts, 7)
    squared, numbers = brute_force(x, y, 7)
    # The root of an integer differs in its last bit between processors, and squared again rounds to the integer.
    assert torch.equal(neighbours.distances.square().round(), torch.tensor(squared))
    assert torch.equal(neighbours.numbers, torch.tensor(numbers))


def test_distances_of_pixels_are_exact() -> None:
    # 196,608 values: in float32 the squares' sum would be off by hundreds, and a copy would not have distance 0.
    pixels = torch.randint(0, 256, (60, 196_608), generator=torch.Generator().manual_seed(0)).double()
    near = pixels[:1].clone()
    near[0, 7] += 1.0
    neighbours = nearest(torch.cat([pixels[:1], near]), pixels, 0)
    assert neighbours.distances[:, 0].tolist() == [0.0, 1.0]
    assert neighbours.numbers[:, 0].tolist() == [0, 0]


def test_a_copy_is_memorized_and_a_new_draw_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2000, 20, generator=generator, dtype=torch.float64)
    near_copies = data[:100] + 0.1 * torch.randn(100, 20, generator=generator, dtype=torch.float64)
    fresh = torch.randn(100, 20, generator=generator, dtype=torch.float64)
    assert memorized(nearest(near_copies, data, 0).distances).all()
    assert not memorized(nearest(fresh, data, 0).distances).any()


def test_what_is_near_everything_is_no_copy_but_a_copy_of_duplicates_is() -> None:
    even = torch.full((1, NEAREST), 0.01, dtype=torch.float64)
    assert nearness(even).item() == pytest.approx(1.0, rel=1e-12)
    assert not memorized(even).any()
    assert memorized(torch.zeros(1, NEAREST, dtype=torch.float64)).all()
    # 1 is half of the mean of 1 and 3: "not farther than" takes the threshold itself.
    assert memorized(torch.tensor([[1.0, 3.0], [1.001, 3.0]], dtype=torch.float64)).tolist() == [True, False]


def test_neighbours_of_fewer_items_than_asked_for_are_all_of_them() -> None:
    neighbours = nearest(torch.zeros(1, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64), 5)
    assert isinstance(neighbours, Neighbours)
    assert neighbours.numbers.tolist() == [[5, 6, 7]]
