"""Rows and matrices of layers for the reference: ``tests.reference``, and transposed convolutions by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests import reference

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MATRICES = (nn.Linear, nn.Embedding, *CONVOLUTIONS, *TRANSPOSED)
NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """``[positions, groups, in]`` of one example; a transposed convolution's are derivatives of its outputs in its weight."""
    if not isinstance(module, TRANSPOSED):
        return reference.input_rows(module, x)
    weight = module.weight.detach().requires_grad_()
    out = torch.func.functional_call(module, {"weight": weight}, (x[None],))[0].flatten(1)
    per_group = len(out) // module.groups
    rows = []
    for place in range(out.shape[1]):
        found = [torch.autograd.grad(out[g * per_group, place], weight, retain_graph=True)[0] for g in range(module.groups)]
        rows.append(torch.stack([part.unflatten(0, (module.groups, -1))[g, :, 0].flatten() for g, part in enumerate(found)]))
    table = torch.stack(rows)
    trained = module.bias is not None and module.bias.requires_grad
    return torch.cat([table, torch.ones_like(table[..., :1])], dim=-1) if trained else table


def output_rows(module: nn.Module, g: Tensor) -> Tensor:
    """``[positions, groups, out / groups]`` of one example."""
    if not isinstance(module, TRANSPOSED):
        return reference.output_rows(module, g)
    return g.flatten(1).unflatten(0, (module.groups, -1)).permute(2, 0, 1)


def unbatched(module: nn.Module, x: Tensor) -> bool:
    """Whether one call's input has no batch dimension."""
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return x.dim() == len(module.kernel_size) + 1
    return x.dim() == (0 if isinstance(module, nn.Embedding) else 1)


def call_rows(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """``[leading, positions, groups, ·]`` of one call."""
    if unbatched(module, x):
        x, g = x.unsqueeze(0), g.unsqueeze(0)
    return torch.stack([input_rows(module, row) for row in x]), torch.stack([output_rows(module, row) for row in g])


def matrix(module: nn.Module, of: Callable[[nn.Parameter], Tensor]) -> Tensor:
    """``[out_dim, in_dim]`` of ``of(parameter)`` for the trainable weight and bias of ``module``."""
    bias = getattr(module, "bias", None)
    shift = of(bias) if bias is not None and bias.requires_grad else None
    weight = of(module.weight)
    if isinstance(module, TRANSPOSED):
        weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
        columns = [weight.flatten(1)] if shift is None else [weight.flatten(1), shift.unsqueeze(-1)]
        return torch.cat(columns, dim=1)
    return reference.weight_matrix(module, weight, shift)
