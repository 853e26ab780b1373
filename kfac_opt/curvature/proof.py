"""Whether a module with a forward of its own is still the linear map that its adapter takes it for.

Libraries derive layers from torch's and change what they compute: normalized weights, padding, an activation inside the
norm layer. Their inputs and outputs then do not give the Fisher matrix of the weight, and nothing fails. The gradient of the
weight tells: for the adapter's map it is the sum over rows of output gradient times input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_opt.curvature.block import Call
from kfac_opt.layers import LayerAdapter

TOLERANCE = 1e-2  # relative; another map is wrong by something of the order of one
ROUNDINGS = 16  # of the dtype that gradients were computed in


@torch.no_grad()
def verdicts(
    adapters: Mapping[str, LayerAdapter | None], calls: Mapping[str, Sequence[Call]], found: Sequence[Tensor | None]
) -> dict[str, bool]:
    """For each layer whether it is the map of its adapter; layers of which nothing can be told are left out.

    Args:
        found: gradients of one backward: in the outputs of all calls of the first layer, the second, ..., then in the
            weights.
    """
    told: dict[str, bool] = {}
    position, weight_gradients = 0, found[len(found) - len(adapters) :]
    for (name, adapter), weight_gradient in zip(adapters.items(), weight_gradients):
        arrived = found[position : position + len(calls[name])]
        position += len(calls[name])
        ran = [(call.x, call.output_gradient(g)) for call, g in zip(calls[name], arrived) if g is not None]
        if ran and weight_gradient is not None and adapter is not None:
            verdict = explains_weight_gradient(adapter, ran, weight_gradient)
            if verdict is not None:
                told[name] = verdict
    return told


def explains_weight_gradient(
    adapter: LayerAdapter, calls: Sequence[tuple[Tensor, Tensor]], weight_gradient: Tensor
) -> bool | None:
    """Whether ``Σ g aᵀ`` over the rows of all calls is the weight's gradient; None where gradients cannot tell.

    Args:
        calls: input and output gradient of each call of the module.
        weight_gradient: the shape of the weight, of the same backward pass.
    """
    size = weight_gradient.norm()
    if not bool(torch.isfinite(size)) or not bool(size > 0):
        return None
    dtype = torch.promote_types(weight_gradient.dtype, torch.float32)
    try:
        matrix = sum(adapter.weight_gradient(x, g, dtype) for x, g in calls)
    except (RuntimeError, ValueError, IndexError):
        return False  # its rows do not even have the shapes
    assert isinstance(matrix, Tensor)
    weight, _ = adapter.layout.from_matrix(matrix)
    tolerance = max(TOLERANCE, ROUNDINGS * max(torch.finfo(g.dtype).eps for _, g in calls))
    return bool((weight - weight_gradient.to(dtype)).norm() <= tolerance * size)
