"""Checks of everything a user can pass: each message says what was found, what is allowed and what to do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_opt._capture.saying import say
from kfac_opt._curvature.block import DampingScale
from kfac_opt._step.defaults import UpdateScale

CURVATURES = ("kronecker", "eigenbasis", "diagonal", "identity")
CHOICES: dict[str, tuple[str, ...]] = {
    "fisher": ("mc", "exact", "empirical"),
    "damping_style": ("factored", "exact", "split"),
    "update_scale": get_args(UpdateScale),
    "damping_scale": get_args(DampingScale),
    "weight_sharing": ("expand", "reduce"),
    "loss_reduction": ("mean", "sum"),
    "refresh": ("staggered", "together"),
}
REMEDIES = {"refresh": '"staggered" spreads the refreshes over the steps of a round, so that no step stalls.'}


def check_choice(owner: str, name: str, value: object, allowed: Sequence[str], remedy: str = "") -> None:
    if value not in allowed:
        raise ValueError(f"{owner}: {name} must be one of {list(allowed)}, got {value!r}{'. ' * bool(remedy)}{remedy}")


def check_number(owner: str, name: str, value: object, *, low: float, high: float = math.inf, **bounds: bool) -> None:
    """Raises unless ``value`` is a finite number in the range; ``open_low`` / ``open_high`` exclude the ends."""
    open_low, open_high = bounds.get("open_low", False), bounds.get("open_high", False)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, Real) and not isinstance(value, bool):  # numpy's scalars as well
        number = float(value)
        inside = (number > low if open_low else number >= low) and (number < high if open_high else number <= high)
        if math.isfinite(number) and inside:
            return
    if high < math.inf:
        text = f"be in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    else:
        text = f"be {'>' if open_low else '>='} {low:g} and finite"
    raise ValueError(f"{owner}: {name} must {text}, got {value!r}")


def check_count(owner: str, name: str, value: object, *, low: int = 1) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{owner}: {name} must be an integer >= {low}, got {value!r}")


def check_switch(owner: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: {name} must be True or False, got {value!r}")


def check_process_group(owner: str, name: str, value: object) -> None:
    if value is not None and not (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        raise TypeError(
            f"{owner}: {name} must be a torch.distributed.ProcessGroup that this process belongs to, or None, got {value!r}. "
            "torch.distributed.new_group() makes one; a DeviceMesh gives one with get_group()."
        )


# Keys that torch and its schedulers keep in a group beside the optimizer's own.
FOREIGN_KEYS = ("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")


def check_keys(owner: str, group: Mapping[str, Any], known: Iterable[str]) -> None:
    """Warns of a key that no option has: frameworks keep labels of their own in groups, and a misspelt option is one too."""
    unknown = sorted(set(group) - set(known) - set(FOREIGN_KEYS))
    if unknown:
        say(
            f"{owner}: {unknown[0]!r} in a parameter group is no option of {owner} and changes nothing; its options are "
            f"{sorted(known)}. Ignore this if another tool put it there.")


def check_group(owner: str, group: Mapping[str, Any], *, zero_damping: bool) -> None:
    """Ranges of everything that may differ between parameter groups."""
    check_number(owner, "lr", group["lr"], low=0.0)
    check_number(owner, "momentum", group["momentum"], low=0.0, high=1.0, open_high=True)
    check_number(owner, "damping", group["damping"], low=0.0, open_low=not zero_damping)
    check_number(owner, "weight_decay", group["weight_decay"], low=0.0)
    check_number(owner, "factor_decay", group["factor_decay"], low=0.0, high=1.0, open_high=True)
    check_count(owner, "factor_interval", group["factor_interval"])
    check_count(owner, "inverse_interval", group["inverse_interval"])
    if group.get("update_scale") == "rms" and group["kl_clip"] is not None:
        raise ValueError(
            f"{owner}: kl_clip has no effect with update_scale='rms', whose steps have a length of their own, got "
            f"{group['kl_clip']!r}. Leave it out, or take update_scale='natural'."
        )
    if "power" in group:
        check_number(owner, "power", group["power"], low=0.0, high=1.0, open_low=True)
    for name in ("kl_clip", "max_relative_update"):
        if group[name] is not None:
            check_number(owner, name, group[name], low=0.0, open_low=True)
    check_choice(owner, "curvature", group["curvature"], CURVATURES)
    for name in ("nesterov", "decoupled_weight_decay", "maximize"):
        check_switch(owner, name, group.get(name, False))


def check_model(owner: str, model: object) -> nn.Module:
    """The model, if it can be hooked.

    Raises:
        TypeError: not a module, or ``nn.DataParallel``.
        ValueError: parameters that are not there yet, or sharded.
    """
    if isinstance(model, nn.Module) and any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise TypeError(
            f"{owner}: nn.DataParallel copies the model at every forward and its hooks see only a part of the batch. "
            "Use torch.nn.parallel.DistributedDataParallel (one process per device) or a single device."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{owner}: the first argument must be the model (torch.nn.Module), got {type(model).__name__}. Call "
            f"{owner}(model, lr=...); parameters or groups go into the second argument, params."
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError(
            f"{owner}: the model is, or holds, a torch.jit.ScriptModule, which runs outside Python and calls no hooks. Build "
            f"{owner} on the plain module; torch.compile(model) is supported."
        )
    if any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules()):
        raise ValueError(
            f"{owner}: the model is sharded (FullyShardedDataParallel), and no rank holds a layer's weight as a whole. Use "
            "DistributedDataParallel, or curvature on one device."
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"{owner}: parameter '{name}' is not initialized (a lazy module). Run one forward pass before you "
                "build the optimizer."
            )
        if parameter.is_meta:
            raise ValueError(
                f"{owner}: parameter '{name}' is on the meta device and holds no numbers. Materialise the model first "
                "(to_empty() and load_state_dict(), which replace the parameters), then build the optimizer."
            )
        if hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"{owner}: parameter '{name}' is a sharded DTensor (fully_shard / FSDP2), whose gradient no rank holds "
                "as a whole. Use DistributedDataParallel, or curvature on one device."
            )
    return model


def parameter_groups(owner: str, model: nn.Module, params: object) -> list[dict[str, Any]]:
    """``params`` as torch.optim groups; None means all trainable parameters.

    Raises:
        TypeError: for a number (a learning rate in the wrong place) or anything that is no iterable of parameters.
        ValueError: for parameters that are not the model's, complex ones, or none at all.
    """
    if params is None:
        params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scalar = isinstance(params, Tensor) and params.dim() == 0
    if scalar or isinstance(params, (int, float, str)) or not isinstance(params, Iterable):
        raise TypeError(
            f"{owner}: params must be None (all trainable parameters), an iterable of parameters or of groups, got "
            f"{params!r}. Did you mean {owner}(model, lr={params!r})?"
        )
    if isinstance(params, Tensor):
        raise TypeError(
            f"{owner}: params must be an iterable of parameters or of groups, got one Tensor of shape "
            f"{list(params.shape)}. Put it into a list."
        )
    entries = list(params)
    groups = [dict(entry) for entry in entries] if entries and isinstance(entries[0], dict) else [{"params": entries}]
    known = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    for number, group in enumerate(groups):
        members = group.get("params")
        if members is None:
            raise ValueError(f"{owner}: parameter group {number} has no key 'params', got keys {sorted(group)}")
        group["params"] = [members] if isinstance(members, Tensor) else list(members)
        for entry in group["params"]:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if not isinstance(parameter, Tensor):
                raise TypeError(
                    f"{owner}: parameter group {number} holds a {type(parameter).__name__}, expected parameters of the "
                    "model. Pass model.parameters() or groups {'params': [...], 'lr': ...}."
                )
            if id(parameter) not in known:
                raise ValueError(
                    f"{owner}: a parameter of shape {list(parameter.shape)} in group {number} does not belong to the "
                    "model. Pass parameters of the model given as first argument."
                )
            if parameter.is_complex():
                raise ValueError(
                    f"{owner}: parameter '{known[id(parameter)]}' is complex ({parameter.dtype}); the Fisher matrix here "
                    "is real. Leave it to another optimizer or store real and imaginary part."
                )
    for number, group in enumerate(groups):
        counts = Counter(id(entry[1] if isinstance(entry, tuple) else entry) for entry in group["params"])
        twice = sorted(known[member] for member, count in counts.items() if count > 1)
        if twice:
            raise ValueError(f"{owner}: parameter group {number} holds {', '.join(map(repr, twice))} twice. List it once.")
    if not any(group["params"] for group in groups):
        raise ValueError(f"{owner}: the model has no trainable parameters. Unfreeze some with requires_grad_(True).")
    return groups


def check_rule(owner: str, group: Mapping[str, Any], rule: str) -> None:
    """Raises ValueError for what the update rule of the optimizer has no use for."""
    if group.get("update_scale", rule) != rule:
        raise ValueError(
            f"{owner}: update_scale holds for all parameter groups, got {group['update_scale']!r} in one and {rule!r} for "
            f"the optimizer. Pass it to {owner}(model, update_scale=...)."
        )


def check_mask(mask: object) -> None:
    """Raises TypeError for what is no bool tensor."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"masked: expected a bool tensor, got {found}. Convert it with mask.bool().")


def base_seed(owner: str, generator: object) -> int:
    """Drawn from a generator; 0 for None."""
    if generator is None:
        return 0
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{owner}: generator must be a torch.Generator or None, got {generator!r}. For a seed pass "
            "generator=torch.Generator().manual_seed(...)."
        )
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def check_gradient(owner: str, name: str, gradient: Tensor) -> None:
    """Raises for gradients that cannot be preconditioned, with the name of the parameter."""
    if gradient.is_sparse:
        raise RuntimeError(
            f"{owner}: the gradient of '{name}' is sparse, expected a dense one. Build the embedding with sparse=False."
        )
