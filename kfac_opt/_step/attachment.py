"""At most one curvature optimizer watches a model: a new one takes over."""

from __future__ import annotations

import weakref

from torch import nn
from torch.optim import Optimizer

from kfac_opt._capture.wrappers import unwrapped

_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Optimizer]] = weakref.WeakKeyDictionary()


def rivals(model: nn.Module, optimizer: Optimizer) -> list[Optimizer]:
    """Optimizers that have to give way: of the same model, or of a part or a whole of it with some of the same parameters.

    Trainers build a second optimizer while they still hold the first: the newer one is the one that steps.
    """
    root = unwrapped(model)
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found = []
    for watched, reference in list(_attached.items()):
        other = reference()
        if other is None or other is optimizer:
            continue
        shared = any(id(parameter) in own for group in other.param_groups for parameter in group["params"])
        if watched is root or shared:
            found.append(other)
    return found


def register(model: nn.Module, optimizer: Optimizer) -> None:
    """From now on this optimizer watches the model."""
    _attached[unwrapped(model)] = weakref.ref(optimizer)


def release(model: nn.Module) -> None:
    """Nobody watches the model any more."""
    _attached.pop(unwrapped(model), None)
