"""What can be read off the output gradients of the user's loss: its scale, and whether it is the likelihood's."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_opt.likelihoods.base import widened

UNSURE = 1e-3  # probability mass beside the top label from which a gradient is more than rounding, in single precision


def slack(dtype: torch.dtype) -> float:
    """Rounding that a row of output gradients may carry, relative to the sum of its entries."""
    return 0.1 if dtype in (torch.float16, torch.bfloat16) else 1e-2


def certain_margin(dtype: torch.dtype) -> float:
    """Probability mass beside the top label from which ``p - y``, computed in this dtype, is more than rounding."""
    return max(UNSURE, 32 * torch.finfo(dtype).eps)


def underflow(dtype: torch.dtype) -> float:
    """Size up to which an entry of a gradient in this dtype becomes zero."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps


def in_front_of_log_softmax(outputs: Tensor, gradients: Tensor, dim: int) -> Tensor:
    """Gradients in the logits if the outputs are log-probabilities (a model that ends in ``log_softmax``), else as given.

    A negative log-likelihood has ``-c y`` in log-probabilities where it has ``c (p - y)`` in the logits. The Fisher matrix
    is the same: ``log_softmax`` does not change log-probabilities, and scores sum to zero.
    """
    dtype, outputs = outputs.dtype, widened(outputs.detach())
    if bool((torch.logsumexp(outputs, dim).abs() > slack(dtype)).any()):
        return gradients
    return gradients - outputs.exp() * gradients.sum(dim, keepdim=True)


def fitted_scale(residual: Tensor, gradients: Tensor, dtype: torch.dtype) -> float | None:
    """Least-squares ``c`` with ``gradients = c * residual``, None unless it explains them to rounding."""
    square = residual.square().sum()
    if residual.numel() == 0 or not bool(square > 0):
        return None
    scale = (residual * gradients).sum() / square
    error = (gradients - scale * residual).norm()
    if not bool(error <= slack(dtype) * gradients.norm()) or not bool(scale > 0):
        return None
    return float(scale)


def softmax_like(outputs: Tensor, gradients: Tensor) -> str | None:
    """Every row of two or more output gradients sums to zero: only a softmax does that."""
    if outputs.dim() < 2:
        return None
    g = gradients.detach().to(torch.promote_types(gradients.dtype, torch.float32))
    for dim in {1, outputs.dim() - 1}:
        if outputs.shape[dim] < 2:
            continue
        total, size = g.sum(dim).abs().sum(), g.abs().sum()
        if bool(size > 0) and bool(total <= 1e-5 * size):
            return "every row of the loss's output gradient sums to zero, as only that of a cross-entropy does"
    return None
