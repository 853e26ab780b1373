"""What an optimizer keeps of each parameter: allocated in the first step, checked before it is loaded.

====================  =============================================================================================
key                   value
====================  =============================================================================================
``step``              steps taken, 0-dim
``seed``              base seed of all private generators, 0-dim
``momentum_buffer``   in the shape of the parameter, where there is momentum
``pace``              of the update rule ``"rms"``, ``[3]``
``curvature``         of the block that belongs to this weight: a dict of tensors, see the ``init_state`` of the blocks
====================  =============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from kfac_opt._step.accepted import check_form, check_groups, check_parameter
from kfac_opt._step.loading import has_diagonal, in_current_form
from kfac_opt._step.model_blocks import ModelBlocks
from kfac_opt._step.rules import UpdateRule
from kfac_opt._step.tracking import TrackedBlock

Groups = list[dict[str, Any]]


def allocate(optimizer: Optimizer, blocks: ModelBlocks, rule: UpdateRule, seed: int) -> None:
    """Every key of every parameter, so that the state is all there or not at all."""
    steps = blocks.step_count()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if "step" not in state:
                state["step"] = torch.tensor(float(steps))
            if "seed" not in state:
                state["seed"] = torch.tensor(seed, dtype=torch.int64)
            rule.allocate(group, parameter, state)
    for entry in blocks.tracked.values():
        state = optimizer.state[entry.weight]
        if "curvature" not in state:
            state["curvature"] = entry.block.init_state(entry.weight.device)


def count_step(optimizer: Optimizer) -> None:
    """One more step of every parameter."""
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch._foreach_add_([optimizer.state[parameter]["step"] for parameter in members if parameter in optimizer.state], 1)


def saved_seed(optimizer: Optimizer) -> int | None:
    """The base seed that stands in the state."""
    return next((int(state["seed"]) for state in optimizer.state.values() if "seed" in state), None)


def acceptable(
    optimizer: Optimizer, blocks: ModelBlocks | None, given: dict[str, Any], check_values: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    """The saved state, keyed by number, in the form of this version.

    Args:
        blocks: None if the optimizer is not attached to a model.
        check_values: raises ValueError for values of a group that are out of range.

    Raises:
        ValueError, TypeError: for a state that cannot be gone on with, before anything is changed.
    """
    check_form(given)
    saved = {**given, "state": {key: in_current_form(state) for key, state in given["state"].items()}}
    groups, own_groups, owner = saved["param_groups"], optimizer.param_groups, type(optimizer).__name__
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in own_groups]:
        return saved  # torch says so
    check_groups(owner, groups, own_groups, optimizer.defaults)
    for group in groups:
        check_values(group)
    members = [(key, p) for saved_, own in zip(groups, own_groups) for key, p in zip(saved_["params"], own["params"])]
    states = {id(parameter): saved["state"][key] for key, parameter in members if key in saved["state"]}
    found = _blocks_of(blocks, groups, states) if blocks is not None else {}
    names = {id(p): name for name, p in blocks.model.named_parameters()} if blocks is not None else {}
    for key, parameter in members:
        if id(parameter) in states:
            name = names.get(id(parameter), str(key))
            check_parameter(owner, name, states[id(parameter)], parameter, found.get(id(parameter)))
    return saved


def _blocks_of(blocks: ModelBlocks, groups: Groups, states: dict[int, Any]) -> dict[int, TrackedBlock]:
    """The blocks that a saved state belongs to, by the id of their weight: the saved groups say of which kind."""
    kinds = [{**own, "curvature": given["curvature"]} for own, given in zip(blocks.groups, groups)]
    found = blocks.made_for(kinds, set(), announce=False)  # they are named when the state is loaded
    layers = {name: entry for name, entry in found.items() if entry.module is not None}
    flat = {name for name, entry in layers.items() if has_diagonal(states.get(id(entry.weight)))}
    if flat:
        found = blocks.made_for(kinds, flat, announce=False)
    return {id(entry.weight): entry for entry in found.values()}
