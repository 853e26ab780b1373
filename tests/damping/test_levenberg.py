"""Levenberg-Marquardt: the predicted change is that of the quadratic model, and the damping follows the ratio."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_opt.damping import LevenbergMarquardt
from kfac_opt.damping.levenberg import quadratic_form
from tests.damping.helpers import classifier, take_step
from tests.support import bare_kfac


def regression(lr: float, damping: float, **options):
    """One linear layer with a Gaussian likelihood: the loss is quadratic and the Fisher matrix is its Hessian."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    optimizer = bare_kfac(model, lr=lr, damping=damping, likelihood="gaussian", damping_style="exact", **options)
    return model, optimizer, lambda: 0.5 * (model(x) - y).square().sum() / 7


@pytest.mark.parametrize("reach", [1.0, 3.0])
def test_the_predicted_change_is_exact_for_a_quadratic_loss_without_damping(reach: float):
    model, optimizer, loss_of = regression(lr=0.2, damping=1e-9)
    rule = LevenbergMarquardt(optimizer, interval=1, reach=reach, early_steps=0)
    loss = loss_of()
    loss.backward()
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    rule.step(loss, loss_of)
    assert rule.last_ratio == pytest.approx(1.0, abs=1e-6)  # γ = 1e-9 is what differs
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before)), "the weights were not put back"


def test_the_damping_term_of_the_model_is_half_gamma_times_the_squared_step():
    model, optimizer, loss_of = regression(lr=0.2, damping=0.7)
    rule = LevenbergMarquardt(optimizer, interval=1, early_steps=0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    loss = loss_of()
    loss.backward()
    optimizer.step()
    rule.step(loss, loss_of)
    step = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    actual = float((loss_of() - loss).detach())
    assert rule.last_ratio == pytest.approx(actual / (actual + 0.35 * float(step @ step)), rel=1e-9)


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
def test_the_quadratic_form_is_that_of_the_dense_block(curvature: str):
    model, optimizer, x, y = classifier(curvature=curvature, factor_dtype=torch.float64)
    take_step(model, optimizer, x, y)
    for view in optimizer.curvature.values():
        shape = view.block.layout.shape
        matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        flat = matrix.reshape(view.block.layout.whole_shape).mT.reshape(-1)
        expected = flat @ view.to_dense() @ flat
        torch.testing.assert_close(quadratic_form(view, matrix), expected, rtol=1e-10, atol=1e-12)


def test_damping_falls_where_the_model_is_right_and_rises_where_it_promises_too_much():
    _, optimizer, loss_of = regression(lr=0.5, damping=0.1)
    rule = LevenbergMarquardt(optimizer, decay=0.9, interval=1, early_steps=0)
    loss = loss_of()
    loss.backward()
    optimizer.step()
    rule.step(loss, loss_of)
    assert rule.get_last_damping() == pytest.approx([0.09])
    loss = loss_of()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    rule.step(loss, lambda: loss + 1.0)  # the loss rose
    assert rule.get_last_damping() == pytest.approx([0.1])


def test_a_loss_that_is_not_finite_raises_the_damping():
    _, optimizer, loss_of = regression(lr=0.5, damping=0.1)
    rule = LevenbergMarquardt(optimizer, decay=0.5, interval=1, early_steps=0)
    loss = loss_of()
    loss.backward()
    optimizer.step()
    rule.step(loss, lambda: float("nan"))
    assert rule.get_last_damping() == pytest.approx([0.2])


def test_the_closure_runs_at_the_interval_only_without_gradients_and_unseen_by_the_optimizer():
    model, optimizer, x, y = classifier(factor_interval=1)
    rule = LevenbergMarquardt(optimizer, interval=3)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return F.cross_entropy(model(x), y)

    for _ in range(7):
        rule.step(take_step(model, optimizer, x, y), closure)
    assert calls == [False, False]


def test_the_rule_leaves_training_alone_but_for_the_damping():
    def train(watched: bool):
        model, optimizer, x, y = classifier(damping_style="exact")
        rule = LevenbergMarquardt(optimizer, interval=2, reach=2.0) if watched else None
        for _ in range(6):
            loss = take_step(model, optimizer, x, y)
            if rule is not None:
                rule.step(loss, lambda: F.cross_entropy(model(x), y))
                assert rule.last_ratio is not None or rule.num_steps < 2
                optimizer.param_groups[0]["damping"] = 0.1
        return [p.detach().clone() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True)))


def test_the_damping_does_not_fall_while_the_trust_region_cuts_the_step_to_a_small_part():
    for min_scale, expected in ((1.0, 0.1), (0.0, 0.05)):
        model, optimizer, x, y = classifier(kl_clip=1e-8, damping_style="exact")
        rule = LevenbergMarquardt(optimizer, decay=0.5, interval=1, min_scale=min_scale, early_steps=0)
        rule.step(take_step(model, optimizer, x, y), lambda: F.cross_entropy(model(x), y))  # noqa: B023 - called at once
        assert rule.last_ratio is not None
        assert rule.last_ratio > 0.75
        assert float(optimizer.trust_region_scales[0]) < 1.0
        assert rule.get_last_damping() == pytest.approx([expected])


def test_resuming_is_exact():
    def train(model, optimizer, rule, x, y, steps):
        for _ in range(steps):
            rule.step(take_step(model, optimizer, x, y), lambda: F.cross_entropy(model(x), y))
        return rule.get_last_damping()

    model, optimizer, x, y = classifier()
    rule = LevenbergMarquardt(optimizer, interval=3)
    train(model, optimizer, rule, x, y, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), rule.state_dict()))
    expected = train(model, optimizer, rule, x, y, 8)
    again, other, x, y = classifier()
    resumed = LevenbergMarquardt(other, interval=3)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    assert train(again, other, resumed, x, y, 8) == expected
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_a_step_without_the_optimizers_step_before_is_an_error():
    _, optimizer, loss_of = regression(lr=0.1, damping=0.1)
    with pytest.raises(RuntimeError, match=r"Call optimizer.step\(\) before each"):
        LevenbergMarquardt(optimizer, interval=1, early_steps=0).step(1.0, loss_of)


def test_an_optimizer_without_curvature_is_refused():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(2))], "damping": 1.0}], lr=0.1)
    with pytest.raises(TypeError, match="SGD has no curvature"):
        LevenbergMarquardt(optimizer)


def test_a_start_that_is_too_high_comes_down_within_the_early_steps():
    dampings = {}
    for early_steps in (0, 10):
        model, optimizer, x, y = classifier(damping=100.0, lr=0.1, kl_clip=1e-3)
        rule = LevenbergMarquardt(optimizer, early_steps=early_steps)
        for _ in range(9):
            rule.step(take_step(model, optimizer, x, y), lambda: pytest.fail("an early step needs no evaluation"))
        dampings[early_steps] = rule.get_last_damping()[0]
    assert dampings[0] == 100.0
    assert dampings[10] < 1.0


def test_early_steps_must_be_a_count():
    _, optimizer, _, _ = classifier()
    with pytest.raises(ValueError, match=r"LevenbergMarquardt: early_steps must be an integer >= 0, got 1\.5"):
        LevenbergMarquardt(optimizer, early_steps=1.5)  # type: ignore[arg-type]
