"""Refreshes beside the loop: fixed hand-over, no dependence on timing, drained by state_dict."""

from __future__ import annotations

import copy
import threading
import time

import pytest
import torch
import torch.nn.functional as F

from kfac_opt import KFAC
from kfac_opt.curvature.kronecker import KroneckerBlock
from kfac_opt.linalg import FactorizationError
from tests.support import assert_same, mlp

SETTINGS = {"lr": 0.05, "factor_interval": 1, "inverse_interval": 20, "ramp_steps": 0, "refresh": "async"}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (12,), generator=generator)


def run(optimizer: KFAC, model: torch.nn.Module, steps: range) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def inverses(optimizer: KFAC) -> list[torch.Tensor]:
    states = [optimizer.state[tracked.weight]["curvature"] for tracked in optimizer._tracked.values()]
    return [state[f"{side}_inverse"].clone() for state in states for side in ("input", "output")]


def test_results_do_not_depend_on_timing(monkeypatch):
    fast = mlp()
    slow = copy.deepcopy(fast)
    run(KFAC(fast, **SETTINGS), fast, range(50))
    work = KroneckerBlock._inverses

    def delayed(self, *arguments):
        time.sleep(0.02)
        return work(self, *arguments)

    monkeypatch.setattr(KroneckerBlock, "_inverses", delayed)
    run(KFAC(slow, **SETTINGS), slow, range(50))
    assert_same(dict(fast.state_dict()), dict(slow.state_dict()))


def test_the_result_comes_into_force_at_the_fixed_step_and_is_that_of_its_start(monkeypatch):
    model = mlp()
    other = copy.deepcopy(model)
    settings = {**SETTINGS, "lr": 0.0}
    beside, before = KFAC(model, **settings), KFAC(other, **{**settings, "refresh": "staggered"})
    threads = set()
    work = KroneckerBlock._inverses

    def noted(self, *arguments):
        threads.add(threading.current_thread().name.split("_")[0])
        return work(self, *arguments)

    monkeypatch.setattr(KroneckerBlock, "_inverses", noted)
    run(beside, model, range(21))  # step 20 starts the first layer's refresh
    assert "kfac-refresh" in threads
    run(before, other, range(20))
    old = inverses(before)
    assert torch.equal(inverses(beside)[0], old[0])
    run(before, other, range(20, 21))  # in force at once
    new = inverses(before)
    assert not torch.equal(old[0], new[0])
    run(beside, model, range(21, 22))
    assert torch.equal(inverses(beside)[0], old[0])
    run(beside, model, range(22, 23))  # a tenth of 20 steps after the start
    assert torch.equal(inverses(beside)[0], new[0])


@pytest.mark.parametrize("stop", [21, 22, 30])
def test_resuming_is_bit_for_bit(stop):
    model = mlp()
    optimizer = KFAC(model, **SETTINGS)
    run(optimizer, model, range(stop))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    assert not optimizer._estimation.background.jobs
    run(optimizer, model, range(stop, 45))
    resumed = mlp()
    resumed.load_state_dict(weights)
    other = KFAC(resumed, **SETTINGS)
    other.load_state_dict(saved)
    run(other, resumed, range(stop, 45))
    assert_same(dict(model.state_dict()), dict(resumed.state_dict()))


def test_loading_drops_what_is_under_way():
    model = mlp()
    optimizer = KFAC(model, **SETTINGS)
    run(optimizer, model, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    run(optimizer, model, range(3, 21))
    assert optimizer._estimation.background.jobs
    optimizer.load_state_dict(saved)
    assert not optimizer._estimation.background.jobs


def test_a_failure_in_the_background_is_raised_with_the_layers_name(monkeypatch):
    model = mlp()
    optimizer = KFAC(model, **SETTINGS)
    run(optimizer, model, range(19))

    def fail(self, *arguments):
        raise FactorizationError("broken on purpose")

    monkeypatch.setattr(KroneckerBlock, "_inverses", fail)
    with pytest.raises(FactorizationError, match="'0': the factors could not be inverted: broken on purpose"):
        run(optimizer, model, range(19, 90))


def test_ekfac_refreshes_in_step():
    model = mlp()
    optimizer = KFAC(model, curvature="eigenbasis", **SETTINGS)
    run(optimizer, model, range(25))
    assert not optimizer._estimation.background.jobs
