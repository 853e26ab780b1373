"""Whether a layer is the linear map of its weight that its adapter takes it for, and its only use.

Libraries derive layers from torch's and change what they compute: normalized weights, padding, an activation inside the
norm layer. Models use a weight beside its module: as a head (``F.linear(h, embedding.weight)``), sliced, in a derivative
that is part of the forward. The inputs and outputs of the module then do not give the Fisher matrix of the weight, and
nothing fails. The gradient of the weight tells: for the adapter's map, and nothing else, it is the sum over rows of output
gradient times input, and that of the bias the sum of the output gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_opt.layers import LayerAdapter

TOLERANCE = 1e-2  # relative: up to there the block is right to a hundredth, another map is wrong by something of the order of one
ROUNDINGS = 16  # of the dtype that gradients were computed in
TF32 = 2.0**-10  # how convolutions on GPUs round single precision


class Evidence:
    r"""Sums over the rows of one backward pass: :math:`\sum g a^\top`, and how far rounding may take it from the truth.

    The products are off by the rounding of their factors, independently, their sum by
    :math:`\varepsilon \sqrt{\sum_r |g_r|^2 |a_r|^2}`; adding ``R`` of them up rounds at most :math:`\sqrt R` times as much,
    in the precision of sums. Where the terms cancel, as behind an instance norm, the gradient is nothing else.
    """

    def __init__(self, adapter: LayerAdapter) -> None:
        self.adapter = adapter
        self.matrix: Tensor | None = None
        self.spread: Tensor | float = 0.0  # the sum under the root
        self.bias_spread: Tensor | float = 0.0
        self.eps = self.sum_eps = 0.0
        self.rows = 0
        self.unusable = False
        self.shapes_fit = True

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """One call: its input and output gradient."""
        floating = [part.dtype for part in (x, gradient) if part.is_floating_point()]
        eps = max(torch.finfo(dtype).eps for dtype in floating)
        if gradient.device.type == "cuda" and gradient.dtype == torch.float32:
            eps = max(eps, TF32)
        self.eps = max(self.eps, eps)
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        try:
            matrix = self.adapter.weight_gradient(x, gradient, dtype)
            spread = self.adapter.gradient_spread(x, gradient, dtype)
        except (RuntimeError, ValueError, IndexError):
            self.shapes_fit = False  # its rows do not even have the shapes
            return
        self.matrix = matrix if self.matrix is None else self.matrix + matrix
        self.sum_eps = max(self.sum_eps, torch.finfo(dtype).eps)
        self.rows += gradient.numel() // (matrix.shape[0] * matrix.shape[1])
        self.spread = self.spread + spread
        self.bias_spread = self.bias_spread + gradient.to(dtype).square().sum()

    def compare(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """0-dim ``error, size, tolerance, noise`` for the weight and, with a second gradient, for the bias.

        Args:
            gradients: of the layer's weight and bias, of the same backward pass; None for one that it did not reach.
        """
        found: list[Tensor] = []
        matrix = self.matrix  # None: no call of the module reached the outputs, so that nothing is its gradient
        parts = gradients if matrix is None else self.adapter.layout.from_matrix(matrix)
        for part, gradient, spread in zip(parts, gradients, (self.spread, self.bias_spread)):
            if part is None or gradient is None:
                continue
            truth = gradient.to_dense() if gradient.is_sparse else gradient
            part = torch.zeros_like(truth) if matrix is None else part
            truth = truth.to(part.dtype)
            roundings = ROUNDINGS * self.eps + self.rows**0.5 * self.sum_eps
            noise = roundings * torch.as_tensor(spread, dtype=part.dtype, device=part.device).sqrt()
            size = torch.maximum(truth.norm(), part.norm())
            relative = max(TOLERANCE, ROUNDINGS * self.eps)
            found += [(part - truth).norm(), size, torch.maximum(relative * truth.norm(), noise), noise]
        return found


@torch.no_grad()
def verdicts(evidence: Mapping[str, Evidence], gradients: Mapping[str, Sequence[Tensor | None]]) -> dict[str, bool]:
    """For each layer whether it is the map of its adapter and its weight's only use; layers that cannot be told are left out.

    Args:
        evidence: of one backward pass.
        gradients: of the layer's weight and bias, of the same pass; a weight that the pass did not reach tells nothing.
    """
    told: dict[str, bool] = {}
    numbers: list[Tensor] = []
    owners: list[tuple[str, int]] = []
    for name, seen in evidence.items():
        found = gradients[name]
        if seen.unusable or found[0] is None:
            continue
        if not seen.shapes_fit:
            told[name] = False
        else:
            part = seen.compare(found)
            numbers += part
            owners += [(name, number) for number in range(len(part) // 4)]
    for (name, number), (error, size, tolerance, noise) in zip(owners, _read(numbers)):
        if not error < float("inf") or not size > noise:
            continue
        if error > tolerance:
            told[name] = False
        elif number == 0:  # a bias alone does not prove the weight
            told[name] = True
    return told


def _read(numbers: Sequence[Tensor]) -> list[list[float]]:
    """Groups of four, with one read of the device."""
    if not numbers:
        return []
    stacked = torch.stack([number.to(numbers[0].device, torch.float64) for number in numbers])
    return stacked.reshape(-1, 4).tolist()
