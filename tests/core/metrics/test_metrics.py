"""The Inception score and KID against direct formulas; the merge law; what they refuse."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpm_core.metrics import FeatureStatistics, FrechetDistance, InceptionScore, KernelDistance, PrecisionRecall
from ddpm_core.metrics.mergeable import Mergeable
from ddpm_core.rng import permutation


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def score_of(logits: Tensor, splits: int) -> tuple[float, float]:
    metric = InceptionScore(len(logits), splits, num_logits=logits.shape[1])
    metric.update(logits, torch.arange(len(logits)))
    mean, std = metric.compute()
    return mean.item(), std.item()


def score_by_numpy(logits: Tensor, splits: int) -> tuple[float, float]:
    """TTUR's formula: exp(mean KL(p(y|x) || p(y))) for each contiguous split; mean and std with ddof = 0."""
    p = scipy.special.softmax(logits.double().numpy(), axis=1)
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        kl = scipy.special.rel_entr(part, part.mean(0, keepdims=True)).sum(1)
        scores.append(math.exp(kl.mean()))
    return float(np.mean(scores)), float(np.std(scores))


@pytest.mark.parametrize(("n", "splits", "classes"), [(50, 10, 7), (103, 10, 12), (64, 1, 5), (9, 9, 3)])
def test_score_equals_the_papers_formula(n: int, splits: int, classes: int) -> None:
    logits = normal(0, n, classes) * 3
    # float64 sums of 100 terms; for one sample a split the score is exactly 1 and its std 0.
    assert score_of(logits, splits) == pytest.approx(score_by_numpy(logits, splits), rel=1e-12, abs=1e-14)


def test_score_is_one_if_undecided_and_the_number_of_classes_if_sure() -> None:
    assert score_of(torch.zeros(40, 6), 4) == pytest.approx((1.0, 0.0), abs=1e-14)
    sure = torch.eye(6).repeat(20, 1) * 1000  # every contiguous split of 30 is balanced; exp(-1000) is 0
    assert score_of(sure, 4) == pytest.approx((6.0, 0.0), rel=1e-12, abs=1e-12)
    sorted_by_class = sure[sure.argmax(1).argsort(stable=True)]
    assert score_of(sorted_by_class, 6)[0] == pytest.approx(1.0)  # one class a split: why real sets are permuted


@settings(deadline=None, max_examples=40)
@given(st.permutations(range(45)), st.lists(st.integers(0, 45), max_size=4), st.permutations(range(5)))
def test_score_merges_in_any_partition_and_order(order: list[int], cuts: list[int], merge: list[int]) -> None:
    logits = normal(1, 45, 6) * 2
    parts = np.split(np.array(order), sorted(cuts))
    merged = InceptionScore(45, 4, num_logits=6)
    for position in merge:
        if position < len(parts):
            part = InceptionScore(45, 4, num_logits=6)
            indices = torch.tensor(parts[position], dtype=torch.int64)
            part.update(logits[indices], indices)
            merged.merge_state(part.statistics() if position % 2 else part)
    mean, std = merged.compute()
    # Sums of a dozen positive terms of order 1 in another order: 1e-15 each.
    assert (mean.item(), std.item()) == pytest.approx(score_of(logits, 4), rel=1e-12)


def test_score_wants_every_index_once() -> None:
    metric = InceptionScore(20, 2, num_logits=3)
    metric.update(normal(0, 19, 3), torch.arange(19))
    with pytest.raises(ValueError, match=r"each of its 20 samples once; of split 1, 10 samples from index 10, .* 9$"):
        metric.compute()
    metric.update(normal(0, 1, 3), torch.tensor([3]))
    with pytest.raises(ValueError, match=r"of split 0, .* it has seen 11"):
        metric.compute()
    for wrong in (20, -1):
        with pytest.raises(ValueError, match=rf"^indices must be in 0..19; they go from {wrong} to {wrong}"):
            metric.update(normal(0, 1, 3), torch.tensor([wrong]))
    with pytest.raises(ValueError, match=r"^logits must be floating-point \[N, 3\]"):
        metric.update(normal(0, 2, 4), torch.arange(2))
    with pytest.raises(ValueError, match=r"^splits must be in 1..num_samples, 1..20; it is 21"):
        InceptionScore(20, 21)


def kid_of(generated: Tensor, reference: Tensor, **settings: int) -> tuple[float, float]:
    metric = KernelDistance(reference, **settings)
    metric.update(generated, torch.arange(len(generated)))
    kid = metric.compute()
    return kid.mean.item(), kid.std.item()


def mmd_by_loops(x: Tensor, y: Tensor) -> float:
    """The unbiased squared MMD, pair by pair."""
    a, b = x.double().numpy(), y.double().numpy()
    d, n = a.shape[1], len(a)

    def kernel(u: Any, v: Any) -> float:
        return float((u @ v / d + 1) ** 3)

    same = sum(kernel(z[i], z[j]) for z in (a, b) for i in range(n) for j in range(n) if i != j)
    across = sum(kernel(u, v) for u in a for v in b)
    return same / (n * (n - 1)) - 2 * across / n**2


def test_kid_equals_a_double_loop_over_each_subset() -> None:
    generated, reference = normal(2, 30, 5) * 1.2, normal(3, 25, 5) + 0.1
    values = [
        mmd_by_loops(
            generated[permutation(7, "kid-generated", subset, 30)[:8]],
            reference[permutation(7, "kid-reference", subset, 25)[:8]],
        )
        for subset in range(4)
    ]
    got = kid_of(generated, reference, subsets=4, subset_size=8, seed=7)
    assert got == pytest.approx((np.mean(values), np.std(values)), rel=1e-11)


def test_kid_equals_torchmetrics_formula_on_whole_sets() -> None:
    from torchmetrics.image.kid import poly_mmd

    generated, reference = normal(4, 40, 6).double(), normal(5, 40, 6).double() + 0.3
    expected = poly_mmd(generated, reference, degree=3, gamma=None, coef=1.0).item()
    # A subset of all 40 is the set in another order.
    got = kid_of(generated, reference, subsets=1, subset_size=40)
    assert got == pytest.approx((expected, 0.0), rel=1e-11)


class FirstPixels(torch.nn.Module):
    """An extractor for torchmetrics: an image's values as its features."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(len(images), -1)


def test_frechet_distance_equals_torchmetrics_on_the_same_features() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    oracle = FrechetInceptionDistance(feature=FirstPixels(), normalize=True).set_dtype(torch.float64)
    generated, reference = normal(6, 90, 6).double(), normal(7, 80, 6).double() * 1.5 + 0.2
    oracle.update(reference.reshape(80, 1, 2, 3), real=True)
    oracle.update(generated.reshape(90, 1, 2, 3), real=False)
    statistics = FeatureStatistics(6)
    statistics.update(reference)
    ours = FrechetDistance(statistics)
    ours.update(generated)
    # Both are float64; torchmetrics takes the root of eigenvalues of a matrix that is not symmetric.
    assert ours.compute().item() == pytest.approx(oracle.compute().item(), rel=1e-9)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save", r"ignore:std\(\)")
def test_inception_score_equals_torchmetrics_if_shuffling_does_not_matter() -> None:
    from torchmetrics.image.inception import InceptionScore as OracleScore

    logits = normal(8, 50, 6).double() * 2
    oracle = OracleScore(feature=FirstPixels(), splits=1)
    oracle.update(logits.reshape(50, 1, 2, 3))
    # One split: torchmetrics permutes the samples, which then changes nothing, and averages in the same way.
    assert score_of(logits, 1)[0] == pytest.approx(oracle.compute()[0].item(), rel=1e-9)


def test_kid_is_unbiased() -> None:
    # Equal distributions: the mean over many draws is 0 within its own error; single ones lie on both sides.
    values = [kid_of(normal(100 + s, 20, 4), normal(900 + s, 20, 4), subsets=1, subset_size=20)[0] for s in range(200)]
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error
    assert min(values) < -error
    # It could tell: the biased estimate, with the diagonal, is off by far more than that error.
    diagonal = ((normal(100, 20, 4).square().sum(1) / 4 + 1) ** 3).mean().item()
    assert diagonal / 20 > 10 * error


@settings(deadline=None, max_examples=15)
@given(st.permutations(range(30)), st.integers(0, 30))
def test_kid_merges_in_any_partition_and_order(order: list[int], cut: int) -> None:
    generated, reference = normal(6, 30, 5), normal(7, 20, 5)
    metric = KernelDistance(reference, subsets=3, subset_size=10)
    for part in (order[:cut], order[cut:]):
        other = KernelDistance(reference, subsets=3, subset_size=10)
        other.update(generated[part], torch.tensor(part, dtype=torch.int64))
        metric.merge_state(other)
    # The samples are sorted by index first, so even the bits are the same.
    mean, std, _ = metric.compute()
    assert (mean.item(), std.item()) == kid_of(generated, reference, subsets=3, subset_size=10)


def test_kid_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"^subsets must be 1 or more and subset_size in 2..9, .* 100 and 10"):
        KernelDistance(normal(0, 9, 3), subset_size=10)
    with pytest.raises(ValueError, match=r"^subset_size must be at most the number of samples, 5; it is 6"):
        kid_of(normal(0, 5, 3), normal(1, 9, 3), subset_size=6)
    metric = KernelDistance(normal(0, 9, 3), subset_size=2)
    metric.merge_state({"features": normal(0, 4, 5), "indices": torch.arange(4)})
    with pytest.raises(ValueError, match=r"^features must be floating-point \[N, 3\]"):
        metric.compute()


@pytest.mark.parametrize(
    "make",
    [
        lambda: InceptionScore(12, 3, num_logits=4),
        lambda: KernelDistance(normal(0, 12, 4), subsets=2, subset_size=6),
        lambda: PrecisionRecall(normal(0, 12, 4)),
    ],
)
def test_saved_statistics_start_a_metric_that_goes_on(make: Any, tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    values, indices = normal(1, 12, 4), torch.arange(12)
    first: Mergeable = make()
    first.update(values[:5], indices[:5])
    save_file(first.statistics(), tmp_path / "state.safetensors")
    second: Mergeable = make()
    second.merge_state(load_file(tmp_path / "state.safetensors"))
    second.update(values[5:], indices[5:])
    whole: Mergeable = make()
    whole.update(values, indices)
    torch.testing.assert_close(second.compute(), whole.compute(), rtol=1e-12, atol=1e-14)
    empty: Mergeable = make()
    save_file(make().statistics(), tmp_path / "empty.safetensors")
    empty.merge_state(load_file(tmp_path / "empty.safetensors"))
    empty.merge_state(whole)
    torch.testing.assert_close(empty.compute(), whole.compute(), rtol=1e-12, atol=1e-14)


def test_a_saved_state_does_not_change_with_the_metric() -> None:
    metric = InceptionScore(12, 3, num_logits=4)
    metric.update(normal(0, 6, 4), torch.arange(6))
    saved = metric.statistics()
    before = saved["n"].clone()
    metric.update(normal(0, 6, 4), torch.arange(6, 12))
    assert torch.equal(saved["n"], before)


def test_metrics_draw_nothing_from_the_global_generators() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    kid_of(normal(0, 20, 3), normal(1, 20, 3), subsets=2, subset_size=5)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[index]
