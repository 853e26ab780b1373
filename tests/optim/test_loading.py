"""What ``load_state_dict`` takes and what it refuses: by the key's name, with the optimizer as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_opt import KFAC
from tests.support import assert_same, data, mlp, train_step

SETTINGS = {"lr": 0.1, "factor_interval": 1, "inverse_interval": 2, "ramp_steps": 0}


def trained(steps: int = 3, **options) -> tuple[torch.nn.Module, KFAC]:
    model = mlp()
    optimizer = KFAC(model, **{**SETTINGS, **options})
    for _ in range(steps):
        train_step(optimizer, model, *data())
    return model, optimizer


def test_a_state_with_the_keys_of_an_option_that_is_gone_loads_without_them():
    """Skipped refreshes were counted, and the factors' products with a vector kept, where a tolerance was set."""
    model, optimizer = trained()
    old = copy.deepcopy(optimizer.state_dict())
    for state in old["state"].values():
        if "curvature" in state:
            state["curvature"]["skipped"] = torch.tensor(3)
            state["curvature"]["sketch_damping"] = torch.tensor(0.1)
            state["curvature"]["input_sketch"] = torch.ones(1, 5)
            state["curvature"]["output_sketch"] = torch.ones(1, 5)
    resumed = copy.deepcopy(model)
    other = KFAC(resumed, **SETTINGS)
    other.load_state_dict(old)
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])
    train_step(optimizer, model, *data())
    train_step(other, resumed, *data())
    assert_same(dict(model.state_dict()), dict(resumed.state_dict()))


def test_a_state_of_before_there_were_powers_loads():
    _, optimizer = trained(update_scale="natural")
    old = copy.deepcopy(optimizer.state_dict())
    for state in old["state"].values():
        state.get("curvature", {}).pop("refreshed_power", None)
    other = KFAC(mlp(), update_scale="natural", **SETTINGS)
    other.load_state_dict(old)
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


NAN, INF = float("nan"), float("inf")
Change = Callable[[dict], Any]


def fill(key: str, value: float, *where: str) -> Change:
    """Writes a number into one entry of a tensor of the first layer's state."""

    def change(saved: dict) -> None:
        state = saved["state"][0]
        for part in where:
            state = state[part]
        state[key].view(-1)[-1] = value

    return change


def put(key: str, value: Any, *where: str) -> Change:
    def change(saved: dict) -> None:
        state = saved["state"][0]
        for part in where:
            state = state[part]
        state[key] = value(state[key]) if callable(value) else value

    return change


def drop(key: str, *where: str) -> Change:
    def change(saved: dict) -> None:
        state = saved["state"][0]
        for part in where:
            state = state[part]
        del state[key]

    return change


BROKEN: list[tuple[Change, str]] = [
    (lambda s: s.pop("param_groups"), "no 'param_groups'.*optimizer.state_dict"),
    (lambda s: s.pop("state"), "no 'state'"),
    (lambda s: s.update(state=[]), "no 'state' .list."),
    (lambda s: s["param_groups"][0].pop("params"), "group 0 .* has no list 'params'"),
    (lambda s: s["param_groups"][0].update(curvature="ekfac"), "curvature must be one of"),
    (lambda s: s["param_groups"][0].update(lr=NAN), "lr must"),
    (lambda s: s["param_groups"][0].update(factor_interval=0), "factor_interval must"),
    (lambda s: s["param_groups"][0].update(momentum="much"), "momentum must"),
    (drop("step"), "'0.weight' needs a number .* 'step': it is missing"),
    (drop("seed"), "'seed': it is missing"),
    (put("step", 3), "'step': it is 3"),
    (put("step", torch.tensor(-1.0)), "'step' -1, expected a whole number"),
    (put("step", torch.tensor(2.5)), "'step' 2.5"),
    (put("step", torch.tensor(1e30)), "'step' 1e[+]30"),
    (put("step", torch.tensor(NAN)), "'step' nan"),
    (fill("momentum_buffer", NAN), "'momentum_buffer' is not finite"),
    (put("momentum_buffer", lambda t: t[:2]), r"'momentum_buffer' is \[2, 4\] of float64, expected \[5, 4\]"),
    (put("momentum_buffer", lambda t: t.float()), "'momentum_buffer' is .* of float32, expected .* of float64"),
    (put("momentum_buffer", None), "'momentum_buffer' is a NoneType"),
    (put("curvature", 3), "'curvature' is a int"),
    (fill("input_factor", NAN, "curvature"), "curvature of '0' does not fit: 'input_factor' is not finite"),
    (fill("output_inverse", INF, "curvature"), "'output_inverse' is not finite"),
    (drop("output_factor", "curvature"), "'output_factor' is missing"),
    (put("input_factor", lambda t: t[:-1], "curvature"), "'input_factor' is"),
    (put("input_factor", lambda t: t.half(), "curvature"), "'input_factor' is .* of float16, expected .* of float64"),
    (put("refreshes", torch.tensor(-1), "curvature"), "'refreshes' is -1"),
    (put("weight", torch.tensor(NAN, dtype=torch.float64), "curvature"), "'weight' is not finite"),
    (put("scale", 0.5, "curvature"), "'scale' is a float"),
    (lambda s: s["state"].update({0: None}), "'0.weight' is a NoneType"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[message for _, message in BROKEN])
@pytest.mark.parametrize("fresh", [True, False])
def test_what_would_fail_or_poison_later_is_refused_by_name_and_changes_nothing(change: Change, message: str, fresh: bool):
    _, source = trained()
    model, optimizer = trained(0 if fresh else 2)
    twin = copy.deepcopy(model)
    other = KFAC(twin, **SETTINGS)
    other.load_state_dict(optimizer.state_dict())
    saved = copy.deepcopy(source.state_dict())
    change(saved)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict(), before)
    for net, one in ((model, optimizer), (twin, other)):
        train_step(one, net, *data())
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("given", [None, [], 3])
def test_what_is_no_dict_is_refused(given):
    with pytest.raises(TypeError, match="load_state_dict: expected the dict of state_dict"):
        KFAC(mlp()).load_state_dict(given)


@pytest.mark.parametrize("saved", ["kronecker", "eigenbasis", "diagonal", "identity"])
@pytest.mark.parametrize("own", ["kronecker", "eigenbasis", "diagonal", "identity"])
def test_a_state_of_another_curvature_is_taken_over_whole_or_refused(saved: str, own: str):
    model, source = trained(curvature=saved)
    twin = copy.deepcopy(model)
    optimizer = KFAC(twin, **SETTINGS, curvature=own)
    train_step(optimizer, twin, *data(seed=3))
    twin.load_state_dict(model.state_dict())
    optimizer.load_state_dict(source.state_dict())
    for net, one in ((model, source), (twin, optimizer)):
        for seed in range(3):
            train_step(one, net, *data(seed=seed))
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("saved", ["kronecker", "eigenbasis"])
def test_a_state_of_another_curvature_with_other_options_is_refused_by_name(saved: str):
    _, source = trained(curvature=saved, max_factor_dim=4)
    model, optimizer = trained(curvature="diagonal")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"curvature of '0' does not fit: .*max_factor_dim"):
        optimizer.load_state_dict(source.state_dict())
    assert_same(optimizer.state_dict(), before)
    train_step(optimizer, model, *data())


class Tied(nn.Module):
    """A layer that is used through its weight only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(F.linear(x, self.first.weight, self.first.bias)))


def test_which_layers_have_diagonal_blocks_is_taken_from_the_state():
    torch.manual_seed(0)
    model = Tied()
    twin = copy.deepcopy(model)
    optimizer, other = KFAC(model, **SETTINGS), KFAC(twin, **SETTINGS)
    empty = copy.deepcopy(optimizer.state_dict())
    with pytest.warns(UserWarning, match="first"):
        train_step(optimizer, model, *data())
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert list(other.curvature) == list(optimizer.curvature) == ["first.weight", "first.bias", "second"]
    train_step(optimizer, model, *data())
    train_step(other, twin, *data())
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))
    other.load_state_dict(empty)
    assert list(other.curvature) == ["first", "second"]
