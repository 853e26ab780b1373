"""Holds the loss of the first passes against the likelihood: a wrong one gives a wrong Fisher matrix and no error."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from kfac_opt.likelihoods import Likelihood

WATCHED_PASSES = 3


class LossWatch:
    """Looks at the loss's gradient in the logits of the first passes, and warns once where the likelihood contradicts it."""

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self.left = WATCHED_PASSES
        self.said = False

    def attach(self, logits: Tensor) -> None:
        """Watches the backward of this pass, while there are passes to watch."""
        if self.left > 0:
            self.left -= 1
            logits.register_hook(_Look(self, logits.detach()))

    def look(self, logits: Tensor, gradient: Tensor) -> None:
        """Warns when the gradient cannot come from the likelihood."""
        if self.said or not bool(torch.isfinite(gradient).all()):
            return
        reason = self.likelihood.contradiction(logits, gradient)
        if reason is not None:
            self.said, self.left = True, 0
            warnings.warn(
                f"the likelihood '{self.likelihood.name}' does not fit the loss: {reason}. The Fisher matrix is that of "
                "the likelihood, not of the loss. Choose likelihood='categorical', 'bernoulli' or 'gaussian' to match "
                "(or ignore this if an auxiliary term was added to the loss on purpose).",
                stacklevel=3,
            )


class _Look:
    def __init__(self, watch: LossWatch, logits: Tensor) -> None:
        self.watch, self.logits = watch, logits

    def __call__(self, gradient: Tensor) -> None:
        self.watch.look(self.logits, gradient.detach())
