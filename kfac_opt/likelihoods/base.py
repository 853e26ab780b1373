"""What every likelihood offers, and what those with independent outputs share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Likelihood(ABC):
    """Distribution of a target given the model's outputs. Stateless; all arguments are tensors."""

    name: str

    @abstractmethod
    def check(self, outputs: Tensor) -> None:
        """Raises TypeError or ValueError, with the remedy, if ``outputs`` cannot be this likelihood's parameters."""

    def admits(self, outputs: Tensor, mask: Tensor | None = None) -> bool:
        """Whether every term that counts has a distribution: no value that is not finite, unless it has a meaning."""
        return bool(torch.isfinite(outputs.detach()).all())

    @abstractmethod
    def term_mask(self, outputs: Tensor, mask: Tensor | None) -> Tensor | None:
        """Checks ``mask`` and returns it broadcastable against ``outputs`` (bool, True counts), or None."""

    @abstractmethod
    def num_terms(self, outputs: Tensor, mask: Tensor | None = None) -> int:
        """``N``, the number of terms in the mean of the loss."""

    @abstractmethod
    def sample_gradients(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Gradient of every term's ``-log p(y)`` for one label ``y`` drawn from the model; the shape of ``outputs``."""

    @abstractmethod
    def root_columns(self, outputs: Tensor) -> int:
        """Number ``K`` of columns of the root of a term's output Hessian."""

    @abstractmethod
    def root_column(self, outputs: Tensor, column: int) -> Tensor:
        """Column ``column`` of the root of every term's output Hessian; the shape of ``outputs``."""

    @abstractmethod
    def term_signs(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """One independent random sign per loss term, broadcastable against ``outputs``."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss this Fisher belongs to: ``-log p`` without constants, summed over outputs, mean over terms."""

    @abstractmethod
    def predictive(self, outputs: Tensor) -> Tensor:
        """Mean of the target under the model: probabilities, or the outputs themselves for a Gaussian."""

    @abstractmethod
    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Labels drawn from the model: class indices without the class dimension, else the shape of ``outputs``."""

    @abstractmethod
    def label_gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of every term's ``-log p(targets)`` in the outputs; the shape of ``outputs``."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Constructor arguments and ``name``: plain values that ``make_likelihood`` reads back."""

    def gradient_scale(self, outputs: Tensor, gradients: Tensor) -> float | None:
        """The factor ``c`` by which the user's output gradients differ from ``label_gradients``, if it can be read off.

        None when the gradients are not those of this likelihood with hard labels (label smoothing, class weights,
        another loss), or when nothing can be read off (a Gaussian's residual has no known size).
        """
        return None

    def contradiction(self, outputs: Tensor, gradients: Tensor) -> str | None:
        """What about the loss's output gradients cannot come from this likelihood, in words, or None."""
        return None

    def remedy(self, outputs: Tensor, gradients: Tensor) -> str:
        """What to choose instead where :meth:`contradiction` found something, as a sentence without its full stop."""
        return "Choose likelihood='categorical', 'bernoulli' or 'gaussian' to match"

    def silent_terms(self, outputs: Tensor, gradients: Tensor) -> tuple[int, int]:
        """Number of terms whose gradient is exactly zero although their label is in doubt, and number of all terms.

        Only a loss that leaves a term out does that. ``(0, 0)`` where it cannot be told.
        """
        return 0, 0

    def _check_floating(self, outputs: Tensor) -> None:
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"{self.name} likelihood: the model returned {type(outputs).__name__}, expected a tensor of logits. "
                "Pass outputs=lambda output: ... to pick the logits from what the model returns."
            )
        if not outputs.dtype.is_floating_point:
            raise TypeError(
                f"{self.name} likelihood: the model's output has dtype {outputs.dtype}, expected floating point logits. "
                "Return the logits, not the predicted classes, or pick them with outputs=."
            )


class PerExample(Likelihood):
    """What Bernoulli and Gaussian share: outputs are independent, the terms are the examples."""

    def check(self, outputs: Tensor) -> None:
        self._check_floating(outputs)
        if outputs.dim() < 1:
            raise ValueError(
                f"{self.name} likelihood: the model's output is a scalar, expected [batch] or [batch, outputs]. "
                "Return one output per example; the loss is taken outside the model."
            )

    def term_mask(self, outputs: Tensor, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        if mask.dtype != torch.bool or list(mask.shape) != list(outputs.shape[: mask.dim()]):
            raise ValueError(
                f"mask: got {mask.dtype} of shape {list(mask.shape)}, expected torch.bool of shape "
                f"{list(outputs.shape)} or a prefix of it, True for the outputs that count in the loss."
            )
        return mask.reshape(*mask.shape, *([1] * (outputs.dim() - mask.dim())))

    def num_terms(self, outputs: Tensor, mask: Tensor | None = None) -> int:
        if mask is not None:
            return int(mask.flatten(1).any(1).sum()) if mask.dim() > 1 else int(mask.sum())
        return outputs.shape[0]

    def root_columns(self, outputs: Tensor) -> int:
        return max(outputs[0].numel(), 1) if outputs.shape[0] else 0

    def root_column(self, outputs: Tensor, column: int) -> Tensor:
        # Not zeros_like: it keeps the strides of channels-last outputs, and reshape would then write into a copy.
        root = torch.zeros(outputs.shape, dtype=outputs.dtype, device=outputs.device)
        root.reshape(outputs.shape[0], -1)[:, column] = self._deviation(outputs).reshape(outputs.shape[0], -1)[:, column]
        return root

    def term_signs(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return random_signs([outputs.shape[0], *([1] * (outputs.dim() - 1))], outputs, generator)

    @abstractmethod
    def _deviation(self, outputs: Tensor) -> Tensor:
        """Square root of the diagonal of the output Hessian, the shape of ``outputs``."""

    def sample_gradients(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.label_gradients(outputs.detach(), self.sample(outputs, generator))


def widened(outputs: Tensor) -> Tensor:
    """At least single precision: probabilities of half precision logits round badly."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def random_signs(shape: list[int], outputs: Tensor, generator: torch.Generator | None) -> Tensor:
    """``±1`` with equal probability, ``shape``, in the dtype and on the device of the outputs."""
    bits = torch.randint(0, 2, shape, generator=generator, device=outputs.device)
    return (2 * bits - 1).to(outputs.dtype)
