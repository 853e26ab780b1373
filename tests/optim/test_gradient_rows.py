"""Gradients preconditioned as sums of few rows: the same step, and the ordinary way where the sum is not the gradient."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_opt import KFAC
from kfac_opt._curvature import gradient_rows
from kfac_opt._curvature.gradient_rows import match_rows
from kfac_opt._curvature.kronecker import KroneckerBlock
from tests.support import close

DOUBLE = torch.float64


def wide(dtype: torch.dtype = DOUBLE) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 30, bias=False), nn.Tanh(), nn.Linear(30, 20)).to(dtype)


@pytest.fixture(autouse=True)
def small_layers_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_rows, "MIN_MULTIPLICATIONS", 0)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of rows of the calls of ``precondition_rows``."""
    rows: list[int] = []
    original = KroneckerBlock.precondition_rows

    def counted(self, state, inputs, outputs):
        rows.append(len(inputs))
        return original(self, state, inputs, outputs)

    monkeypatch.setattr(KroneckerBlock, "precondition_rows", counted)
    return rows


def backward(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


def clip(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    backward(model, x, y)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def accumulate(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    for part in (slice(None, 3), slice(3, None)):
        (F.cross_entropy(model(x[part]), y[part]) / 2).backward()


def mask(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    backward(model, x, y)
    for p in model.parameters():
        p.grad.view(-1)[1] = 0.0


def average(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """As another process' gradient enters in data parallel training."""
    backward(model, x, y)
    for p in model.parameters():
        p.grad.add_(torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p)).div_(2)


def twice(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()


def leftovers(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """A forward whose backward never comes, then the pass itself."""
    model(x)
    backward(model, x, y)


CASES: dict[str, tuple[Callable, dict, bool]] = {
    "plain": (backward, {}, True),
    "clipped by the norm": (clip, {}, True),
    "accumulated": (accumulate, {}, True),
    "maximize": (backward, {"maximize": True}, True),
    "diagonal blocks": (backward, {"max_block_dim": 16}, True),
    "a pass without backward": (leftovers, {"ramp_steps": 0, "factor_interval": 100}, True),
    "single entries changed": (mask, {}, False),
    "another gradient added": (average, {}, False),
    "coupled decay": (backward, {"weight_decay": 0.1, "decoupled_weight_decay": False}, False),
    "two backwards of one pass": (twice, {}, True),  # twice the product: a multiple
    "in the eigenbasis": (backward, {"damping_style": "exact"}, False),
    "diagonal sides": (backward, {"max_factor_dim": 25}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_whole_gradient(case: str, used: list[int]):
    run, options, by_rows = CASES[case]
    models = wide(), wide()
    optimizers = [KFAC(m, lr=0.05, gradient_rows=r, **options) for m, r in zip(models, (False, True))]
    source = torch.Generator().manual_seed(1)
    for _ in range(6):
        x, y = torch.randn(6, 40, dtype=DOUBLE, generator=source), torch.randint(20, (6,), generator=source)
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            run(model, x, y)
            optimizer.step()
    for plain, fast in zip(models[0].parameters(), models[1].parameters()):
        close(fast.detach(), plain.detach(), rtol=1e-10)
    assert bool(used) == by_rows


def test_more_rows_than_pay_and_passes_in_another_dtype_take_the_ordinary_way(used: list[int]):
    model = wide(torch.float32)
    optimizer = KFAC(model, gradient_rows=True)
    backward(model, torch.randn(200, 40), torch.randint(20, (200,)))
    optimizer.step()
    assert used == []
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(torch.randn(6, 40)), torch.randint(20, (6,)))
    loss.backward()
    optimizer.step()
    assert used == []
    optimizer.zero_grad()
    backward(model, torch.randn(6, 40), torch.randint(20, (6,)))
    optimizer.step()
    assert used == [6, 6, 6]


def test_directions_without_a_step_and_copies_take_the_rows_too(used: list[int]):
    model = wide()
    optimizer = KFAC(model, gradient_rows=True)
    x, y = torch.randn(6, 40, dtype=DOUBLE), torch.randint(20, (6,))
    backward(model, x, y)
    optimizer.precondition_gradients_()
    assert used == [6, 6, 6]
    optimizer.zero_grad()
    model, optimizer = copy.deepcopy((model, optimizer))
    backward(model, x, y)
    optimizer.step()
    assert used == [6] * 6


def test_what_was_kept_is_gone_after_the_step_and_the_hooks_after_detach():
    model = wide()
    optimizer = KFAC(model, gradient_rows=True, factor_interval=100, ramp_steps=0)
    x = torch.randn(6, 40, dtype=DOUBLE)
    for _ in range(2):
        hidden = model[1](model[0](x))
        optimizer.zero_grad()
        backward(model, x, torch.randint(20, (6,)))
        optimizer.step()
    kept = weakref.ref(hidden)
    del hidden
    gc.collect()
    assert kept() is None
    assert sum(len(module._forward_hooks) for module in model.modules()) == 3
    optimizer.detach()
    assert not any(module._forward_hooks for module in model.modules())


def test_compiled_models_are_not_watched(used: list[int]):
    torch._dynamo.reset()
    model = wide(torch.float32)
    optimizer = KFAC(model, gradient_rows=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        optimizer.zero_grad()
        backward(compiled, torch.randn(6, 40), torch.randint(20, (6,)))
        optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_only_multiples_of_the_product_match():
    torch.manual_seed(0)
    inputs, outputs = torch.randn(8, 50), torch.randn(8, 30)
    matrix = outputs.mT @ inputs
    assert match_rows(matrix, inputs, outputs) == pytest.approx(1.0, abs=1e-6)
    assert match_rows(-0.3 * matrix, inputs, outputs) == pytest.approx(-0.3, rel=1e-5)
    assert match_rows(matrix + 1e-2 * torch.randn(30, 50), inputs, outputs) is None
    assert match_rows(matrix - matrix.mean(1, keepdim=True), inputs, outputs) is None
    changed = matrix.clone()
    changed[3, 7] = 0.0
    assert match_rows(changed, inputs, outputs) is None
    assert match_rows(torch.zeros(30, 50), inputs, torch.zeros(8, 30)) is None
    assert match_rows(matrix, inputs * float("nan"), outputs) is None


def test_layers_too_small_to_gain_are_not_watched(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    model = wide()
    optimizer = KFAC(model, gradient_rows=True, factor_interval=100, ramp_steps=0)
    backward(model, torch.randn(6, 40, dtype=DOUBLE), torch.randint(20, (6,)))
    optimizer.step()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_number_in_place_of_the_switch_is_refused():
    with pytest.raises(ValueError, match="KFAC: gradient_rows must be True or False, got 3"):
        KFAC(wide(), gradient_rows=3)
