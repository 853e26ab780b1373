"""An estimate is due, there are gradients, and no pass counted: said once, with the likely reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from kfac_opt import KFAC
from tests.support import data, mlp, train_step


class Policy(nn.Module):
    """A model with another method beside its forward, and with a dict for an output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(torch.float32)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x)}

    def evaluate_actions(self, x: Tensor) -> Tensor:
        return self.net(x)


def in_eval_mode(model: Policy, x: Tensor, y: Tensor) -> None:
    model.eval()
    F.cross_entropy(model(x)["logits"], y).backward()


def by_forward(model: Policy, x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        model(x)
    F.cross_entropy(model.forward(x)["logits"], y).backward()


def by_another_method(model: Policy, x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        model(x)
    F.cross_entropy(model.evaluate_actions(x), y).backward()


def by_vmap(model: Policy, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(vmap(lambda row: model(row)["logits"])(x), y).backward()


def per_example(model: Policy, x: Tensor, y: Tensor) -> None:
    def loss(parameters: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (row[None],))["logits"], label[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    for name, gradient in vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y).items():
        model.get_parameter(name).grad = gradient.mean(0)


def all_masked(model: Policy, x: Tensor, y: Tensor) -> None:
    model(x)  # the optimizer's mask leaves no term
    F.cross_entropy(model.forward(x)["logits"], y).backward()


def broken_pass(model: Policy, x: Tensor, y: Tensor) -> None:
    model(x * float("nan"))
    F.cross_entropy(model.forward(x)["logits"], y).backward()


def plain(model: Policy, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x)["logits"], y).backward()


LOOPS: dict[str, tuple[Callable[..., None], dict[str, object], str]] = {
    "evaluation mode": (in_eval_mode, {}, r"evaluation mode.*model\.train\(\)"),
    "model.forward": (by_forward, {}, r"gradients disabled.*model\(x\), not model\.forward\(x\)"),
    "another method": (by_another_method, {}, "another method"),
    "vmap of the model": (by_vmap, {}, r"torch\.func.*without them"),
    "gradients by torch.func": (per_example, {}, r"torch\.func"),
    "a copy behind outputs": (plain, {"fisher": "empirical", "outputs": lambda d: d["logits"] * 1}, "not a new one.*fisher='mc'"),
    "a detached output": (plain, {"outputs": lambda d: d["logits"].detach()}, "carries no gradient"),
    "no term": (all_masked, {"outputs": lambda d: (d["logits"], torch.zeros(8, dtype=torch.bool))}, "masks left no term"),
    "not finite": (broken_pass, {}, "not finite"),
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_reason_is_said_once_and_training_goes_on(name):
    loop, options, reason = LOOPS[name]
    model = Policy()
    optimizer = KFAC(model, factor_interval=1, **options)
    x, y = data(dtype=torch.float32)
    loop(model, x, y)
    with pytest.warns(UserWarning, match=f"an estimate of the curvature is due.*{reason}"):
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.zero_grad()
            loop(model, x, y)
            optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters()))


def test_the_remedies_work():
    x, y = data(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Policy()
        optimizer = KFAC(model)
        per_example(model, x, y)
        model(x)
        optimizer.step()
        assert float(optimizer.curvature["net.0"].to_dense().diagonal().sum()) > 0
        model = Policy().train()
        optimizer = KFAC(model, outputs=lambda d: d["logits"] * 1, likelihood="categorical")
        plain(model, x, y)
        optimizer.step()
        assert float(optimizer.curvature["net.0"].to_dense().diagonal().sum()) > 0


@pytest.mark.parametrize("kind", ["paused", "validation between", "no gradients", "one pass of two"])
def test_right_loops_hear_nothing(kind):
    model = Policy()
    optimizer = KFAC(model, factor_interval=1)
    x, y = data(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.zero_grad()
            if kind == "paused":
                with optimizer.paused():
                    plain(model, x, y)
            elif kind == "validation between":
                model.eval()
                with torch.no_grad():
                    model(x)
                plain(model.train(), x, y)
            elif kind == "no gradients":
                with torch.no_grad():
                    model(x)
            else:
                plain(model.eval(), x, y)
                plain(model.train(), x, y)
            optimizer.step()


def test_a_model_left_in_evaluation_mode_later_is_noticed_too():
    model = mlp(torch.float32)
    optimizer = KFAC(model, factor_interval=1)
    for _ in range(3):
        train_step(optimizer, model, *data(dtype=torch.float32))
    model.eval()
    with pytest.warns(UserWarning, match="evaluation mode"):
        train_step(optimizer, model, *data(dtype=torch.float32))
