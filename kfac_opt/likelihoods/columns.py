"""The output gradients whose outer products make the Fisher matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from kfac_opt.likelihoods.base import Likelihood


def output_gradients(
    likelihood: Likelihood,
    outputs: Tensor,
    *,
    kind: Literal["mc", "exact"],
    num_labels: int,
    mask: Tensor | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Output gradients whose summed outer products estimate (``mc``) or are (``exact``) the output Hessians.

    Yields ``num_labels`` draws, each scaled by ``num_labels ** -0.5``, or the ``K`` root columns, each term with
    a random sign of its own: where a layer's rows mix several terms the cross products then cancel in
    expectation, and where they do not the outer products do not see the sign. Masked terms are zero.
    """
    outputs = outputs.detach()
    keep = likelihood.term_mask(outputs, mask)
    if keep is not None:
        outputs = torch.where(keep, outputs, 0.0)  # a masked term may have no distribution at all
    for index in range(num_labels if kind == "mc" else likelihood.root_columns(outputs)):
        if kind == "mc":
            gradients = likelihood.sample_gradients(outputs, generator)
            gradients = gradients if num_labels == 1 else gradients * num_labels**-0.5
        else:
            gradients = likelihood.root_column(outputs, index) * likelihood.term_signs(outputs, generator)
        yield gradients if keep is None else torch.where(keep, gradients, 0.0)
