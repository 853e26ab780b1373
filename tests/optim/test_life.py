"""An optimizer's life beside its model: it gives way to a later one, and no exception leaves it unusable."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_opt import KFAC, KFACVI
from kfac_opt._capture.collector import Collector
from tests.support import assert_same, data, mlp, train_step, weights

SETTINGS = {"lr": 0.05, "factor_interval": 1, "inverse_interval": 2, "ramp_steps": 0}

# -- a later optimizer takes over -------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("first", [KFAC, lambda model, **options: KFACVI(model, num_data=100, **options)])
def test_a_later_optimizer_takes_over_and_the_earlier_one_says_so(first: Callable[..., KFAC]):
    model = mlp()
    old = first(model, **SETTINGS)
    train_step(old, model, *data())
    new = KFAC(model, **SETTINGS)
    train_step(new, model, *data())
    owner = type(old).__name__
    with pytest.raises(RuntimeError, match=rf"{owner}: this optimizer was detached when KFAC was built on the same model"):
        train_step(old, model, *data())
    with pytest.raises(RuntimeError, match="the later one takes over"):
        old.precondition_gradients_()
    assert "state" in old.state_dict()  # a trainer may still save it
    old.zero_grad()
    other = mlp()
    alone = KFAC(other, **SETTINGS)
    assert hooks(model) == hooks(other)
    del alone


def test_what_follows_is_what_a_first_optimizer_would_have_done():
    model, other = mlp(), mlp()
    held = [KFAC(model, **SETTINGS) for _ in range(3)]
    new, alone = KFAC(model, **SETTINGS), KFAC(other, **SETTINGS)
    for _ in range(3):
        train_step(new, model, *data())
        train_step(alone, other, *data())
    assert_same(weights(model), weights(other))
    del held


def test_an_optimizer_of_a_part_takes_over_its_parameters_and_one_of_other_parameters_does_not():
    model = nn.Sequential(mlp(), nn.Linear(3, 3).double())
    whole = KFAC(model, **SETTINGS)
    part = KFAC(model[0], **SETTINGS)
    with pytest.raises(RuntimeError, match="or parameters after it"):
        train_step(whole, model, *data())
    again = KFAC(model, **SETTINGS)
    with pytest.raises(RuntimeError, match="or parameters after it"):
        part.step()
    train_step(again, model, *data())
    generator, critic = mlp(), mlp()
    pair = KFAC(generator, **SETTINGS), KFAC(critic, **SETTINGS)
    for optimizer, net in zip(pair, (generator, critic)):
        train_step(optimizer, net, *data())


def test_a_constructor_that_refuses_its_arguments_leaves_the_earlier_optimizer_in_place():
    model = mlp()
    optimizer = KFAC(model, **SETTINGS)
    with pytest.raises(ValueError, match="damping"):
        KFAC(model, damping=-1.0)
    with pytest.raises(TypeError, match="outputs"):
        KFAC(model, outputs=3)
    train_step(optimizer, model, *data())


def test_a_detached_optimizer_that_nobody_followed_says_how_to_go_on():
    model = mlp()
    optimizer = KFAC(model)
    optimizer.detach()
    with pytest.raises(RuntimeError, match=r"not attached to a model .*Build KFAC\(model"):
        optimizer.step()


# -- exceptions inside the step ---------------------------------------------------------------------------------


class At:
    """Raises ``KeyboardInterrupt`` at the ``number``-th line of the package that the body runs."""

    def __init__(self, number: int) -> None:
        self.left, self.where = number, ""

    def __enter__(self) -> At:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if "/kfac_opt/" in frame.f_code.co_filename else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.where = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()


KINDS: dict[str, dict[str, Any]] = {
    "kronecker": {},
    "eigenbasis": {"curvature": "eigenbasis"},
    "exact": {"damping_style": "exact"},
    "empirical": {"fisher": "empirical"},
}


def interrupted(kind: dict[str, Any], before: int, number: int, call: str) -> bool:
    """A step interrupted at a line; the loop goes on. False when the step has fewer lines."""
    model = small()
    optimizer = KFAC(model, **{**SETTINGS, **kind})
    for _ in range(before):
        train_step(optimizer, model, *data())
    x, y = data()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    at = At(number)
    try:
        with at:
            getattr(optimizer, call)()
    except KeyboardInterrupt:
        pass
    steps = optimizer._workings.blocks.step_count()
    assert steps in (before, before + 1), at.where
    for turn in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        assert torch.isfinite(loss), at.where
        loss.backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            raise AssertionError(f"after an interrupt at {at.where}, step {turn}: {error}") from error
    assert optimizer._workings.blocks.step_count() == steps + 4, at.where
    for name in optimizer.curvature:
        assert torch.isfinite(optimizer.curvature[name].to_dense()).all(), (at.where, name)
    view = optimizer.curvature["0"]
    assert float(torch.linalg.eigvalsh(view.input_factor)[0]) > -1e-12, at.where
    return at.left <= 0


def sweep(kind: str, before: int, call: str, stride: int, offset: int) -> int:
    number = 1 + offset % stride
    while interrupted(KINDS[kind], before, number, call):
        number += stride
    return number


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_in_the_step_leaves_an_optimizer_that_goes_on(kind: str, before: int):
    assert sweep(kind, before, "step", 41, 7 * before) > 300  # every 41st line; all of them in the slow run


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize(("kind", "call"), [*((kind, "step") for kind in KINDS), ("kronecker", "precondition_gradients_")])
def test_an_interrupt_at_any_line_of_the_step_leaves_an_optimizer_that_goes_on(kind: str, before: int, call: str):
    assert sweep(kind, before, call, 1, 0) > 300


def test_the_estimate_after_an_exception_in_the_step_is_taken(monkeypatch):
    """Out of memory, caught and skipped, one step before an estimate is due."""
    model = mlp()
    optimizer = KFAC(model, **{**SETTINGS, "factor_interval": 3})
    for _ in range(2):
        train_step(optimizer, model, *data())
    with monkeypatch.context() as patch:
        patch.setattr(optimizer._rule, "step", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
        with pytest.raises(torch.OutOfMemoryError):
            train_step(optimizer, model, *data())
    assert optimizer._workings.blocks.step_count() == 3
    weight = lambda: int(optimizer.state[model[0].weight]["curvature"]["estimates"])  # noqa: E731
    before = weight()
    train_step(optimizer, model, *data())
    assert weight() == before + 1


def test_a_step_may_be_tried_again_with_the_same_gradients(monkeypatch):
    model = mlp()
    optimizer = KFAC(model, **SETTINGS)
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    with monkeypatch.context() as patch:
        fails = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))  # noqa: E731
        patch.setattr(optimizer._workings.curvature, "update", fails)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    optimizer.step()
    assert optimizer._workings.blocks.step_count() == 1
    train_step(optimizer, model, x, y)
    assert int(optimizer.state[model[0].weight]["curvature"]["estimates"]) == 1


class Interrupting(nn.Module):
    """Raises in its forward when it is told to, or calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.error, self.again = mlp(), None, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x)
        if self.error is not None:
            raise self.error
        if self.again:
            self.again -= 1
            return self(x)
        return out


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), RuntimeError("x")], ids=repr)
@pytest.mark.parametrize("again", [0, 2])
def test_the_pass_after_an_exception_in_the_forward_counts(error: BaseException, again: int):
    model, other = Interrupting(), Interrupting()
    for net, broken in ((model, True), (other, False)):
        optimizer = KFAC(net, **SETTINGS)
        for step in range(3):
            if broken and step != 1:
                net.error = error
                with pytest.raises(type(error)):
                    net(data()[0])
                net.error = None
            net.again = again
            train_step(optimizer, net, *data())
            assert int(optimizer.state[net.inner[0].weight]["curvature"]["estimates"]) == step + 1
    assert_same(weights(model), weights(other))


def test_an_interrupt_of_a_pass_in_one_thread_does_not_end_that_of_another():
    model = Interrupting()
    optimizer = KFAC(model, **SETTINGS)
    collector: Collector = optimizer._workings.capture
    model.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(data()[0])
    model.error = None
    found = []
    thread = threading.Thread(target=lambda: (model(data()[0]), found.append(collector.pending.num_terms)))
    thread.start()
    thread.join()
    assert found == [len(data()[0])]


# -- tensors that are swapped ---------------------------------------------------------------------------------


def test_gradients_may_be_swapped_after_they_were_preconditioned():
    """As ``model.to()`` does with ``torch.__future__.set_swap_module_params_on_conversion(True)``."""
    model = mlp()
    optimizer = KFAC(model, **SETTINGS)
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    optimizer.precondition_gradients_()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert not any(weakref.getweakrefs(tensor) for p in model.parameters() for tensor in (p, p.grad))


def test_gradients_are_preconditioned_once_and_new_ones_again():
    model = mlp()
    optimizer = KFAC(model, **SETTINGS)
    for _ in range(3):
        F.cross_entropy(model(data()[0]), data()[1]).backward()
        optimizer.precondition_gradients_()
        for call in (optimizer.step, optimizer.precondition_gradients_):
            with pytest.raises(RuntimeError, match="already preconditioned"):
                call()
        optimizer.zero_grad()
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    optimizer.precondition_gradients_()
    F.cross_entropy(model(data()[0]), data()[1]).backward()  # accumulated: no longer what was written
    optimizer.step()
