"""From directions to new parameters: KL clip, momentum, the bound on each layer's step, decay.

Everything works on lists of tensors and reads no value back from a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from kfac_opt.layers import MatrixLayout

RELATIVE_FLOOR = 0.1  # of the square root of out_dim: a fifth of the norm of a default initialization


@dataclass
class Directions:
    """Preconditioned directions of one parameter group.

    Attributes:
        parameters, directions, gradients, blocks: aligned; ``blocks`` numbers the block each parameter belongs to,
            ``gradients`` are those that were preconditioned.
        products: ``<V, d>`` of each block.
        out_dims, layouts, scales: output size, shape and largest curvature so far of each block; 0 where none is known.
        tables: whether it is one of rows of which a batch reads some (an embedding).
    """

    parameters: list[Tensor] = field(default_factory=list)
    directions: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    products: list[Tensor] = field(default_factory=list)
    out_dims: list[int] = field(default_factory=list)
    layouts: list[MatrixLayout] = field(default_factory=list)
    tables: list[bool] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        return len(self.products)

    def add_block(self, product: Tensor, layout: MatrixLayout, scale: Tensor, *, table: bool = False) -> None:
        self.products.append(product)
        self.scales.append(scale)
        self.tables.append(table)
        self.out_dims.append(_num_outputs(layout))
        self.layouts.append(layout)

    def add(self, parameter: Tensor, direction: Tensor, gradient: Tensor, block: int) -> None:
        self.parameters.append(parameter)
        self.directions.append(direction)
        self.gradients.append(gradient)
        self.blocks.append(block)


def gathered(scalars: Sequence[Tensor]) -> Tensor:
    """0-dim tensors side by side on one device, in single precision or better."""
    kinds = {(scalar.dtype, scalar.device) for scalar in scalars}
    if len(kinds) > 1 or scalars[0].dtype not in (torch.float32, torch.float64):
        dtype = torch.float64 if any(scalar.dtype == torch.float64 for scalar in scalars) else torch.float32
        scalars = [scalar.to(scalars[0].device, dtype) for scalar in scalars]
    return torch.stack(list(scalars))


def on_host(tensors: Sequence[Tensor]) -> bool:
    """Whether numbers can be looked at without waiting for a device: then they are plain floats.

    A step of a small net is the price of its calls, most of all of the first call of each kind, whose code has left
    the caches since the last step.
    """
    return all(tensor.device.type == "cpu" for tensor in tensors)


def kl_clip_factor(products: Sequence[Tensor], lr: float, kl_clip: float) -> float | Tensor:
    r"""``min(1, sqrt(kl_clip / (lr² Σ <V, d>)))`` (Osawa et al. 2019; ROBUST recipe 2): a float on a CPU, else 0-dim.

    Args:
        products: ``<V_l, d_l>`` of each block of a group. Nothing to clip where their sum is not positive.
    """
    if on_host(products):
        size = lr * lr * sum(gathered(products).tolist())
        if math.isnan(size):
            return math.nan
        return min(1.0, math.sqrt(kl_clip / size)) if size > 0.0 else 1.0
    inner = gathered(products).sum()
    return (kl_clip / (inner * (lr * lr)).clamp_min(torch.finfo(inner.dtype).tiny)).sqrt().clamp_max(1.0)


def multiply_(tensors: list[Tensor], factor: float | Tensor, *, foreach: bool) -> None:
    """Multiplies every tensor by one number, in place."""
    if isinstance(factor, float):
        if factor == 1.0:
            return
        if foreach:
            torch._foreach_mul_(tensors, factor)
            return
        for tensor in tensors:
            tensor.mul_(factor)
        return
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
        if nesterov:
            updates.append(direction.add_(buffer, alpha=momentum) if reuse else direction.add(buffer, alpha=momentum))
        else:
            updates.append(buffer.clone())
    return updates


def bound_updates_(updates: list[Tensor], found: Directions, lr: float, max_relative_update: float) -> list[float] | None:
    """Shortens each block's update so that ``‖lr · u‖ ≤ max_relative_update · max(‖W‖, floor)``.

    The floor is ``0.1 · sqrt(out_dim)``, so that layers that start at zero can move.

    Returns:
        Factors of the updates that :func:`apply_` has to take into account, or None: there are none, or a device has
        multiplied by them already.
    """
    if not updates or lr == 0.0:
        return None
    if on_host(updates):
        return _bounds_on_host(updates, found, lr, max_relative_update)
    device = updates[0].device
    squares = gathered(_norms([*updates, *found.parameters])).square().unflatten(0, (2, len(updates)))
    index = block_index(found, device)
    total = squares.new_zeros(2, found.num_blocks).index_add_(1, index, squares).sqrt()
    floor = RELATIVE_FLOOR * on_device(tuple(found.out_dims), squares.dtype, device).sqrt()
    allowed = max_relative_update * torch.maximum(total[1], floor)
    factors = (allowed / (lr * total[0]).clamp_min(torch.finfo(squares.dtype).tiny)).clamp_max(1.0)
    for update, factor in zip(updates, factors[index].unbind()):
        update.mul_(factor.to(update.device, update.dtype))
    return None


def _bounds_on_host(updates: list[Tensor], found: Directions, lr: float, max_relative_update: float) -> list[float] | None:
    lengths = _block_norms(updates, found)
    floors = [RELATIVE_FLOOR * math.sqrt(out_dim) for out_dim in found.out_dims]
    if all(lr * length <= max_relative_update * floor for length, floor in zip(lengths, floors)):
        return None
    sizes = _block_norms(found.parameters, found)
    allowed = [max_relative_update * max(size, floor) for size, floor in zip(sizes, floors)]
    factors = [1.0 if lr * length <= limit else limit / (lr * length) for length, limit in zip(lengths, allowed)]
    return [factors[block] for block in found.blocks]


def _block_norms(tensors: list[Tensor], found: Directions) -> list[float]:
    """Norm of each block's tensors together."""
    squares = [0.0] * found.num_blocks
    whole = [tensor.contiguous() for tensor in tensors]  # the norm of a slice of rows takes seven times as long
    for block, norm in zip(found.blocks, gathered(_norms(whole)).tolist()):
        squares[block] += norm * norm
    return [math.sqrt(square) for square in squares]


def _norms(tensors: list[Tensor]) -> tuple[Tensor, ...] | list[Tensor]:
    """Norm of each tensor, in single precision or better: that of half precision entries overflows in their dtype."""
    if all(tensor.dtype != torch.float16 for tensor in tensors):
        return torch._foreach_norm(tensors)
    return [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def block_index(found: Directions, device: torch.device) -> Tensor:
    """``found.blocks`` on the device."""
    return on_device(tuple(found.blocks), torch.int64, device)


@lru_cache(maxsize=256)
def on_device(numbers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a tensor, copied to the device once: a copy from the host waits for the device."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def apply_(
    parameters: list[Tensor],
    updates: list[Tensor],
    lr: float,
    decay: float,
    factors: list[float] | None = None,
    *,
    foreach: bool,
) -> None:
    """``p ← (1 − decay) p − lr f u``; ``decay`` is per step (``lr · weight_decay`` for AdamW's rule)."""
    if not parameters:
        return
    if foreach:
        if decay:
            torch._foreach_mul_(parameters, 1.0 - decay)
        if factors is None:
            torch._foreach_add_(parameters, updates, alpha=-lr)
            return
    elif decay:
        for parameter in parameters:
            parameter.mul_(1.0 - decay)
    for parameter, update, factor in zip(parameters, updates, factors or [1.0] * len(updates)):
        parameter.add_(update, alpha=-lr * factor)


def _num_outputs(layout: MatrixLayout) -> int:
    """Output size by which the bound of a step is measured: a parameter without an adapter is laid out as torch does it."""
    if layout.kind != "flat":
        return layout.whole_shape[0]
    return next((size for size in layout.weight_shape if size > 1), 1)
