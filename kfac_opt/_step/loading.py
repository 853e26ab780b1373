"""Loading optimizer state without the casts and the aliasing of torch's own ``load_state_dict``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def by_number(state_dict: dict[str, Any], model: nn.Module | None, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """``state_dict`` with parameters numbered in the order of the groups, as torch expects; names are translated.

    Raises:
        ValueError: for a name that the model does not have.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    if not any(isinstance(key, str) for key in keys):
        return state_dict
    if model is None:
        raise ValueError(
            "load_state_dict: the state is keyed by parameter names, which only an optimizer attached to a model can "
            "resolve. Build it with the model."
        )
    parameters = [parameter for group in groups for parameter in group["params"]]
    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    names: dict[str, int] = {}
    whole: dict[str, int] = {}  # preferred: a part of the model may itself be called "module"
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in numbers:
            names[_plain(name)] = whole[name] = numbers[id(parameter)]
    unknown = [key for key in keys if isinstance(key, str) and _plain(key) not in names]
    if unknown:
        raise ValueError(
            f"load_state_dict: the state names parameters {unknown} that this optimizer does not have. It was saved from "
            "another model or other parameter groups."
        )

    def number(key: Any) -> Any:
        return whole.get(key, names.get(_plain(key))) if isinstance(key, str) else key

    saved_groups = {frozenset(map(number, g["params"])): g for g in state_dict["param_groups"]}
    ordered = []
    for group in groups:
        members = [numbers[id(parameter)] for parameter in group["params"]]
        saved = saved_groups.get(frozenset(members))
        if saved is None:
            raise ValueError("load_state_dict: the saved parameter groups do not hold the same parameters as these groups.")
        ordered.append({**saved, "params": members})
    return {**state_dict, "state": {number(k): v for k, v in state_dict["state"].items()}, "param_groups": ordered}


def _plain(name: str) -> str:
    """Without the prefixes of wrappers."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


RETIRED = ("skipped", "sketch_damping", "input_sketch", "output_sketch")  # of an option there was: nothing depends on them


def in_current_form(state: Any) -> Any:
    """The state of a parameter as this version writes it: without what is gone, with what older versions took for granted."""
    if not isinstance(state, Mapping) or not isinstance(state.get("curvature"), Mapping):
        return state
    curvature = {key: value for key, value in state["curvature"].items() if key not in RETIRED}
    if "input_inverse" in curvature:
        curvature.setdefault("refreshed_power", torch.ones((), dtype=torch.float64))
    return {**state, "curvature": curvature}


def has_diagonal(state: Any) -> bool:
    """Whether this state of a layer's weight belongs to a diagonal block."""
    curvature = state.get("curvature") if isinstance(state, Mapping) else None
    return isinstance(curvature, Mapping) and "diagonal" in curvature


def install_saved(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Replaces the loaded state by copies of the saved tensors: dtypes as saved, 0-dim counters on the CPU."""
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, parameter in zip(keys, parameters):
        if key in saved["state"]:
            optimizer.state[parameter] = copied(saved["state"][key], parameter.device)


HOST_KEYS = (
    "step",
    "seed",
    "weight",
    "scales_weight",
    "refreshes",
    "failures",
    "estimates",
    "refreshed_estimates",
    "refreshed_power",
)


def copied(value: Any, device: torch.device, name: str = "") -> Any:
    """A deep copy on the device of the parameter; what is read at every step stays on the CPU."""
    if isinstance(value, dict):
        return {key: copied(part, device, str(key)) for key, part in value.items()}
    if isinstance(value, Tensor):
        return value.detach().to("cpu" if name in HOST_KEYS else device, copy=True)
    return value
