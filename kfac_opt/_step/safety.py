"""Last checks of directions: none that is not finite is handed on, none leaves the range of its parameter's dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_opt._step.update import Directions, block_index, gathered, on_host


def replace_unsafe_(found: Directions) -> int | Tensor:
    """Puts the plain gradient where a block's direction is not finite; the trust region and the bound then shorten it.

    The product ``<V, d>`` that the trust region needs tells, for it is finite only if the whole direction is. A gradient
    that is not finite itself stays what it is: the user's to see.

    Returns:
        How many blocks were replaced: a number on a CPU, else 0-dim.
    """
    if not found.products:
        return 0
    if on_host(found.products):
        unsafe = [block for block, product in enumerate(gathered(found.products).tolist()) if not math.isfinite(product)]
        return sum(_replace_block_(found, block) for block in unsafe)
    products = gathered(found.products)
    norms = gathered(torch._foreach_norm(found.gradients, 2, products.dtype))
    squares = torch.zeros_like(products).index_add_(0, block_index(found, products.device), norms.square())
    keep = torch.isfinite(products) | ~torch.isfinite(squares)
    for number, block in enumerate(found.blocks):
        direction, gradient = found.directions[number], found.gradients[number]
        found.directions[number] = torch.where(keep[block].to(direction.device), direction, gradient)
    found.products = list(torch.where(keep, products, squares).unbind())
    return (~keep).sum()


def _replace_block_(found: Directions, block: int) -> bool:
    members = [number for number, owner in enumerate(found.blocks) if owner == block]
    gradients = [found.gradients[number].to(found.products[block].dtype) for number in members]
    square = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    if not bool(torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all()):
        return False
    for number, gradient in zip(members, gradients):
        found.directions[number] = gradient.clone()
    found.products[block] = square
    return True


def cast_to_parameters(directions: Sequence[Tensor], parameters: Sequence[Tensor], momentum: float) -> list[Tensor]:
    """Directions in the dtypes of their parameters.

    Half precision ends at 65504: a direction beyond what the momentum can add up is shortened as a whole, so that neither it
    nor the buffer becomes infinite.
    """
    return [_cast(direction, parameter.dtype, momentum) for direction, parameter in zip(directions, parameters)]


def _cast(direction: Tensor, dtype: torch.dtype, momentum: float) -> Tensor:
    if direction.dtype == dtype:
        return direction
    largest = torch.finfo(dtype).max
    if largest < 1e30 and direction.numel():  # float16: bfloat16 has the range of single precision
        limit = 0.5 * (1.0 - momentum) * largest
        direction = direction * (limit / torch.linalg.vector_norm(direction, torch.inf)).clamp_max(1.0)
    return direction.to(dtype)
