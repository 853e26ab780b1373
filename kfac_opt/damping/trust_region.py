r"""A cheap rule: damping from the alignment of successive steps and from the trust region, without an extra pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kfac_opt.damping.early import EarlySteps
from kfac_opt.damping.rule import DampingRule, check_interval, check_positive


class TrustRegionDamping(DampingRule):
    r"""Lowers the damping while steps are timid, raises it when they overshoot or the trust region does its work.

    Two signals, both there anyway:

    * **Alignment.** The gradient :math:`g_{t+1}` of the next mini-batch says whether the last step
      :math:`\delta_t` went too far: :math:`\langle g_{t+1}, \delta_t \rangle` is an unbiased estimate of the slope of
      the loss along the step at its end. While its cosine :math:`c` is negative the loss still falls in that direction:
      the step was timid, less damping is wanted; a clearly positive one means overshooting.
    * **Trust region.** The scale :math:`s \le 1` by which the KL clip shortens the step. Damping and trust region are
      two ways to bound the same step (Moré 1978; Martens & Grosse 2015, §6): if the clip shortens by more than
      ``min_scale``, less damping lengthens nothing any more and only turns the direction to where the curvature is
      estimated worst; damping is raised until :math:`s` is back.

    Per group, every ``interval`` steps, with :math:`r = \log (s / s_{min})`:

    .. math::
        \Delta \log \gamma = -r/2 \;(r < 0),\quad -\min(k (-c - c_0), r) \;(c < -c_0),\quad k (c - c_0) \;(c > c_0)

    bounded by ``max_change``. The deadband :math:`c_0` leaves alone what is noise: of the mini-batches when steps are
    hardly longer than it, and the small positive cosine of sampling without replacement.

    In the first ``early_steps`` steps the clip alone decides, after each step that refreshed the inverses (the 1st, 2nd,
    3rd, 5th, 9th with the optimizer's ramp): :math:`\Delta \log \gamma = -2 r` for :math:`r > 0`. From a start that is
    too high, the trust region is reached within a few steps. Without a clip the alignment decides after 2, 4, 8 steps.

    >>> optimizer = KFAC(model, update_scale="natural", damping=1.0)
    >>> damping = TrustRegionDamping(optimizer)
    >>> for x, y in loader:
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.cross_entropy(model(x), y).backward()
    ...     optimizer.step()
    ...     damping.step()

    At the two steps before a change it copies the weights, at the change it passes over them once and reads the device
    once; no forward, no backward (``benchmarks/damping_rules.py`` measures the cost). Without ``kl_clip`` the alignment
    alone decides.

    Args:
        optimizer: KFAC or KFACVI; call ``step()`` after its step, before ``zero_grad()``.
        gain: ``k``; 4, ``interval`` 10, ``min_scale`` 0.025, ``deadband`` 0.2 and ``max_change`` 3 were chosen on the
            digits and MNIST, as was the factor 2 of the early steps.
        interval: steps between changes; of the order of the optimizer's ``inverse_interval``, since a factored inverse
            takes the damping up only then.
        min_scale: the smallest trust-region scale that is left alone, in (0, 1].
        deadband: ``c_0``, in [0, 1).
        max_change: largest change of ``log γ`` at once.
        early_steps: 0 leaves the start to the slower rule.
        min_damping, max_damping: bounds of the damping.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        gain: float = 4.0,
        interval: int = 10,
        min_scale: float = 0.025,
        deadband: float = 0.2,
        max_change: float = 3.0,
        early_steps: int = 10,
        min_damping: float = 1e-8,
        max_damping: float = 1e6,
    ) -> None:
        super().__init__(optimizer, min_damping=min_damping, max_damping=max_damping)
        owner = type(self).__name__
        check_positive(owner, gain=gain, max_change=max_change)
        check_interval(owner, interval)
        if not 0.0 < min_scale <= 1.0:
            raise ValueError(f"{owner}: min_scale must be in (0, 1], got {min_scale!r}")
        if not 0.0 <= deadband < 1.0:
            raise ValueError(f"{owner}: deadband must be in [0, 1), got {deadband!r}")
        self.gain, self.interval, self.min_scale = gain, interval, min_scale
        self.deadband, self.max_change = deadband, max_change
        self._early = EarlySteps(owner, optimizer, early_steps, min_scale)
        self._signals = [_Signals() for _ in optimizer.param_groups]
        self._prepare()

    def step(self) -> None:
        """To be called after each step of the optimizer, while the gradients are still there."""
        self.num_steps += 1
        now = self.num_steps
        if now <= self._early.num_steps or self._due(now):
            self._change()
        if self._due(now + 1) or self._due(now + 2):  # most steps end here, at the price of a few comparisons
            self._prepare()

    @torch.no_grad()
    def _change(self) -> None:
        scales = getattr(self.optimizer, "trust_region_scales", {})
        for number, (group, signals) in enumerate(zip(self.optimizer.param_groups, self._signals)):
            early = self._early.scale(number, self.num_steps)
            if early is not None and self.num_steps % self.interval != 0:
                signals.last_step = []
                self._write(number, float(group["damping"]) * math.exp(self._early.change(number, early)))
            elif self._due(self.num_steps):
                found = signals.read(group["params"], scales.get(number))
                if found is not None:
                    self._write(number, float(group["damping"]) * math.exp(self.log_change(*found)))

    def _due(self, num_steps: int) -> bool:
        early = num_steps >= 2 and num_steps & (num_steps - 1) == 0 and num_steps < self.interval
        return early or num_steps % self.interval == 0

    @torch.no_grad()
    def _prepare(self) -> None:
        """Before a change: the weights two steps earlier, the step that they lead to one step earlier."""
        for group, signals in zip(self.optimizer.param_groups, self._signals):
            if self._due(self.num_steps + 1):
                signals.keep_step(group["params"])
            if self._due(self.num_steps + 2):
                signals.keep_weights(group["params"])

    def log_change(self, cosine: float, log_scale: float) -> float:
        """Change of ``log γ`` for the cosine of a step with the next gradient and the log of the clip's scale."""
        room = log_scale - math.log(self.min_scale)
        if room < 0.0:
            change = -0.5 * room
        elif cosine < 0.0:
            change = -min(self.gain * max(0.0, -cosine - self.deadband), room)
        else:
            change = self.gain * max(0.0, cosine - self.deadband)
        return min(self.max_change, max(-self.max_change, change))

    def state_dict(self) -> dict[str, Any]:
        """Includes the weights or the step that are kept for the next change, so that resuming is exact."""
        signals = [signals.state_dict() for signals in self._signals]
        return {**super().state_dict(), "signals": signals, "early": list(self._early.refreshes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._early.refreshes = [float(count) for count in state_dict["early"]]
        for group, signals, state in zip(self.optimizer.param_groups, self._signals, state_dict["signals"]):
            signals.load_state_dict(state, group["params"])


class _Signals:
    """What one group keeps for its next change."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.last_step: list[Tensor] = []

    def keep_weights(self, parameters: list[Tensor]) -> None:
        self.weights = [parameter.detach().clone() for parameter in parameters]

    def keep_step(self, parameters: list[Tensor]) -> None:
        if self.weights:
            self.last_step = list(torch._foreach_sub([p.detach() for p in parameters], self.weights))
            self.weights = []

    def read(self, parameters: list[Tensor], scale: Tensor | None) -> tuple[float, float] | None:
        """Cosine and log of the trust-region scale (0 without a clip); None where there is nothing to compare."""
        last_step, self.last_step = self.last_step, []
        cosine = _cosine(parameters, last_step) if last_step else None
        if cosine is None:
            return None
        parts = [cosine, torch.ones_like(cosine) if scale is None else scale.to(cosine)]
        found, region = torch.stack(parts).tolist()  # the one read of the device
        if not math.isfinite(found) or not region > 0.0:
            return None
        return found, math.log(region)

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {
            "weights": [tensor.clone() for tensor in self.weights],
            "last_step": [tensor.clone() for tensor in self.last_step],
        }

    def load_state_dict(self, state: dict[str, list[Tensor]], parameters: list[Tensor]) -> None:
        for name in ("weights", "last_step"):
            tensors = [tensor.to(parameter, copy=True) for tensor, parameter in zip(state[name], parameters)]
            setattr(self, name, tensors)


def _cosine(parameters: list[Tensor], last_step: list[Tensor]) -> Tensor | None:
    """Cosine of the gradient and the last step over all parameters that have a gradient, 0-dim; 0 if either is zero."""
    pairs = [(p.grad, step) for p, step in zip(parameters, last_step) if p.grad is not None]
    if not pairs:
        return None
    gradients, steps = [g.detach() for g, _ in pairs if g is not None], [step for _, step in pairs]
    device = gradients[0].device
    products = [torch.dot(g.flatten(), s.flatten()).to(device, torch.float32) for g, s in zip(gradients, steps)]
    norms = torch._foreach_norm([*gradients, *steps])
    sizes = torch.stack([norm.to(device, torch.float32) for norm in norms]).unflatten(0, (2, len(pairs))).norm(dim=1)
    usable = (sizes > 0).all()
    # One after the other: the product of two small sizes vanishes, that of two large ones overflows.
    first, second = torch.where(usable, sizes, 1.0)
    return torch.where(usable, torch.stack(products).sum() / first / second, 0.0)
