"""``torch.compile``: no graph break, no recompilation, and the estimates are there."""

from __future__ import annotations

import gc

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from kfac_opt import KFAC
from tests import reference
from tests.support import bare_kfac, close, data, mlp, train_step, weights


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()
    gc.collect()


def compiled(model: nn.Module) -> tuple[nn.Module, CompileCounter]:
    counter = CompileCounter()
    return torch.compile(model, backend=counter), counter


@pytest.mark.parametrize("attach_to", ["original", "compiled"])
@pytest.mark.parametrize("intervals", [(1, 1), (2, 4), (3, 3)])
def test_one_graph_no_breaks_no_recompilation(attach_to, intervals):
    model = mlp(torch.float32)
    fast, counter = compiled(model)
    optimizer = KFAC(
        model if attach_to == "original" else fast,
        factor_interval=intervals[0],
        inverse_interval=intervals[1],
        ramp_steps=0,
    )
    x, y = data(dtype=torch.float32)
    for _ in range(9):
        train_step(optimizer, fast, x, y)
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])
    assert counter.frame_count <= 1
    if intervals[0] > 1:
        assert counter.frame_count == 1
    assert all(v.to_dense().abs().sum() > 0 for v in optimizer.curvature.values())


def test_the_same_run_as_without_compiling():
    results = []
    for compile_it in (False, True):
        model = mlp(torch.float32)
        net = compiled(model)[0] if compile_it else model
        optimizer = KFAC(model, lr=0.1, factor_interval=2, inverse_interval=4, ramp_steps=2)
        for step in range(8):
            x, y = data(seed=step, dtype=torch.float32)
            train_step(optimizer, net, x, y)
        results.append(weights(model))
    for n in results[0]:
        torch.testing.assert_close(results[1][n], results[0][n])


@pytest.mark.parametrize("what", ["step", "whole loop"])
def test_a_compiled_optimizer_step_is_the_plain_step(what):
    """Steps with and without capture: the step attaches hooks and changes the compiler's stance, which cannot be traced."""
    losses = []
    for compile_it in (False, True):
        model = mlp(torch.float32)
        optimizer = KFAC(model, factor_interval=3, inverse_interval=6, ramp_steps=2)
        x, y = data(dtype=torch.float32)

        def loop(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        compiled_step = torch.compile(optimizer.step, backend="eager")

        def halves(model=model, optimizer=optimizer, x=x, y=y, step=compiled_step):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            step()
            return loss.detach()

        run = loop if not compile_it else halves if what == "step" else torch.compile(loop, backend="eager")
        losses.append([float(run()) for _ in range(14)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_factors_of_a_compiled_model_equal_brute_force():
    model, (x, _) = mlp(), data()
    expected = reference.kronecker_factors(model, x, "0")
    net, _ = compiled(model)
    optimizer = bare_kfac(model, factor_interval=2, inverse_interval=2)
    for _ in range(3):
        net(x)
        optimizer.step()
    close(optimizer.curvature["0"].to_dense(), torch.kron(*expected))


def test_compiled_before_the_optimizer_was_made():
    model, (x, y) = mlp(torch.float32), data(dtype=torch.float32)
    net, counter = compiled(model)
    F.cross_entropy(net(x), y).backward()
    model.zero_grad()
    optimizer = KFAC(model, factor_interval=2, inverse_interval=2, ramp_steps=0)
    for _ in range(5):
        train_step(optimizer, net, x, y)
    assert counter.frame_count == 1
    assert sum(counters["graph_break"].values()) == 0
    assert optimizer.curvature["0"].input_factor.abs().sum() > 0


def test_model_compile_in_place():
    model, (x, y) = mlp(torch.float32), data(dtype=torch.float32)
    counter = CompileCounter()
    model.compile(backend=counter)
    optimizer = KFAC(model, factor_interval=2, inverse_interval=2, ramp_steps=0)
    for _ in range(5):
        train_step(optimizer, model, x, y)
    assert sum(counters["graph_break"].values()) == 0
    assert optimizer.curvature["0"].input_factor.abs().sum() > 0


def test_evaluation_and_paused_passes_compile_too():
    model, (x, y) = mlp(torch.float32), data(dtype=torch.float32)
    net, _ = compiled(model)
    optimizer = KFAC(model, factor_interval=2, inverse_interval=2, ramp_steps=0)
    for _ in range(3):
        train_step(optimizer, net, x, y)
        model.eval()
        with torch.no_grad():
            net(x)
        model.train()
        with optimizer.paused():
            net(x)
    assert sum(counters["graph_break"].values()) == 0


def current_stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


def test_the_stance_is_lifted_by_steps_detach_and_garbage_collection():
    """Two optimizers may overlap: the process-wide stance must come back to default when the last one is done."""
    assert current_stance() == "default"
    x, y = data(dtype=torch.float32)
    a, b = mlp(torch.float32), mlp(torch.float32)
    first = KFAC(a, factor_interval=5, inverse_interval=5, ramp_steps=0)
    second = KFAC(b, factor_interval=5, inverse_interval=5, ramp_steps=0)
    train_step(first, a, x, y)
    train_step(second, b, x, y)
    assert current_stance() == "default"
    third = KFAC(mlp(), factor_interval=1)
    fourth = KFAC(mlp(), factor_interval=1)
    third.detach()
    assert fourth is not None
    del fourth
    gc.collect()
    assert current_stance() == "default"


def test_stance_chosen_by_the_user_comes_back():
    x, y = data(dtype=torch.float32)
    with torch.compiler.set_stance("eager_on_recompile"):
        model = mlp(torch.float32)
        optimizer = KFAC(model, factor_interval=3, inverse_interval=3, ramp_steps=0)
        train_step(optimizer, model, x, y)
        assert current_stance() == "eager_on_recompile"
        optimizer.detach()
    assert current_stance() == "default"


@pytest.mark.slow
def test_inductor_gives_the_same_losses():
    losses = []
    for compile_it in (False, True):
        model = mlp(torch.float32)
        net = torch.compile(model) if compile_it else model
        optimizer = KFAC(model, lr=0.1, factor_interval=3, inverse_interval=3)
        losses.append([train_step(optimizer, net, *data(seed=s, dtype=torch.float32)) for s in range(8)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
