"""Which layers are the linear maps that their adapters say, and their sizes, on a few examples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kfac_opt.fisher.blocks import ParameterBlock
from kfac_opt.fisher.capture import RecordedPass, RowCapture
from kfac_opt.fisher.data import Batch
from kfac_opt.fisher.frozen import FrozenModel


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one block seen as a linear map; ``shared`` is 0 for a block without an adapter."""

    groups: int
    shared: int
    in_dim: int
    out_dim: int


def audited_blocks(
    model: FrozenModel, blocks: tuple[ParameterBlock, ...], batch: Batch, seed: int = 0
) -> tuple[ParameterBlock, ...]:
    """The model's ``blocks``; those whose layer is not the linear map that its adapter says lose the adapter.

    A weight used elsewhere too, positions in front of the examples, examples folded into positions, a layer that
    never ran: all of them change the gradient of a randomly weighted sum of the examples' outputs, which the rows
    of a trusted layer must reproduce.
    """
    linear = tuple(block for block in blocks if block.adapter is not None)
    if not linear:
        return blocks
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(batch.size, generator=generator, dtype=torch.float64)
    with torch.enable_grad():
        logits, _ = model.forward(batch)
        parameters = [model.parameters[name] for block in linear for name in block.parameters]
        cotangent = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits)
        scaled = cotangent * weights.to(cotangent).reshape(-1, *([1] * (logits.dim() - 1)))
        gradients = model.graph(logits, parameters).gradients(scaled)
    expected = {
        name: torch.zeros_like(p) if g is None else g
        for name, p, g in zip([n for block in linear for n in block.parameters], parameters, gradients)
    }
    usable = _shapes_fit(model, linear, batch)
    capture = RowCapture(model, tuple(block for block in linear if block.name in usable), 1 << 28)
    stores = next(capture.stores(batch, lambda _, __: [cotangent], lambda _: False)) if usable else {}
    trusted = set()
    for block in linear:
        if block.name not in stores:
            continue
        found = stores[block.name].expand(weights.to(model.device, model.row_dtype).reshape(-1, 1, 1)).squeeze(1)
        truth = torch.cat([expected[name].flatten() for name in block.parameters]).to(found.dtype)
        rounding = torch.finfo(model.dtype).eps ** 0.5
        if float((found - truth).norm()) <= rounding * max(float(truth.norm()), 1e-30):
            trusted.add(block.name)
    return tuple(block if block.name in trusted else replace(block, adapter=None) for block in blocks)


def _shapes_fit(model: FrozenModel, blocks: tuple[ParameterBlock, ...], batch: Batch) -> set[str]:
    """Names of the layers that ran and whose rows are grouped by the batch's examples."""
    calls = RecordedPass.of(model, blocks, batch).calls
    return {name for name, own in calls.items() if {call.rows().shape[1] for call in own} == {batch.size}}


def measured_shapes(model: FrozenModel, blocks: tuple[ParameterBlock, ...], batch: Batch) -> dict[str, BlockShape]:
    """Sizes of the blocks on this data; positions of all calls of a layer are added."""
    shapes = {block.name: BlockShape(1, 0, 1, block.size) for block in blocks}
    linear = {block.name: block.adapter for block in blocks if block.adapter is not None}
    calls = RecordedPass.of(model, [block for block in blocks if block.name in linear], batch).calls
    for name, adapter in linear.items():
        groups, out_dim, in_dim = adapter.layout.shape
        shapes[name] = BlockShape(groups, sum(call.rows().shape[2] for call in calls[name]), in_dim, out_dim)
    return shapes
