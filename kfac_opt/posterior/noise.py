"""Draws from a set of blocks: what the posterior and the optimizer that trains it share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_opt.posterior.block import PosteriorBlock


def correlated_noise(blocks: Sequence[PosteriorBlock], generator: torch.Generator) -> dict[str, Tensor]:
    """Deviations from the means by parameter name, ``Q_G (E ∘ √V) Q_Aᵀ`` for each block.

    ``E`` is cut from one long draw per dtype, in the order of the blocks.
    """
    sizes: dict[torch.dtype, int] = {}
    for block in blocks:
        dtype = block.form.eigenvalues.dtype
        sizes[dtype] = sizes.get(dtype, 0) + block.layout.numel
    draws = {dtype: torch.randn(size, generator=generator, dtype=dtype, device=generator.device) for dtype, size in sizes.items()}
    used = dict.fromkeys(sizes, 0)
    noise: dict[str, Tensor] = {}
    for block in blocks:
        values, size = block.form.eigenvalues, block.layout.numel
        part = draws[values.dtype][used[values.dtype] : used[values.dtype] + size].to(values.device)
        used[values.dtype] += size
        weight, bias = block.layout.from_matrix(block.correlate_(part.view(block.layout.shape)))
        noise[block.weight] = weight
        if block.bias is not None and bias is not None:
            noise[block.bias] = bias
    return noise


def add_noise(mean: Tensor, noise: Tensor) -> Tensor:
    """``mean + noise`` in the wider dtype, returned in that of the mean."""
    return (mean + noise).to(mean.dtype)
