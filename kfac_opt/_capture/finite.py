"""Whether the sums of a pass are finite, with one read of the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kfac_opt._curvature.block import Statistics


def all_finite(parts: Iterable[Statistics]) -> bool:
    """Whether all sums, waiting examples and parts that are not formed yet are finite."""
    parts = list(parts)
    sums = [_probe(name, value) for statistics in parts for name, value in statistics.sums.items()]
    dtype = sums[0].dtype if sums else torch.float32
    sums += [gradient.sum(dtype=dtype) for statistics in parts for _, found, _ in statistics.examples for gradient in found]
    sums += [_square(part.call.x, dtype) for statistics in parts for part in statistics.late]
    if not sums:
        return True
    return bool(torch.isfinite(torch.stack([value.to(sums[0].device) for value in sums])).all())


def _probe(name: str, value: Tensor) -> Tensor:
    """0-dim, finite if ``value`` is: of a sum of outer products the diagonal bounds everything."""
    gram = name in ("input", "output", "moment") and value.dim() == 3
    return value.diagonal(dim1=-2, dim2=-1).sum() if gram else value.sum()


def _square(x: Tensor, dtype: torch.dtype) -> Tensor:
    """0-dim, finite if the second moment of the input ``x`` is; 64 times its trace bounds that of 7 × 7 patches."""
    flat = x.to(dtype).flatten()
    return 64.0 * torch.linalg.vecdot(flat, flat)
