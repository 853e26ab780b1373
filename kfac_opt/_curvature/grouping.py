"""Which rows of a layer belong to one example: what every sum over examples of a squared sum over rows has to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_opt._curvature.block import Call


def group_rows(calls: Mapping[str, Sequence[Call]], num_examples: int, num_inputs: int | None) -> dict[str, int]:
    """Writes down how many examples each call's rows belong to; returns leading dimensions where that cannot be known.

    A leading dimension that is a multiple of the examples is read batch-major: positions, or windows of attention, flattened
    behind the batch. A loop whose batch shrinks starts with all examples and goes on with the first of them.

    Args:
        num_examples: the leading dimension of the outputs.
        num_inputs: that of the model's input, which a model with its outputs laid out otherwise may go by.
    """
    unknown: dict[str, int] = {}
    for name, of_layer in calls.items():
        for call in of_layer:
            batch = call.positions[0]
            call.examples = num_examples if batch % num_examples == 0 else batch
        if any(call.examples == num_examples for call in of_layer):
            continue
        leading = [call.positions[0] for call in of_layer if not call.laid_out]
        odd = [batch for batch in leading if num_examples % batch and batch != num_inputs]
        if odd:
            unknown[name] = odd[0]
    return unknown


def by_example(rows: Tensor, call: Call, dim: int = 1) -> Tensor:
    """``[..., examples, positions, ...]`` from rows ``[..., batch, shared, ...]`` of a call."""
    return rows if call.flat_batch == 1 else rows.unflatten(dim, (-1, call.flat_batch)).flatten(dim + 1, dim + 2)


def join_calls(parts: Sequence[Tensor], examples: int, positions: int) -> Tensor:
    """The calls of one layer side by side; examples that a call left out, the last ones, are zero there.

    Args:
        examples, positions: dimensions of each part.
    """
    if len(parts) == 1:
        return parts[0]
    largest = max(part.shape[examples] for part in parts)
    padded = [F.pad(part, [0, 0] * (part.dim() - examples - 1) + [0, largest - part.shape[examples]]) for part in parts]
    return torch.cat(padded, dim=positions)


def all_different(tokens: Tensor) -> bool:
    """Whether no row of a table is read twice: then no two rows of the layer meet in one entry of its gradient."""
    return int(tokens.unique().numel()) == tokens.numel()
