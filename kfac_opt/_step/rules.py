"""Update rules: from the gradients of a parameter group to its new parameters.

A rule decides what is preconditioned (the gradient, or its average) and how long the step is. A new one is a class with
:meth:`UpdateRule.step`; ``RULES`` names it for ``update_scale=``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kfac_opt._step.safety import cast_to_parameters
from kfac_opt._step.scale_free import ScaleFreeRule, StepSettings, move_
from kfac_opt._step.update import Directions, apply_, bound_updates_, kl_clip_factor, momentum_, multiply_


@dataclass(frozen=True)
class GroupStep:
    """One step of one group.

    Attributes:
        group: its settings.
        gradients: by the id of the parameter; none for parameters without a gradient.
        precondition: directions for gradients, or for what takes their place.
        state: of each parameter; what :meth:`UpdateRule.allocate` made is there.
        foreach: grouped calls, or one tensor after the other.
    """

    group: Mapping[str, Any]
    gradients: dict[int, Tensor]
    precondition: Callable[[dict[int, Tensor]], Directions]
    state: Mapping[Tensor, dict[str, Any]]
    foreach: bool

    @property
    def lr(self) -> float:
        """Learning rate."""
        return float(self.group["lr"])

    @property
    def momentum(self) -> float:
        """0 without momentum."""
        return float(self.group["momentum"])

    @property
    def decay(self) -> float:
        """Decoupled weight decay of this step."""
        return self.lr * float(self.group["weight_decay"]) if self.group["decoupled_weight_decay"] else 0.0

    def buffers(self, parameters: list[Tensor]) -> list[Tensor]:
        """Momentum of these parameters."""
        return [self.state[parameter]["momentum_buffer"] for parameter in parameters]


class UpdateRule(Protocol):
    """How a group steps."""

    def allocate(self, group: Mapping[str, Any], parameter: Tensor, state: dict[str, Any]) -> None:
        """Adds the keys that the rule keeps of a parameter, if they are not there."""

    def step(self, now: GroupStep) -> float | Tensor | None:
        """Writes the new parameters. Returns what a trust region shortened the directions to, if there is one."""


def _allocate_momentum(group: Mapping[str, Any], parameter: Tensor, state: dict[str, Any]) -> None:
    if float(group["momentum"]) > 0.0 and "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


class NaturalRule:
    """``update_scale="natural"``: the direction, a trust region, momentum of the direction, a bound on each layer's step.

    Osawa et al. 2019, arXiv:1811.12019. A group with ``curvature="identity"`` has neither trust region nor bound: it is
    torch's SGD.
    """

    def allocate(self, group: Mapping[str, Any], parameter: Tensor, state: dict[str, Any]) -> None:
        _allocate_momentum(group, parameter, state)

    def step(self, now: GroupStep) -> float | Tensor | None:
        group, found = now.group, now.precondition(now.gradients)
        if not found.parameters:
            return None
        curved = group["curvature"] != "identity" and found.num_blocks > 0
        updates, scale, factors = found.directions, None, None
        if curved and group["kl_clip"] is not None:
            scale = kl_clip_factor(found.products, now.lr, float(group["kl_clip"]))
            multiply_(updates, scale, foreach=now.foreach)
        # Shortened before they are cast: half precision does not hold a direction as it comes.
        updates = cast_to_parameters(updates, found.parameters, now.momentum)
        if now.momentum > 0.0:
            updates = momentum_(
                updates,
                now.buffers(found.parameters),
                now.momentum,
                nesterov=group["nesterov"],
                foreach=now.foreach,
                reuse=group["curvature"] != "identity",  # whose directions are the gradients themselves
            )
        if curved and group["max_relative_update"] is not None:
            factors = bound_updates_(updates, found, now.lr, float(group["max_relative_update"]))
        apply_(found.parameters, updates, now.lr, now.decay, factors, foreach=now.foreach)
        return scale


class RmsRule:
    """``update_scale="rms"``: momentum of the gradient, its direction, a step whose length does not depend on the loss's scale.

    The sizes are those of :class:`~kfac_opt._step.scale_free.ScaleFreeRule`. Groups with ``curvature="identity"`` are torch's
    SGD under every rule.
    """

    def __init__(self, sizes: ScaleFreeRule | None = None) -> None:
        self.sizes, self._plain = sizes or ScaleFreeRule(), NaturalRule()

    def allocate(self, group: Mapping[str, Any], parameter: Tensor, state: dict[str, Any]) -> None:
        _allocate_momentum(group, parameter, state)
        if group["curvature"] != "identity" and "pace" not in state:
            state["pace"] = self.sizes.init_state(parameter.device)

    def step(self, now: GroupStep) -> float | Tensor | None:
        if now.group["curvature"] == "identity":
            return self._plain.step(now)
        averages = momenta = now.gradients
        if now.momentum > 0.0 and now.gradients:
            buffers = now.buffers([p for p in now.group["params"] if id(p) in now.gradients])
            given, nesterov = list(now.gradients.values()), now.group["nesterov"]
            averaged = self.sizes.averaged_(given, buffers, now.momentum, nesterov=nesterov, foreach=now.foreach)
            averages, momenta = dict(zip(now.gradients, averaged)), dict(zip(now.gradients, buffers))
        found = now.precondition(averages)
        if not found.parameters:
            return None
        factors = self.sizes.factors(
            found,
            [now.gradients[id(parameter)] for parameter in found.parameters],
            [momenta[id(parameter)] for parameter in found.parameters],
            [now.state[parameter]["pace"] for parameter in found.parameters],
            StepSettings(now.lr, now.momentum, now.group["max_relative_update"]),
        )
        move_(found, factors, now.decay, foreach=now.foreach)
        return None


RULES: dict[str, type[NaturalRule] | type[RmsRule]] = {"natural": NaturalRule, "rms": RmsRule}
