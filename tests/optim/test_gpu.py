"""What only a CUDA device can show: placement, agreement with the CPU, scalers in fp16, no synchronisation."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_opt import KFAC
from tests.contracts.stateful import REPEATABLE
from tests.contracts.stateful import build as build_stateful
from tests.contracts.zoo import NETWORKS, build, loss
from tests.support import assert_same, bare_kfac, gradients, train_step, weights

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def moved(name: str):
    model, x, y = build(name, examples=8)
    return model.to(CUDA), x.to(CUDA), y.to(CUDA)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(16 * 7 * 7, 64), nn.Dropout(0.1), nn.Linear(64, 10),
    ).to(CUDA, dtype)  # fmt: skip


def batch(size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(size, 3, 16, 16, device=CUDA)
    return x, (x.mean((1, 2, 3)) > 0).long()


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
@pytest.mark.parametrize("name", NETWORKS)
def test_directions_agree_with_the_cpu(name, curvature):
    """float64: the devices differ by the order of sums, amplified by the condition number of damped blocks."""
    cpu_model, x, y = build(name, examples=8)
    gpu_model, gx, gy = moved(name)
    for model, inputs, labels in ((cpu_model, x, y), (gpu_model, gx, gy)):
        options = {"fisher": "empirical"} if curvature == "diagonal" else {}
        optimizer = bare_kfac(model, curvature=curvature, damping=0.05, **options)
        loss(model(inputs), labels).backward()
        optimizer.precondition_gradients_()
    signs = curvature == "diagonal" or name in (
        "tokens",
        "segmentation",
        "attention",
        "lstm",
        "tied weights",
        "unused layer",
    )
    for (key, a), b in zip(gradients(cpu_model).items(), gradients(gpu_model).values()):
        assert b.is_cuda
        if not signs:  # where terms mix, random signs make the estimates unbiased, and devices draw other signs
            torch.testing.assert_close(b.cpu(), a, rtol=1e-7, atol=1e-7 * float(a.abs().max()), msg=key)


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
@pytest.mark.parametrize("style", ["factored", "exact"])
def test_training_keeps_matrices_on_the_device(curvature, style):
    model = network()
    optimizer = KFAC(model, curvature=curvature, damping_style=style)
    losses = [train_step(optimizer, model, *batch()) for _ in range(40)]
    assert losses[-1] < losses[0]
    for state in optimizer.state.values():
        for key, value in state.get("curvature", {}).items():
            assert value.dim() == 0 or value.is_cuda, key
    assert optimizer.curvature["0"].input_factor.is_cuda


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_scaler(dtype):
    model = network()
    optimizer = KFAC(model)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    losses = []
    for _ in range(40):
        x, y = batch()
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype):
            value = F.cross_entropy(model(x), y)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_skipped_step_leaves_the_state():
    model = network()
    optimizer = KFAC(model)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**4)
    for bad in (False, True):
        if bad:
            state, before = copy.deepcopy(optimizer.state_dict()), weights(model)
        x, y = batch()
        x[0] = float("inf") if bad else x[0]
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same(optimizer.state_dict(), state)
    assert_same(weights(model), before)
    assert optimizer.dropped_estimates == 1


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_a_step_without_estimate_and_refresh_does_not_synchronise(curvature):
    model = network()
    optimizer = KFAC(model, curvature=curvature, ramp_steps=0, factor_interval=50, inverse_interval=50, refresh="together")
    train_step(optimizer, model, *batch())
    optimizer.zero_grad()
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    synchronising = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(synchronising) <= 1, synchronising


def test_global_cuda_generator_is_left_alone():
    model = network()
    optimizer = KFAC(model, fisher="mc")
    x, y = batch()
    model.eval()
    model.train()
    model[7].p = 0.0
    before = torch.cuda.get_rng_state()
    for _ in range(3):
        train_step(optimizer, model, x, y)
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_resuming_from_a_cpu_checkpoint_goes_on(tmp_path):
    model = network(torch.bfloat16)
    optimizer = KFAC(model)
    x, y = batch()
    for _ in range(5):
        train_step(optimizer, model, x.bfloat16(), y)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    resumed = network(torch.bfloat16)
    again = KFAC(resumed)
    model_state, optimizer_state = torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True)
    resumed.load_state_dict(model_state)
    again.load_state_dict(optimizer_state)
    assert_same(again.state_dict(), optimizer.state_dict())
    train_step(again, resumed, x.bfloat16(), y)
    assert all(p.isfinite().all() for p in resumed.parameters())


@pytest.mark.slow
def test_compiled_model_trains_on_the_device():
    torch._dynamo.reset()
    model = network()
    fast = torch.compile(model)
    optimizer = KFAC(model, factor_interval=5, inverse_interval=10)
    losses = [train_step(optimizer, fast, *batch()) for _ in range(40)]
    assert losses[-1] < losses[0]
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("name", REPEATABLE)
def test_the_capture_is_not_noticed_on_the_device(name, fisher):
    """The engine runs the nodes of a device in a thread of its own, the capture's in the same."""
    found = []
    for attach in (None, lambda model: KFAC(model, fisher=fisher, lr=0.0, factor_interval=2, ramp_steps=0)):
        model, x, y = build_stateful(REPEATABLE[name])
        model, x, y = model.to(CUDA), x.to(CUDA), y.to(CUDA)
        torch.manual_seed(7)
        optimizer = attach(model) if attach is not None else None
        for _ in range(3):
            model.zero_grad()
            model.log.clear()
            F.cross_entropy(model(x), y).backward()
            buffers = copy.deepcopy(dict(model.named_buffers()))
            found.append([gradients(model), list(model.log), buffers, torch.cuda.get_rng_state()])
            if optimizer is not None:
                optimizer.step()
    assert_same(found[3:], found[:3])
