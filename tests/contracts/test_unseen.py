"""A model does not notice that its curvature is estimated: bit for bit the gradients and hook calls of a run without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt import KFAC, KFACVI
from kfac_opt.bayes.laplace import fit_laplace
from kfac_opt.fisher import FisherMatrix, gradient_statistics
from tests.contracts.stateful import REFUSED, REPEATABLE, build
from tests.support import assert_same, gradients

STEPS = 5  # estimates at 0, 2, 4, refreshes at 0 and 3, a plain step at 1
OPTIONS = {"factor_interval": 2, "inverse_interval": 3, "ramp_steps": 0, "lr": 0.0}
KINDS: dict[str, Callable[..., Any]] = {
    "mc": lambda model, **more: KFAC(model, fisher="mc", **OPTIONS, **more),
    "exact": lambda model, **more: KFAC(model, fisher="exact", **OPTIONS, **more),
    "empirical": lambda model, **more: KFAC(model, fisher="empirical", **OPTIONS, **more),
    "eigenbasis": lambda model, **more: KFAC(model, curvature="eigenbasis", **OPTIONS, **more),
    "diagonal": lambda model, **more: KFAC(model, curvature="diagonal", **OPTIONS, **more),
    "vi": lambda model, **more: KFACVI(model, num_data=100, **OPTIONS, **more),
}


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def trace(model: nn.Module, x: Tensor, y: Tensor, attach: Callable[[nn.Module], Any] | None) -> list[Any]:
    """All that a loop can see, step by step; the weights stay."""
    torch.manual_seed(7)
    optimizer = attach(model) if attach is not None else None
    found = []
    for step in range(STEPS):
        model.zero_grad(set_to_none=step % 2 == 0)
        if hasattr(model, "log"):
            model.log.clear()
        F.cross_entropy(logits_of(model(x)).flatten(0, -2), y.flatten()).backward()
        retained = [None if g is None else g.clone() for g in model.retained()] if hasattr(model, "retained") else []
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        log = list(model.log) if hasattr(model, "log") else []
        found.append([gradients(model), retained, log, buffers, torch.get_rng_state()])
        if optimizer is not None:
            optimizer.step()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REPEATABLE)
def test_gradients_hooks_buffers_and_random_numbers_are_those_without(name, kind):
    expected = trace(*build(REPEATABLE[name]), None)
    assert_same(trace(*build(REPEATABLE[name]), KINDS[kind]), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_twice_is_refused_untouched_or_read_from_the_users_backward(name, kind):
    make, message = REFUSED[name]
    expected = trace(*build(make), None)
    model, x, y = build(make)
    if kind == "empirical":
        assert_same(trace(model, x, y, KINDS[kind]), expected)
        return
    if name == "AdjointEquation" and kind == "diagonal":  # the Function returns the gradients of the weights
        assert_same(trace(model, x, y, KINDS[kind]), expected)
        return
    before = torch.zeros_like(model.head.weight)
    model.head.weight.grad = before
    optimizer = KINDS[kind](model)
    with pytest.raises(RuntimeError, match=rf"(?s){message}.*fisher='empirical'"):
        model(x)
    assert model.head.weight.grad is before
    assert not before.any()
    assert all(p.grad is None for p in model.parameters() if p is not model.head.weight)
    optimizer.detach()
    assert_same(trace(*build(make), None), expected)


def fisher(model: nn.Module, x: Tensor, kind: str = "exact") -> FisherMatrix:
    return FisherMatrix(model.eval(), [(x, torch.arange(len(x)) % 3)], kind=kind)


@pytest.mark.parametrize("tool", ["matrix", "statistics", "laplace"])
@pytest.mark.parametrize("name", [name for name in REPEATABLE if name not in ("Checkpointed", "NodeHooks")])
def test_fisher_matrices_and_laplace_call_no_hooks_and_leave_the_loop_alone(name, tool):
    expected = trace(*build(REPEATABLE[name]), None)
    model, x, y = build(REPEATABLE[name])
    state = torch.get_rng_state()
    if tool == "matrix":
        fisher(model, x).to_dense()
    elif tool == "statistics":
        gradient_statistics(model.eval(), [(x, y)])
    else:
        fit_laplace(model.eval(), [(x, y)])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.log == []
    assert all(p.grad is None for p in model.parameters())
    assert_same(trace(model.train(), x, y, None), expected)


@pytest.mark.parametrize("name", ["ReadOnce", "Reversible", "HandWrittenCheckpoint", "SelectivelyCheckpointed", "Overwriting"])
def test_fisher_matrices_refuse_what_cannot_run_twice(name):
    model, x, _ = build(REFUSED[name][0])
    with pytest.raises(RuntimeError, match=rf"(?s){REFUSED[name][1]}.*copy of the model"):
        fisher(model, x)
    assert all(p.grad is None for p in model.parameters())


def test_fisher_matrices_refuse_checkpoints_whose_weights_may_move_on():
    model, x, _ = build(REPEATABLE["Checkpointed"])
    with pytest.raises(RuntimeError, match="Switch checkpointing off"):
        fisher(model, x)
