r"""Levenberg-Marquardt's rule for damping: compare the change of the loss with what the quadratic model said."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kfac_opt._curvature.eigenbasis import EigenbasisBlock
from kfac_opt._curvature.kronecker import KroneckerBlock
from kfac_opt.damping.early import EarlySteps
from kfac_opt.damping.rule import DampingRule, check_interval


class LevenbergMarquardt(DampingRule):
    r"""Raises damping where the quadratic model promises too much, lowers it where the model can be trusted.

    Every ``interval`` (k) steps, on the mini-batch of that step (Martens & Grosse 2015, arXiv:1503.05671, §6.5):

    .. math::
        \rho = \frac{L(\theta + \delta) - L(\theta)}{\tfrac12 \delta^\top (F + \gamma I) \delta + \nabla L^\top \delta},
        \quad \gamma \leftarrow \omega^k \gamma \;(\rho > 3/4), \quad \gamma \leftarrow \gamma / \omega^k \;(\rho < 1/4)

    :math:`\delta = \mathrm{reach} \cdot (\theta_{t+1} - \theta_t)`, momentum and trust region included; F is the
    optimizer's own approximation. With a small learning rate the actual step is so short that every quadratic model is
    right about it and the damping would fall for ever; ``reach`` > 1 asks about a longer step in the same direction
    (the weights are put back). The same holds for a step that the KL clip has cut to a small part, and mini-batches
    make it worse, since a step is always good for the batch it was made from: below ``min_scale`` the damping of a group
    does not fall. There is one loss and so one ratio; every parameter group multiplies its own damping.

    >>> optimizer = KFAC(model, update_scale="natural", damping=1.0)
    >>> damping = LevenbergMarquardt(optimizer)
    >>> for x, y in loader:
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.cross_entropy(model(x), y)
    ...     loss.backward()
    ...     optimizer.step()
    ...     damping.step(loss, lambda: torch.nn.functional.cross_entropy(model(x), y))

    It costs, every ``interval`` steps, one more forward pass without gradients, one product of the step with both
    factors of each layer (as much as preconditioning) and one read of the device; and one copy of the weights at those
    steps. Dropout and other noise must be the same in both evaluations, or they drown the comparison; BatchNorm's
    running averages see the batch a second time.

    Args:
        optimizer: KFAC or KFACVI. Its step must be the plain ``step()``: the rule hooks it to keep the weights before.
        decay: ``ω`` per step, in (0, 1); 0.85 every 10 steps was chosen on the digits and MNIST, where the published
            19/20 every 5 steps is too slow for a start that is far off.
        interval: ``k``.
        reach: factor on the step that is judged, >= 1.
        min_scale: the smallest trust-region scale at which the damping still falls, in [0, 1]; 0 is the published rule.
        early_steps: in so many first steps the damping comes down to where the KL clip leaves ``min_scale`` of a step,
            without any evaluation: at a published rate of change a start that is too high by 10⁴ costs hundreds of
            steps. 0 is the published rule.
        min_damping, max_damping: bounds of the damping.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        decay: float = 0.85,
        interval: int = 10,
        reach: float = 1.0,
        min_scale: float = 0.025,
        early_steps: int = 10,
        min_damping: float = 1e-8,
        max_damping: float = 1e6,
    ) -> None:
        super().__init__(optimizer, min_damping=min_damping, max_damping=max_damping)
        owner = type(self).__name__
        if not hasattr(optimizer, "curvature"):
            raise TypeError(f"{owner}: {type(optimizer).__name__} has no curvature. Use it with KFAC or KFACVI.")
        if not 0.0 < decay < 1.0:
            raise ValueError(f"{owner}: decay must be in (0, 1), got {decay!r}")
        check_interval(owner, interval)
        if not 1.0 <= reach < math.inf:
            raise ValueError(f"{owner}: reach must be >= 1 and finite, got {reach!r}")
        if not 0.0 <= min_scale <= 1.0:
            raise ValueError(f"{owner}: min_scale must be in [0, 1], got {min_scale!r}")
        self.decay, self.interval, self.reach, self.min_scale = decay, interval, reach, min_scale
        self._early = EarlySteps(owner, optimizer, early_steps, min_scale)
        self.last_ratio: float | None = None
        self._before: list[Tensor] = []
        self._hook = optimizer.register_step_pre_hook(self._keep_weights)

    @property
    def due(self) -> bool:
        """Whether the next ``step()`` will evaluate the closure."""
        return (self.num_steps + 1) % self.interval == 0

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def _keep_weights(self, *_: Any) -> None:
        if self.due:
            self._before = [parameter.detach().clone() for parameter in self._parameters()]

    def detach(self) -> None:
        """Removes the hook from the optimizer."""
        self._hook.remove()

    def step(self, loss: Tensor | float, closure: Callable[[], Tensor | float]) -> None:
        """To be called after each step of the optimizer, while the gradients are still there.

        Args:
            loss: of this step's mini-batch before the optimizer's step, the one whose gradient was taken.
            closure: the same loss, on the same mini-batch, with the weights as they are when it is called. It is
                called only when the ratio is due, without gradients and without being seen by the optimizer.

        Raises:
            RuntimeError: if the ratio is due and the optimizer has not stepped since the last call.
        """
        due = self.due
        self.num_steps += 1
        for number, damping in enumerate(self.get_last_damping()):
            scale = self._early.scale(number, self.num_steps)
            if scale is not None:
                self._write(number, damping * math.exp(self._early.change(number, scale)))
        if not due:
            return
        if not self._before:
            raise RuntimeError(
                "LevenbergMarquardt: the weights of before the step are not known. Call optimizer.step() before each "
                "damping.step(loss, closure)."
            )
        before, self._before = self._before, []
        with torch.no_grad():
            self._judge(_number(loss), closure, before)

    def _judge(self, loss: float, closure: Callable[[], Tensor | float], before: list[Tensor]) -> None:
        parameters = self._parameters()
        steps = torch._foreach_sub(parameters, before)
        torch._foreach_mul_(steps, self.reach)
        predicted = self._predicted_change(dict(zip(map(id, parameters), steps)))
        actual = self._loss_after(closure, parameters, before, steps) - loss
        self.last_ratio = actual / predicted if predicted < 0.0 else None
        factor = self.decay**self.interval
        scales = getattr(self.optimizer, "trust_region_scales", {})
        for number, damping in enumerate(self.get_last_damping()):
            if not math.isfinite(actual) or (self.last_ratio is not None and self.last_ratio < 0.25):
                self._write(number, damping / factor)
            elif self.last_ratio is not None and self.last_ratio > 0.75 and scales.get(number, 1.0) >= self.min_scale:
                self._write(number, damping * factor)

    def _loss_after(
        self, closure: Callable[[], Tensor | float], parameters: list[Tensor], before: list[Tensor], steps: Any
    ) -> float:
        paused = getattr(self.optimizer, "paused", nullcontext)
        with paused():
            if self.reach == 1.0:
                return _number(closure())
            kept = [parameter.clone() for parameter in parameters]
            try:
                torch._foreach_copy_(parameters, torch._foreach_add(before, steps))
                return _number(closure())
            finally:
                torch._foreach_copy_(parameters, kept)

    def _predicted_change(self, steps: dict[int, Tensor]) -> float:
        """``½ δᵀ(F + γI)δ + ∇Lᵀδ``, decay and other additions to the gradient not counted."""
        terms: list[Tensor] = []
        optimizer: Any = self.optimizer
        for group in optimizer.param_groups:
            sign = -1.0 if group.get("maximize") else 1.0
            for parameter in group["params"]:
                if parameter.grad is not None:
                    terms.append(sign * torch.dot(parameter.grad.flatten(), steps[id(parameter)].flatten()))
        for name, tracked in optimizer.blocks.items():
            parts = [steps[id(parameter)] for parameter in tracked.parameters]
            view, layout = optimizer.curvature[name], tracked.block.layout
            matrix = layout.to_matrix(parts[0], parts[1] if len(parts) > 1 else None).to(tracked.block.dtype)
            terms.append(0.5 * quadratic_form(view, matrix))
            terms.append(0.5 * view.damping * matrix.square().sum())
        # Half precision could not hold the small differences that are compared.
        dtype = torch.float64 if any(term.dtype == torch.float64 for term in terms) else torch.float32
        return float(torch.stack([term.to(terms[0].device, dtype) for term in terms]).sum())

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "last_ratio": self.last_ratio, "early": list(self._early.refreshes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.last_ratio = state_dict["last_ratio"]
        self._early.refreshes = [float(count) for count in state_dict["early"]]


def quadratic_form(view: Any, matrix: Tensor) -> Tensor:
    r""":math:`\delta^\top F_l \delta` of one block, 0-dim.

    Args:
        view: an entry of ``optimizer.curvature``.
        matrix: the step as ``[groups, out_dim, in_dim]``. A Kronecker block needs no eigenvalues:
            :math:`\delta^\top (A \otimes G) \delta = \langle \delta, G \delta A \rangle`.
    """
    if isinstance(view.block, KroneckerBlock) and not isinstance(view.block, EigenbasisBlock):
        output_factor, input_factor = view.output_factor, view.input_factor
        turned = _apply(output_factor, matrix, view.block.dense_sides["output"], left=True)
        turned = _apply(input_factor, turned, view.block.dense_sides["input"], left=False)
        return (turned * matrix).sum()
    form = view.spectral_form()
    return (form.rotate(matrix).square() * form.eigenvalues).sum()


def _apply(factor: Tensor, matrix: Tensor, dense: bool, *, left: bool) -> Tensor:
    """``factor @ matrix`` or ``matrix @ factor``; the diagonal of a factor is a vector."""
    if dense:
        return factor @ matrix if left else matrix @ factor
    return factor.unsqueeze(-1) * matrix if left else matrix * factor.unsqueeze(-2)


def _number(loss: Tensor | float) -> float:
    return float(loss.detach() if isinstance(loss, Tensor) else loss)
