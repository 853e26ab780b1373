"""From directions to new parameters: KL clip, momentum, the bound on each layer's step, decay.

Everything works on lists of tensors and reads no value back to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

RELATIVE_FLOOR = 0.1  # of the square root of out_dim: a fifth of the norm of a default initialization


@dataclass
class Directions:
    """Preconditioned directions of one parameter group.

    Attributes:
        parameters, directions, blocks: aligned; ``blocks`` numbers the block each parameter belongs to.
        products: ``<V, d>`` of each block.
        out_dims: output size of each block.
    """

    parameters: list[Tensor] = field(default_factory=list)
    directions: list[Tensor] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    products: list[Tensor] = field(default_factory=list)
    out_dims: list[int] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        return len(self.products)

    def add_block(self, product: Tensor, out_dim: int) -> None:
        self.products.append(product)
        self.out_dims.append(out_dim)

    def add(self, parameter: Tensor, direction: Tensor, block: int) -> None:
        self.parameters.append(parameter)
        self.directions.append(direction)
        self.blocks.append(block)

    def inner(self) -> Tensor:
        """``Σ <V_l, d_l>``, 0-dim."""
        return torch.stack(_gathered(self.products)).sum()


def _gathered(scalars: Sequence[Tensor]) -> list[Tensor]:
    """0-dim tensors on one device and in one dtype, single precision or better."""
    kinds = {(scalar.dtype, scalar.device) for scalar in scalars}
    if len(kinds) == 1 and scalars[0].dtype in (torch.float32, torch.float64):
        return list(scalars)
    dtype = torch.float64 if any(scalar.dtype == torch.float64 for scalar in scalars) else torch.float32
    return [scalar.to(scalars[0].device, dtype) for scalar in scalars]


def kl_clip_factor(inner: Tensor, lr: float, kl_clip: float) -> Tensor:
    r"""``min(1, sqrt(kl_clip / (lr² Σ <V, d>)))``, 0-dim (Osawa et al. 2019; ROBUST recipe 2).

    Args:
        inner: ``Σ <V_l, d_l>`` over the blocks of a group. Nothing to clip where it is not positive.
    """
    size = (inner * (lr * lr)).clamp_min(torch.finfo(inner.dtype).tiny)
    return (kl_clip / size).sqrt().clamp_max(1.0)


def multiply_(tensors: list[Tensor], factor: Tensor, *, foreach: bool) -> None:
    """Multiplies every tensor by one 0-dim factor, in place."""
    if factor.device.type == "cpu" and float(factor) == 1.0:
        return  # a device must not be waited for: there the product by one is taken
    if foreach and all(tensor.dtype == factor.dtype and tensor.device == factor.device for tensor in tensors):
        torch._foreach_mul_(tensors, factor)
        return
    for tensor in tensors:
        tensor.mul_(factor.to(tensor.device, tensor.dtype))


def momentum_(
    directions: list[Tensor], buffers: list[Tensor], momentum: float, *, nesterov: bool, foreach: bool, reuse: bool
) -> list[Tensor]:
    """``buf ← momentum · buf + d``; returns ``buf``, or with Nesterov ``d + momentum · buf``, as torch's SGD does.

    ``reuse``: the result of Nesterov's rule takes the place of the directions.
    """
    if not directions:
        return []
    if foreach:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, directions)
        if nesterov and reuse:
            torch._foreach_add_(directions, buffers, alpha=momentum)
            return directions
        if nesterov:
            return list(torch._foreach_add(directions, buffers, alpha=momentum))
        return [buffer.clone() for buffer in buffers]  # the bound shortens updates, not the buffer
    updates = []
    for direction, buffer in zip(directions, buffers):
        buffer.mul_(momentum).add_(direction)
        updates.append(direction.add(buffer, alpha=momentum) if nesterov else buffer.clone())
    return updates


def bound_updates_(updates: list[Tensor], found: Directions, lr: float, max_relative_update: float) -> None:
    """Shortens each block's update so that ``‖lr · u‖ ≤ max_relative_update · max(‖W‖, floor)``, in place.

    The floor is ``0.1 · sqrt(out_dim)``, so that layers that start at zero can move.
    """
    if not updates or lr == 0.0:
        return
    on_host = updates[0].device.type == "cpu"  # where looking at a number is free, what changes nothing is left out
    lengths = lr * _block_norms(updates, found)
    floor = RELATIVE_FLOOR * _on_device(tuple(found.out_dims), lengths.dtype, lengths.device).sqrt()
    if on_host and bool((lengths <= max_relative_update * floor).all()):
        return
    allowed = max_relative_update * torch.maximum(_block_norms(found.parameters, found), floor)
    factors = (allowed / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)).clamp_max(1.0)
    if on_host:
        numbers = factors.tolist()
        for update, block in zip(updates, found.blocks):
            if numbers[block] != 1.0:
                update.mul_(factors[block].to(update.dtype))
        return
    for update, factor in zip(updates, factors[_block_index(found, factors.device)].unbind()):
        update.mul_(factor.to(update.device, update.dtype))


def _block_norms(tensors: list[Tensor], found: Directions) -> Tensor:
    """Norm of each block's tensors together, ``[blocks]``, NaN where there is one."""
    squares = torch.stack(_gathered(torch._foreach_norm(tensors))).square_()
    return squares.new_zeros(found.num_blocks).index_add_(0, _block_index(found, squares.device), squares).sqrt_()


def _block_index(found: Directions, device: torch.device) -> Tensor:
    return _on_device(tuple(found.blocks), torch.int64, device)


@lru_cache(maxsize=256)
def _on_device(numbers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a tensor, copied to the device once: a copy from the host waits for the device."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def apply_(parameters: list[Tensor], updates: list[Tensor], lr: float, decay: float, *, foreach: bool) -> None:
    """``p ← (1 − decay) p − lr u``; ``decay`` is per step (``lr · weight_decay`` for AdamW's rule)."""
    if not parameters:
        return
    if foreach:
        if decay:
            torch._foreach_mul_(parameters, 1.0 - decay)
        torch._foreach_add_(parameters, updates, alpha=-lr)
        return
    for parameter, update in zip(parameters, updates):
        if decay:
            parameter.mul_(1.0 - decay)
        parameter.add_(update, alpha=-lr)
