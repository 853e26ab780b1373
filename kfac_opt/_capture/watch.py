"""Holds the loss of the first passes against the likelihood: a wrong one gives a wrong Fisher matrix and no error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from kfac_opt._capture.outputs import pick_logits
from kfac_opt._capture.saying import say
from kfac_opt.likelihoods import Likelihood

WATCHED_PASSES = 3
LINEAR = 1e-3  # relative deviation from a linear map: rounding, in single precision and with room


class LossWatch:
    """Looks at the loss's gradient in the logits of the first passes, and warns once where it contradicts the likelihood.

    Args:
        likelihood: of the optimizer.
        outputs: as in the optimizer. What it picks may be a new tensor that the loss never sees; then the gradients in the
            model's own outputs are read, and what ``outputs`` makes of them, if it is a linear map (a slice, a product with a
            number, several heads side by side).
    """

    def __init__(self, likelihood: Likelihood, outputs: Callable[[Any], Any] | None = None) -> None:
        self.likelihood, self.outputs = likelihood, outputs
        self.left = WATCHED_PASSES
        self.said = self.hinted = False
        self.seen = False  # whether any loss came through what was picked
        self._around: list[_Around] = []

    def attach(self, logits: Tensor, mask: Tensor | None, output: Any) -> None:
        """Watches the backward of this pass, while there are passes to watch."""
        if self.left > 0:
            self.left -= 1
            logits.register_hook(_Look(self, logits.detach(), mask))
            if self.outputs is not None:
                self._around.append(_Around(logits, mask, output))

    @property
    def waiting(self) -> bool:
        """Whether passes wait for :meth:`settle`."""
        return bool(self._around)

    def look(self, logits: Tensor, gradient: Tensor, mask: Tensor | None) -> None:
        """Warns when the gradient cannot come from the likelihood, or shows terms without a loss."""
        if not bool(torch.isfinite(gradient).all()) or not bool(gradient.any()):
            return
        self.seen = True
        self._contradict(logits, gradient)
        if mask is None and not self.said and not self.hinted:
            self._hint(logits, gradient)

    def _contradict(self, logits: Tensor, gradient: Tensor) -> None:
        reason = None if self.said else self.likelihood.contradiction(logits, gradient)
        if reason is not None:
            self.said, self.left = True, 0
            say(
                f"the likelihood '{self.likelihood.name}' does not fit the loss: {reason}. The Fisher matrix is that of "
                f"the likelihood, not of the loss. {self.likelihood.remedy(logits, gradient)} "
                "(or ignore this if an auxiliary term was added to the loss on purpose)."
            )

    def _hint(self, logits: Tensor, gradient: Tensor) -> None:
        silent, terms = self.likelihood.silent_terms(logits, gradient)
        if silent:
            self.hinted = True
            say(
                f"{silent} of the {terms} terms that the Fisher matrix counts have no gradient of the loss (targets with "
                "ignore_index, padding, a loss of some positions only). Leave them out of the Fisher matrix too: 'with "
                "optimizer.masked(mask):' around the forward, or outputs=lambda output: (logits, mask)."
            )

    def settle(self, *, gradients_came: bool) -> None:
        """After a step's passes: reads off gradients around the picked tensor; says once that no loss came through it.

        Args:
            gradients_came: whether parameters have gradients.
        """
        around, self._around = self._around, []
        for part in around:
            found = None if self.seen or self.outputs is None else part.gradient(self.outputs)
            if found is not None:
                self.look(part.logits, found, part.mask)
        if around and gradients_came and self.left == 0 and not self.seen and not self.said:
            self.said = True
            say(
                f"no loss came through the tensor that outputs= picked in the first {WATCHED_PASSES} passes, so that the "
                f"likelihood '{self.likelihood.name}' could not be held against the loss. Pick the tensor that the loss is "
                "computed from, as the model returns it."
            )


class _Look:
    def __init__(self, watch: LossWatch, logits: Tensor, mask: Tensor | None) -> None:
        self.watch, self.logits, self.mask = watch, logits, mask

    def __call__(self, gradient: Tensor) -> None:
        self.watch.look(self.logits, gradient.detach(), self.mask)


class _Around:
    """What the model returned, and the gradients that come to it."""

    def __init__(self, logits: Tensor, mask: Tensor | None, output: Any) -> None:
        self.logits, self.mask = logits.detach(), mask
        leaves, self.structure = tree_flatten(output)
        self.leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.arrived: dict[int, Tensor] = {}
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad and leaf is not logits:
                leaf.register_hook(_Arrived(self.arrived, number))

    def gradient(self, outputs: Callable[[Any], Any]) -> Tensor | None:
        """The gradient in what ``outputs`` picks, up to a factor; None where it is no linear map or nothing came."""
        size = math.hypot(*(float(gradient.norm()) for gradient in self.arrived.values()))
        if not size > 0.0:
            return None
        scale = math.hypot(*(float(self.leaves[number].norm()) for number in self.arrived)) / size
        try:
            gradient, moved = self._picked(outputs, 0.0, 1.0), self._picked(outputs, 1.0, scale)
        except Exception:  # the user's function, on values that it was not made for
            return None
        if gradient.shape != self.logits.shape or moved.shape != self.logits.shape:
            return None
        error = (moved - self.logits - scale * gradient).norm()
        return gradient if bool(error <= LINEAR * (self.logits.norm() + scale * gradient.norm())) else None

    @torch.no_grad()
    def _picked(self, outputs: Callable[[Any], Any], of_values: float, of_gradients: float) -> Tensor:
        """What is picked of a mixture of the values and their gradients."""
        mixed = [
            of_values * leaf + of_gradients * self.arrived.get(number, torch.zeros_like(leaf))
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            else leaf
            for number, leaf in enumerate(self.leaves)
        ]
        return pick_logits(tree_unflatten(mixed, self.structure), outputs)[0]


class _Arrived:
    def __init__(self, arrived: dict[int, Tensor], number: int) -> None:
        self.arrived, self.number = arrived, number

    def __call__(self, gradient: Tensor) -> None:
        before = self.arrived.get(self.number)
        self.arrived[self.number] = gradient.detach() if before is None else before + gradient.detach()
