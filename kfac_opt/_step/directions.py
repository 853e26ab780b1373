"""Preconditioned directions of a parameter group."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kfac_opt._curvature.block import CurvatureBlock
from kfac_opt._step.model_blocks import ModelBlocks
from kfac_opt._step.safety import replace_unsafe_
from kfac_opt._step.tracking import TrackedBlock
from kfac_opt._step.update import Directions
from kfac_opt.layers import MatrixLayout

Gradients = Mapping[int, Tensor]
"""What is preconditioned, by the id of the parameter; parameters without a gradient have no entry."""


class Preconditioner:
    """Applies the curvature of each block to its part of the gradient."""

    def __init__(self, blocks: ModelBlocks) -> None:
        self.blocks = blocks
        self.replaced: int | Tensor = 0  # directions that were not finite, since construction

    def directions(self, number: int, gradients: Gradients) -> Directions:
        """Of the group with this number, in the dtypes of the blocks, with what an update rule needs to know."""
        found = Directions()
        covered: set[int] = set()
        for entry in self.blocks.tracked.values():
            if entry.group == number:
                covered.update(id(parameter) for parameter in entry.parameters)
                if any(id(parameter) in gradients for parameter in entry.parameters):
                    self._add_block(entry, gradients, found)
        group = self.blocks.groups[number]
        for parameter in group["params"]:
            gradient = gradients.get(id(parameter))
            if gradient is not None and id(parameter) not in covered:
                if group["curvature"] != "identity":
                    if gradient is parameter.grad:
                        gradient = gradient.clone()  # directions are scaled in place, the user's gradients are not
                    nothing = gradient.new_zeros(())
                    found.add_block(nothing, MatrixLayout("flat", tuple(parameter.shape)), nothing)
                found.add(parameter, gradient, gradient, found.num_blocks - 1)
        self.replaced = self.replaced + replace_unsafe_(found)
        return found

    def _add_block(self, entry: TrackedBlock, gradients: Gradients, found: Directions) -> None:
        block, layout = entry.block, entry.block.layout
        filled = [gradients[id(p)] if id(p) in gradients else torch.zeros_like(p) for p in entry.parameters]
        matrix = layout.to_matrix(filled[0], filled[1] if len(filled) > 1 else None).to(block.dtype)
        state = self.blocks.state_of(entry)
        if state is not None and block.ready(state):
            direction = block.precondition(state, matrix, self.blocks.damping_of(entry))
        else:
            direction = matrix.clone()  # the plain gradient; the trust region bounds it
        product = torch.linalg.vecdot(matrix.flatten(), direction.flatten())
        scale = product.new_zeros(()) if state is None else state["scale_max"]
        found.add_block(product, layout, scale, table=_is_table(block))
        for parameter, part in zip(entry.parameters, layout.from_matrix(direction)):
            if id(parameter) in gradients and part is not None:
                found.add(parameter, part, gradients[id(parameter)], found.num_blocks - 1)


def _is_table(block: CurvatureBlock) -> bool:
    return block.adapter is not None and block.adapter.diagonal_input
