"""Which saved states an optimizer can go on with: what would fail or poison later is refused by the name of its key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kfac_opt._step.scale_free import ScaleFreeRule
from kfac_opt._step.tracking import TrackedBlock

COUNTED = 2**24  # single precision, in which torch counts steps, ends there
OTHER_OPTIONS = (
    "Build {owner} with the options that the state was saved with (damping_style, max_factor_dim, max_block_dim, factor_dtype, "
    "inverse_dtype and the trainable parameters decide what is kept)."
)
DAMAGED = "The run had diverged when it was saved, or the file is damaged: go back to an earlier one."


def check_form(state_dict: object) -> None:
    """Raises where this is no ``state_dict`` of an optimizer at all."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"load_state_dict: expected the dict of state_dict(), got {type(state_dict).__name__}")
    for key, kind in (("state", Mapping), ("param_groups", list)):
        if not isinstance(state_dict.get(key), kind):
            found = type(state_dict[key]).__name__ if key in state_dict else f"keys {sorted(map(str, state_dict))[:5]}"
            raise ValueError(
                f"load_state_dict: the state has no {key!r} ({found}). Give what optimizer.state_dict() returned, not a whole "
                "checkpoint or the model's state."
            )
    for number, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(f"load_state_dict: parameter group {number} of the saved state has no list 'params'.")


def check_groups(owner: str, saved: list[dict[str, Any]], own: list[dict[str, Any]], options: Iterable[str]) -> None:
    """Raises for the groups of another optimizer; their values are the optimizer's to check."""
    for number, (given, group) in enumerate(zip(saved, own)):
        missing = sorted(set(options) & set(group) - set(given))  # torch adds to its defaults, but not to the groups
        if missing:
            raise ValueError(
                f"load_state_dict: parameter group {number} of the saved state has no {missing}: it was not saved by "
                f"{owner}. Start {owner} without it; load only the model's state."
            )
        if given.get("update_scale") != group.get("update_scale"):
            raise ValueError(
                f"load_state_dict: the state was saved with update_scale={given['update_scale']!r}, this optimizer has "
                f"{group['update_scale']!r}, whose momentum means something else. Build {owner} with "
                f"update_scale={given['update_scale']!r}."
            )


def check_parameter(owner: str, name: str, state: object, parameter: Tensor, block: TrackedBlock | None) -> None:
    """Raises for a parameter's state that the optimizer cannot go on with.

    Args:
        name: of the parameter, for messages.
        block: whose curvature the state holds; None: it should hold none, or nobody knows.
    """
    where = f"load_state_dict: the saved state of '{name}'"
    if not isinstance(state, Mapping):
        raise ValueError(f"{where} is a {type(state).__name__}, expected a dict. {DAMAGED}")
    for key in ("step", "seed"):
        if not isinstance(state.get(key), Tensor) or state[key].numel() != 1:
            found = repr(state[key]) if key in state else "missing"
            raise ValueError(f"{where} needs a number as a tensor under {key!r}: it is {found}. It was not saved by {owner}.")
    step = float(state["step"])
    if not (0 <= step < COUNTED and step == int(step)):
        raise ValueError(f"{where} has 'step' {step:g}, expected a whole number from 0 to 2**24. {DAMAGED}")
    if "momentum_buffer" in state:
        _check_tensor(owner, f"{where}: 'momentum_buffer'", state["momentum_buffer"], parameter)
    if "pace" in state:
        _check_tensor(owner, f"{where}: 'pace'", state["pace"], ScaleFreeRule().init_state(parameter.device))
    curvature = state.get("curvature")
    if curvature is None or block is None:
        return
    if not isinstance(curvature, Mapping):
        raise ValueError(f"{where}: 'curvature' is a {type(curvature).__name__}, expected a dict. {DAMAGED}")
    where = f"load_state_dict: the saved curvature of '{block.name}' does not fit"
    for key, expected in block.block.init_state(torch.device("meta")).items():
        if key not in curvature:
            raise ValueError(f"{where}: {key!r} is missing, expected {_kind(expected)}. {OTHER_OPTIONS.format(owner=owner)}")
        _check_tensor(owner, f"{where}: {key!r}", curvature[key], expected)
        if expected.dim() == 0 and not 0 <= float(curvature[key]) < math.inf:
            raise ValueError(f"{where}: {key!r} is {float(curvature[key]):g}, expected a number >= 0. {DAMAGED}")


def _check_tensor(owner: str, what: str, found: object, expected: Tensor) -> None:
    if not isinstance(found, Tensor):
        raise ValueError(f"{what} is a {type(found).__name__}, expected {_kind(expected)}. {DAMAGED}")
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ValueError(f"{what} is {_kind(found)}, expected {_kind(expected)}. {OTHER_OPTIONS.format(owner=owner)}")
    if found.is_floating_point() and not bool(torch.isfinite(found).all()):
        raise ValueError(f"{what} is not finite. {DAMAGED}")


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
