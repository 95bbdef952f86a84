"""The moving average of the weights in closed form, and that it follows the model wherever it goes."""

import pytest
import torch
from torch import nn

from ddpm_core.ema import Ema


def model(value: float) -> nn.Linear:
    linear = nn.Linear(1, 1).to(torch.float64)
    with torch.no_grad():
        for p in linear.parameters():
            p.fill_(value)
    return linear


def put(linear: nn.Linear, value: float) -> None:
    with torch.no_grad():
        for p in linear.parameters():
            p.fill_(value)


def test_the_first_update_copies_the_weights() -> None:
    linear = model(1.0)
    ema = Ema(linear, 0.9)
    put(linear, 5.0)
    assert ema.shadow["weight"].item() == 1.0
    ema.update(0)
    assert {name: tensor.item() for name, tensor in ema.shadow.items()} == {"weight": 5.0, "bias": 5.0}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_after_n_updates_each_weight_counts_by_its_age(decay: float) -> None:
    """shadow_n = d^n w_0 + (1 - d) sum_k d^(n-k) w_k: no warm-up of the decay, no debiasing."""
    weights = [0.3, -1.2, 4.0, 0.5, 2.2, -3.0]
    linear = model(9.0)
    ema = Ema(linear, decay)
    for step, value in enumerate(weights):
        put(linear, value)
        ema.update(step)
    n = len(weights) - 1
    expected = decay**n * weights[0] + (1 - decay) * sum(decay ** (n - k) * weights[k] for k in range(1, n + 1))
    assert ema.shadow["weight"].item() == pytest.approx(expected, rel=1e-14)


def test_the_half_life_of_the_papers_decay_is_6931_steps() -> None:
    linear = model(1.0)
    ema = Ema(linear, 0.9999)
    ema.update(0)
    put(linear, 0.0)
    for step in range(1, 6932):
        ema.update(step)
    assert ema.shadow["weight"].item() == pytest.approx(0.5, abs=1e-4)  # one step is 5e-5


def test_updates_leave_the_model_alone_and_need_no_graph() -> None:
    linear = model(2.0)
    ema = Ema(linear, 0.5)
    ema.update(0)
    ema.update(1)
    assert linear.weight.item() == 2.0
    assert linear.weight.requires_grad
    assert not any(tensor.requires_grad for tensor in ema.shadow.values())
    assert ema.shadow["weight"].data_ptr() != linear.weight.data_ptr()


def test_the_average_follows_a_model_that_moved() -> None:
    """Module.to puts new storage under the parameters, as a move to a GPU does: an average that kept the old storage would
    never see another update."""
    linear = nn.Linear(1, 1)
    ema = Ema(linear, 0.5)
    linear.to(torch.float64)
    ema.shadow = {name: tensor.to(torch.float64) for name, tensor in ema.shadow.items()}
    put(linear, 3.0)
    ema.update(0)
    assert ema.shadow["weight"].item() == 3.0


def test_state_round_trips_and_a_foreign_one_is_refused() -> None:
    ema, other = Ema(model(1.0), 0.5), Ema(model(2.0), 0.5)
    ema.load_state_dict(other.state_dict())
    assert ema.shadow["bias"].item() == 2.0
    other.shadow["bias"].fill_(7.0)
    assert ema.shadow["bias"].item() == 2.0  # copied, not shared
    with pytest.raises(ValueError, match=r"EMA state has 1 tensors: the 2 of the model were wanted"):
        ema.load_state_dict({"weight": torch.zeros(1, 1)})


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay is"):
        Ema(model(0.0), decay)


def test_an_average_from_the_initial_weights_remembers_them() -> None:
    """start="initial": shadow_n = d^n w_init + (1 - d) sum_k d^(n-1-k) w_k."""
    linear = model(9.0)
    ema = Ema(linear, 0.8, "initial")
    for step, value in enumerate([1.0, 2.0, 3.0]):
        put(linear, value)
        ema.update(step)
    expected = 0.8**3 * 9.0 + 0.2 * (0.8**2 * 1.0 + 0.8 * 2.0 + 3.0)
    assert ema.shadow["weight"].item() == pytest.approx(expected, rel=1e-14)


def test_a_warmed_up_average_counts_young_updates_more() -> None:
    """start="warmup": d_n = min(d, (1 + n) / (10 + n)): 0.1, 2/11, 3/12, ..., and the decay from n = 89,990 at 0.9999."""
    ema = Ema(model(0.0), 0.9999, "warmup")
    assert [ema.decay_of(n) for n in (0, 1, 2, 90)] == pytest.approx([0.1, 2 / 11, 3 / 12, 91 / 100], rel=1e-15)
    assert ema.decay_of(89_000) < 0.9999
    assert ema.decay_of(89_990) == 0.9999
    linear = model(4.0)
    ema = Ema(linear, 0.9, "warmup")
    put(linear, 1.0)
    ema.update(0)
    assert ema.shadow["weight"].item() == pytest.approx(0.1 * 4.0 + 0.9 * 1.0, rel=1e-14)


def test_all_weights_at_once_equal_one_at_a_time_bit_for_bit() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(7, 5), nn.Conv2d(3, 4, 3), nn.Linear(64, 33))
    ema, alone = Ema(network, 0.999), [p.detach().clone() for p in network.parameters()]
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
        for shadow, p in zip(alone, network.parameters(), strict=True):
            shadow.lerp_(p, 1.0 - 0.999)
    ema.update(1)
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow.values(), alone, strict=True))
