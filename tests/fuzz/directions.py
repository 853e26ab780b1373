"""Damped inverses, and their powers, of dense blocks by eigenvalues; damping relative to a block's own scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference import unvec, vec


def power_of(block: Tensor, damping: float, power: float) -> Tensor:
    """``(F + γ I)^(-p)`` of symmetric matrices ``[..., n, n]``."""
    values, basis = torch.linalg.eigh(block)
    return basis @ torch.diag_embed((values.clamp_min(0.0) + damping) ** -power) @ basis.mT


def exact(input_factor: Tensor, output_factor: Tensor, damping: float, power: float, gradient: Tensor) -> Tensor:
    """``(A ⊗ G + γ I)^(-p) vec V``."""
    whole = power_of(torch.kron(input_factor, output_factor), damping, power)
    return unvec(whole @ vec(gradient), len(output_factor))


def split(input_factor: Tensor, output_factor: Tensor, damping: float, power: float, gradient: Tensor) -> Tensor:
    """``(G + √γ/π)^(-p) V (A + π√γ)^(-p)``; a side without any curvature leaves ``V / γ^p``."""
    means = [float(factor.diagonal().mean()) for factor in (input_factor, output_factor)]
    if min(means) <= 0.0:
        return gradient / damping**power
    pi = math.sqrt(means[0] / means[1])
    left = power_of(output_factor, math.sqrt(damping) / pi, power)
    return left @ gradient @ power_of(input_factor, pi * math.sqrt(damping), power)


def matrix_scale(input_factors: Tensor, output_factors: Tensor) -> float:
    """``τ = (tr A/dim A)(tr G/dim G) sqrt(dim A dim G)``, the mean over groups."""
    means = [factors.diagonal(dim1=-2, dim2=-1).mean(-1) for factors in (input_factors, output_factors)]
    return float((means[0] * means[1]).mean()) * math.sqrt(input_factors.shape[-1] * output_factors.shape[-1])


def damping_in_force(damping: float, scale: str, tau: float, seen: Sequence[float] = ()) -> float:
    """``γ``, or ``γ · max(τ, 0.1 max_t τ)``; 1 for a block that has not had any curvature yet."""
    largest = max([tau, *seen])
    if scale == "absolute":
        return damping
    return damping * max(tau, 0.1 * largest) if largest > 0 else 1.0
