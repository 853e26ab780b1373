r"""How far the factors of a layer have moved since its last refresh, without a second copy of them.

Of each factor ``X`` a sketch ``X r`` with fixed random signs ``r`` is kept: ``n`` numbers. As
:math:`E\,\|(X - Y) r\|^2 = \|X - Y\|_F^2` (Hutchinson 1990), sketches tell the relative change in Frobenius norm. What they
miss: a change of directions with little curvature, which the norm hardly sees although the inverse does, and, once in a
while, a change that is nearly orthogonal to the one ``r``.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kfac_opt.curvature.block import State
from kfac_opt.curvature.sides import Side


def sketches(state: State, sides: dict[str, Side], gamma: Tensor) -> dict[str, Tensor]:
    """``X r / w`` of both factors, ``[groups, dim]``, and the damping: what :func:`movement` compares."""
    weight = float(state["weight"])
    found = {}
    for name, side in sides.items():
        factor = state[f"{name}_factor"]
        found[f"{name}_sketch"] = side.times_vector(factor, signs(side.dim, factor.device).to(factor.dtype)) / weight
    return {**found, "sketch_damping": gamma}


def movement(before: State, now: dict[str, Tensor]) -> Tensor:
    """0-dim: the largest relative change of a factor (of a group) or of the damping; infinite where nothing was."""
    changes = []
    for name, value in now.items():
        old = before[name]
        difference, size = (torch.linalg.vector_norm(torch.atleast_1d(part), dim=-1) for part in (value - old, old))
        changes.append(torch.where(difference > 0, difference / size, 0.0).max())
    return torch.stack(changes).max()


@lru_cache(maxsize=64)
def signs(n: int, device: torch.device) -> Tensor:
    """``[n]`` of ±1, the same in every run."""
    generator = torch.Generator().manual_seed(n)
    return (2 * torch.randint(2, (n,), generator=generator) - 1).to(torch.int8).to(device)
