"""How a step is carried out changes nothing but rounding: micro-batches, workers, checkpointing, formats, kernels.

In float64, where rounding is 1e-16: in float32 Adam would blow up the gradients that are 0 but for rounding, such as those
of a bias in front of a norm.
"""

import functools
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from support.gaussian_case import unchecked
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from ddpm_core import training
from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.dropout import dropout_keys
from ddpm_core.schedules import make_betas
from ddpm_core.training import Execution, OptimConfig, StepMetrics, TrainState, train_step
from ddpm_core.unet import Norm, UNet, UNetConfig

CONFIG = UNetConfig(image_size=8, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.2)
OPTIM = OptimConfig(batch_size=8, lr=1e-3, warmup_steps=0, grad_clip=0.5)
DIFFUSION = GaussianDiffusion(make_betas("linear", 1000))


def model(dtype: torch.dtype = torch.float64) -> UNet:
    """Random weights, none near 0, so that every layer's gradient counts."""
    torch.manual_seed(0)
    network = UNet(CONFIG).to(dtype)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return network


def batch(step: int, rows: slice = slice(None), dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    g = torch.Generator().manual_seed(step)
    data = {
        "x_start": torch.rand((8, 3, 8, 8), generator=g, dtype=dtype) * 2 - 1,
        "t": torch.randint(1000, (8,), generator=g),
        "noise": torch.randn((8, 3, 8, 8), generator=g, dtype=dtype),
        "dropout_key": dropout_keys(0, torch.arange(8 * step, 8 * step + 8), CONFIG.dropout_layers),
    }
    return {name: value[rows] for name, value in data.items()}


def run(
    steps: int, execution: Execution | None = None, optim: OptimConfig = OPTIM, dtype: torch.dtype = torch.float64
) -> tuple[TrainState, list[StepMetrics]]:
    state = TrainState(model(dtype), optim, execution)
    return state, [train_step(state, DIFFUSION, state.model, optim, **batch(s, dtype=dtype)) for s in range(steps)]


def gradients(network: UNet) -> list[Tensor]:
    data = batch(0)
    DIFFUSION.training_losses(
        lambda x, t: network(x, t, data["dropout_key"]), data["x_start"], data["t"], data["noise"]
    ).sum().backward()
    existing = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(existing) == len(list(network.parameters()))
    return existing


def assert_near(ours: nn.Module, expected: nn.Module, tolerance: float) -> None:
    for (name, a), b in zip(ours.named_parameters(), expected.parameters(), strict=True):
        assert float((a - b).detach().abs().max()) <= tolerance, name


def test_as_many_keys_as_residual_blocks() -> None:
    from ddpm_core.unet import ResBlock

    assert CONFIG.dropout_layers == sum(isinstance(m, ResBlock) for m in model().modules())
    assert UNetConfig(image_size=32, dropout=0.1).dropout_layers == 22
    assert UNetConfig(image_size=32).dropout_layers == 0
    with pytest.raises(ValueError, match=r"dropout_key is \[8, 3, 2\]: this network wants \[B, 8, 2\]"):
        model()(batch(0)["x_start"], batch(0)["t"], batch(0)["dropout_key"][:, :3])


def test_every_layer_drops_by_its_own_key_and_none_in_evaluation() -> None:
    network, data = model(), batch(0)
    out = network(data["x_start"], data["t"], data["dropout_key"])
    assert torch.equal(network(data["x_start"], data["t"], data["dropout_key"]), out)
    for layer in range(CONFIG.dropout_layers):
        other = data["dropout_key"].clone()
        other[:, layer] += 1
        assert not torch.equal(network(data["x_start"], data["t"], other), out)
    network.eval()
    plain = network(data["x_start"], data["t"])
    assert torch.equal(network(data["x_start"], data["t"], data["dropout_key"]), plain)


@pytest.mark.parametrize("addressed", [True, False], ids=["by address", "torch's dropout"])
def test_checkpointed_layers_have_the_same_gradients_bit_for_bit(addressed: bool) -> None:
    data, by_checkpointing = batch(0), []
    for checkpointing in (False, True):
        network = model()
        network.activation_checkpointing = checkpointing
        torch.manual_seed(1)
        key = data["dropout_key"] if addressed else None
        network(data["x_start"], data["t"], key).square().sum().backward()
        by_checkpointing.append([p.grad for p in network.parameters()])
    for a, b in zip(*by_checkpointing, strict=True):
        assert a is not None
        assert torch.equal(a, b)


def test_channels_last_changes_the_order_of_sums_alone() -> None:
    plain = gradients(model())
    network = model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = batch(0)
    layers: list[bool] = []
    network.down[0].register_forward_hook(
        lambda module, args, out: layers.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    ours = gradients(network)
    assert layers == [True]  # it carries through
    with torch.no_grad():
        out, expected = (n.eval()(data["x_start"], data["t"]) for n in (network, model()))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    for a, b in zip(ours, plain, strict=True):
        assert float((a - b).abs().max()) < 1e-11


def test_norms_and_softmax_sum_in_float32_under_autocast() -> None:
    """A group of 4,096 values of about 300, which bfloat16 sums could not tell from 298 or 302: the norm's output is as
    float32 makes it from the same input. Softmax: uniform attention over 4,096 pixels returns their mean."""
    norm = Norm(32)
    x = (300 + torch.randn(2, 32, 64, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x).detach()
    assert out.dtype == torch.float32
    exact = x.double()
    exact = (exact - exact.mean((2, 3), keepdim=True)) / (exact.var((2, 3), unbiased=False, keepdim=True) + 1e-6).sqrt()
    assert float((out - exact).abs().max()) < 1e-3
    q, v = torch.zeros(1, 1, 4096, 64), torch.randn(1, 1, 4096, 64, generator=torch.Generator().manual_seed(1)) + 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = nn.functional.scaled_dot_product_attention(q.bfloat16(), q.bfloat16(), v.bfloat16())
    # One rounding to bfloat16 of the result, 2^-9 of about 1; a bfloat16 sum would stop growing at 256.
    assert float((mixed.float() - v.bfloat16().float().mean(2, keepdim=True)).abs().max()) < 2**-7


@pytest.mark.parametrize("size", [1, 3, 4, 8, 100])
def test_micro_batches_make_the_step_of_the_whole_share(size: int) -> None:
    whole, expected = run(3)
    cut, metrics = run(3, Execution(micro_batch=size))
    for a, b in zip(metrics, expected, strict=True):
        for value, expected_value in zip(a, b, strict=True):
            torch.testing.assert_close(value, expected_value, rtol=1e-11, atol=0)
    # Adam divides a gradient's error, 1e-17 where the gradient is 0, by its epsilon, 1e-8, and the rate is 1e-3.
    assert_near(cut.model, whole.model, 1e-10)


def test_checkpointing_changes_no_bit_of_a_run() -> None:
    plain, checkpointed = run(3)[0], run(3, Execution(activation_checkpointing=True))[0]
    assert_near(checkpointed.model, plain.model, 0.0)


def test_fused_adam_rounds_otherwise_and_no_more() -> None:
    plain, fused = run(3, Execution(fused_adam=False))[0], run(3)[0]
    assert fused.optimizer.param_groups[0]["fused"] is True
    assert plain.optimizer.param_groups[0]["fused"] is None
    assert_near(fused.model, plain.model, 1e-10)


def test_bfloat16_keeps_weights_moments_and_average_in_float32() -> None:
    _, expected = run(3, dtype=torch.float32)
    state, metrics = run(3, Execution(precision="bfloat16"), dtype=torch.float32)
    kept = [*state.model.parameters(), *state.ema.shadow.values(), *metrics[0][:3]]
    kept += [value for moments in state.optimizer.state.values() for value in moments.values()]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    for a, b in zip(metrics, expected, strict=True):
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=0.02)  # bfloat16 has 8 bits
        assert a.loss.item() != b.loss.item()


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_step_computes_its_convolutions_in_the_precision_asked_for(precision: Any, dtype: torch.dtype) -> None:
    """That one run differs from the other does not say which of the two was which."""
    state = TrainState(model(torch.float32), OPTIM, Execution(precision=precision))
    seen: list[torch.dtype] = []
    state.model.conv_in.register_forward_hook(lambda module, args, out: seen.append(out.dtype))  # type: ignore[union-attr]
    train_step(state, DIFFUSION, state.model, OPTIM, **batch(0, dtype=torch.float32))
    assert seen == [dtype]


def test_a_state_goes_on_under_another_execution(tmp_path: Path) -> None:
    """From one memory layout and one kernel of Adam to another and back: a kernel that read moments in the weights' old order
    would be far off after one step."""
    expected, _ = run(4)
    plain, other = Execution(fused_adam=False), Execution(channels_last=True, fused_adam=True)
    for first, second in ((plain, other), (other, plain), (other, other)):
        before, _ = run(2, first)
        torch.save(before.state_dict(), tmp_path / "state.pt")
        after = TrainState(UNet(CONFIG).double(), OPTIM, second)
        after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert after.optimizer.param_groups[0]["fused"] is (True if second is other else None)
        for step in (2, 3):
            train_step(after, DIFFUSION, after.model, OPTIM, **batch(step))
        assert_near(after.model, expected.model, 1e-10)
        assert_near_ema(after, expected)


def assert_near_ema(ours: TrainState, expected: TrainState) -> None:
    for name, shadow in ours.ema.shadow.items():
        assert float((shadow - expected.ema.shadow[name]).abs().max()) < 1e-10


def test_replicas_are_clipped_apart_and_averaged() -> None:
    """Gradients of each quarter of the batch by autograd, clipped to 0.5, averaged: what Adam is given."""
    optim = replace(OPTIM, clip_replicas=4)
    state, data = TrainState(model(), optim, Execution(micro_batch=1)), batch(0)
    twin = model()
    total, norms = [torch.zeros_like(p) for p in twin.parameters()], []
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)):
        part = batch(0, rows)
        losses = DIFFUSION.training_losses(
            functools.partial(twin, dropout_key=part["dropout_key"]),
            part["x_start"],
            part["t"],
            part["noise"],
        )
        replica_gradients = torch.autograd.grad(losses.mean(), list(twin.parameters()))
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in replica_gradients)))
        for t, g in zip(total, replica_gradients, strict=True):
            t += g * min(1.0, 0.5 / (norms[-1] + 1e-6)) / 4
    metrics = train_step(state, DIFFUSION, state.model, optim, **data)
    assert max(norms) > 0.5
    assert metrics.grad_norm.item() == pytest.approx(sum(norms) / 4, rel=1e-11)
    for p, g in zip(state.model.parameters(), total, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-12)


def test_epsilon_hat_is_tensorflows_update() -> None:
    """theta -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps), with an epsilon large enough to show."""
    optim = replace(OPTIM, adam_eps=1e-3, adam_eps_hat=True, grad_clip=1e9)
    state = TrainState(model(), optim)
    weights = [p.detach().clone() for p in state.model.parameters()]
    m, v = ([torch.zeros_like(p) for p in weights] for _ in range(2))
    for step in range(1, 4):
        train_step(state, DIFFUSION, state.model, optim, **batch(step))
        rate = 1e-3 * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        for i, p in enumerate(state.model.parameters()):
            assert p.grad is not None
            m[i], v[i] = 0.9 * m[i] + 0.1 * p.grad, 0.999 * v[i] + 0.001 * p.grad**2
            weights[i] -= rate * m[i] / (v[i].sqrt() + 1e-3)
            torch.testing.assert_close(p.detach(), weights[i], rtol=0, atol=1e-12)


def test_losses_by_quarter_of_t_add_up_to_the_loss() -> None:
    state, data = TrainState(model(), OPTIM), batch(0)
    data["t"] = torch.tensor([0, 249, 250, 499, 500, 749, 750, 999])
    twin = model()
    key = data["dropout_key"]
    losses = DIFFUSION.training_losses(lambda x, t: twin(x, t, key), data["x_start"], data["t"], data["noise"])
    metrics = train_step(state, DIFFUSION, state.model, OPTIM, **data)
    assert metrics.quarter_counts.tolist() == [2, 2, 2, 2]
    torch.testing.assert_close(metrics.quarter_losses, losses.detach().reshape(4, 2).sum(1))
    assert metrics.quarter_losses.sum().item() / 8 == pytest.approx(metrics.loss.item(), rel=1e-6)
    norm = math.sqrt(sum(float(p.detach().double().square().sum()) for p in state.model.parameters()))
    assert state.parameter_norm().item() == pytest.approx(norm, rel=1e-6)


def test_the_first_bad_step_is_remembered_until_somebody_looks() -> None:
    """Two good steps, one whose loss is not finite, one more: the record names the third, and nothing was masked."""
    state, _ = run(2)
    assert state.first_bad.tolist() == [math.inf, 0.0, 0.0]
    data = batch(2)
    data["x_start"] = data["x_start"] * 1e300
    bad = train_step(state, DIFFUSION, state.model, OPTIM, **data)
    train_step(state, DIFFUSION, state.model, OPTIM, **batch(3))
    step, loss, norm = state.first_bad.tolist()
    assert step == 2
    assert not math.isfinite(norm)
    assert torch.tensor([loss]).equal(bad.loss.double().reshape(1)) or math.isnan(loss)
    assert not all(p.isfinite().all() for p in state.model.parameters())
    assert not state.parameter_norm().isfinite()


def test_a_gradient_that_is_not_finite_is_found_behind_a_finite_loss() -> None:
    state, data = TrainState(model(), OPTIM), batch(0)
    first = next(iter(state.model.parameters()))
    first.register_hook(lambda g: g * math.inf)
    metrics = train_step(state, DIFFUSION, state.model, OPTIM, **data)
    assert metrics.loss.isfinite()
    assert state.first_bad[0].item() == 0


def worker(rank: int, store: str, folder: str, optim: OptimConfig, micro_batch: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    state = TrainState(model(), optim, Execution(micro_batch=micro_batch))
    wrapper = DistributedDataParallel(state.model, gradient_as_bucket_view=True)
    exchanges = 0

    def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        nonlocal exchanges
        exchanges += bucket.is_last()
        average = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return average.then(lambda done: done.value()[0])

    wrapper.register_comm_hook(None, count)
    rows = slice(4 * rank, 4 * rank + 4)
    metrics = [train_step(state, DIFFUSION, wrapper, optim, world_size=2, **batch(s, rows)) for s in range(3)]
    norms = [float(m.grad_norm) for m in metrics]
    torch.save((state.model.state_dict(), norms, exchanges), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.parametrize(("replicas", "exchanges"), [(1, 3), (4, 0)], ids=["global clip", "clip a replica"])
def test_two_workers_in_micro_batches_make_the_steps_of_one(replicas: int, exchanges: int) -> None:
    """Dropout included. Each step exchanges gradients once, in the last micro-batch, or, clipped apart, after them all."""
    optim = replace(OPTIM, clip_replicas=replicas)
    alone, metrics = run(3, optim=optim)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(worker, (f"{folder}/store", folder, optim, 1), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
        for rank in range(2):
            weights, norms, counted = torch.load(f"{folder}/{rank}.pt", weights_only=True)
            assert counted == exchanges
            assert norms == pytest.approx([float(m.grad_norm) for m in metrics], rel=1e-11)
            for name, p in alone.model.state_dict().items():
                assert float((weights[name] - p).abs().max()) < 1e-10, name


def test_replicas_that_workers_cannot_share_are_refused() -> None:
    optim = replace(OPTIM, clip_replicas=2)
    state = TrainState(model(), optim)
    with pytest.raises(ValueError, match="clip_replicas is 2 and this worker, of 4, has 2 of 8 images"):
        train_step(state, DIFFUSION, state.model, optim, world_size=4, **batch(0, slice(0, 2)))


def test_only_what_changes_results_is_in_a_runs_identity() -> None:
    assert Execution(compile=True, channels_last=True, micro_batch=3, fused_adam=True).identity() == {}
    assert Execution(precision="bfloat16").identity() == {"precision": "bfloat16"}
    assert Execution(precision="float32").identity() == Execution().identity() == {}
    plain = OPTIM.identity()
    assert set(plain) == {"batch_size", "lr", "warmup_steps", "adam_betas", "adam_eps", "grad_clip", "ema_decay"}
    for change in ({"clip_replicas": 4}, {"adam_eps_hat": True}, {"ema_start": "initial"}):
        assert replace(OPTIM, **change).identity() == {**plain, **change}


@pytest.mark.parametrize("count", [0, -1, 3])
def test_replicas_that_do_not_divide_the_batch_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"clip_replicas is {count}(: give a positive number| for a batch of 8)"):
        replace(OPTIM, clip_replicas=count)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_network_makes_the_same_steps_in_the_wrapper_of_several_workers(
    checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler cuts its graph where the wrapper's buckets end, so that gradients travel while others are made."""
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(training, "compile_network", lambda network: network.compile(fullgraph=True, backend=graphs))
    how = Execution(activation_checkpointing=checkpointing)
    alone, _ = run(2, how)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        state = TrainState(model(), OPTIM, replace(how, compile=True))
        wrapper = DistributedDataParallel(state.model, gradient_as_bucket_view=True, bucket_cap_mb=1)
        with unchecked():
            for step in range(2):
                train_step(state, DIFFUSION, wrapper, OPTIM, **batch(step))
    finally:
        dist.destroy_process_group()
    assert graphs.frame_count > 2
    assert_near(state.model, alone.model, 1e-10)


def test_execution_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch is 0"):
        Execution(micro_batch=0)
    with pytest.raises(ValueError, match="activation_checkpointing is on for a Linear"):
        TrainState(nn.Linear(1, 1), OPTIM, Execution(activation_checkpointing=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_network_takes_the_same_steps(precision: Any, checkpointing: bool) -> None:
    """One graph without a break, forward and backward, dropout by address included."""
    how = Execution(precision=precision, activation_checkpointing=checkpointing, micro_batch=4)
    _, expected = run(2, how, dtype=torch.float32)
    with unchecked():  # the compiler does not read through pytest's check of annotations
        _, metrics = run(2, replace(how, compile=True), dtype=torch.float32)
    near = 1e-5 if precision == "float32" else 0.02  # fused kernels round to bfloat16 in fewer places
    for a, b in zip(metrics, expected, strict=True):
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=near)
        assert a.grad_norm.item() == pytest.approx(b.grad_norm.item(), rel=10 * near)
