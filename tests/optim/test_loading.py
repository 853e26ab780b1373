"""What ``load_state_dict`` takes and what it refuses: by the key's name, with the optimizer as it was."""

from __future__ import annotations

import copy

import torch

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
