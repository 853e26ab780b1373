r"""Updates of a size that depends on the learning rate and the weights alone, whatever the scale of loss and gradient.

Everything works on lists of tensors and reads no value back from a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_opt._step.update import RELATIVE_FLOOR, Directions, block_index, gathered, on_device, on_host
from kfac_opt.layers import MatrixLayout

AVERAGE, WEIGHT, LOG_PACE = range(3)  # of what a parameter keeps
PACE_DTYPE = torch.float64


@dataclass(frozen=True)
class StepSettings:
    """The settings of one group's step."""

    lr: float
    momentum: float
    max_relative_update: float | None


@dataclass(frozen=True)
class ScaleFreeRule:
    r"""``update_scale="rms"``: momentum of the gradient, then the curvature, then a step of a given size.

    .. math::
        m \leftarrow \beta m + (1 - \beta) g, \quad d = P(m), \quad
        W \leftarrow W - \ell \, d / \lVert d \rVert, \quad
        \ell = \min(c \cdot \mathrm{lr} \cdot r \sqrt{\mathrm{numel}},\; \mathrm{max\_relative\_update} \cdot \lVert W \rVert)

    for each block (with Nesterov, ``(1 − β) g + β m`` in place of ``m``). ``r`` is the root mean square of the step for
    ``lr = 1``: for weight matrices ``matrix · sqrt(out_dim / (in_dim · max(out_dim, in_dim)))``, which changes a layer's
    output by as much whatever its width (Yang, Simon & Bernstein 2023, arXiv:2310.17813), ``vector`` for norm layers,
    embeddings and parameters of one dimension.

    The pace ``c ≤ 1`` feels the edge of stability. Where a step is too long, successive gradients oscillate, and their
    average is shorter than that of independent noise, by ``ν`` (:func:`averaged_noise`):

    .. math::
        \log c \leftarrow \min\Bigl(0,\; \log c + \eta\, \mathrm{clip}_{[-1, 1]}\Bigl(
        \frac{\lVert m \rVert}{\theta\, \nu\, \overline{\lVert g \rVert}} - 1\Bigr)\Bigr)

    Healthy training was found at 0.6 to 2.5 times ``ν``, at the edge it is 0.23 (a sign that alternates at every step) to
    0.3; ``θ`` lies between, and below 1, for batches drawn without replacement cancel within an epoch. Every quantity is a
    ratio, so that a factor on the loss or on all gradients changes nothing.

    Attributes:
        matrix, vector: sizes.
        threshold, gain: ``θ``, ``η``.
        average_decay: of the average norm of the gradient.
        smallest_pace: of ``c``.
        rounding: how small a gradient without curvature is beside the largest before it is taken for rounding.
    """

    matrix: float = 4.0
    vector: float = 0.3
    threshold: float = 0.35
    gain: float = 0.1
    average_decay: float = 0.9
    smallest_pace: float = 1e-5
    rounding: float = 1e-4

    def init_state(self, device: torch.device) -> Tensor:
        """Of a parameter, ``[3]``: average norm of its gradient, the average's weight, log of its block's pace."""
        return torch.zeros(3, dtype=torch.float32 if device.type == "mps" else PACE_DTYPE, device=device)

    def averaged_(
        self, gradients: list[Tensor], buffers: list[Tensor], momentum: float, *, nesterov: bool, foreach: bool
    ) -> list[Tensor]:
        """Takes the gradients into the buffers; returns what is to be preconditioned, which may be the buffers."""
        if foreach:
            torch._foreach_lerp_(buffers, gradients, 1.0 - momentum)
            return list(torch._foreach_lerp(gradients, buffers, momentum)) if nesterov else buffers
        for buffer, gradient in zip(buffers, gradients):
            buffer.lerp_(gradient, 1.0 - momentum)
        return [g.lerp(b, momentum) for g, b in zip(gradients, buffers)] if nesterov else buffers

    def factors(
        self, found: Directions, gradients: list[Tensor], averages: list[Tensor], states: list[Tensor], step: StepSettings
    ) -> Tensor:
        """What each direction is multiplied by, ``[parameters]``.

        Args:
            gradients, averages: of this step and their momentum (without look-ahead), aligned with the directions.
            states: likewise; take this step's norms and the new pace.
        """
        device = found.parameters[0].device
        norms = _norms([*found.directions, *found.parameters, *gradients, *averages]).unflatten(0, (4, -1))
        index = block_index(found, device)
        kept = torch.stack(states).mT.clone()
        kept[AVERAGE].lerp_(norms[2], 1.0 - self.average_decay)
        kept[WEIGHT].lerp_(torch.ones_like(norms[2]), 1.0 - self.average_decay)
        squares = torch.cat([norms, (kept[AVERAGE] / kept[WEIGHT]).unsqueeze(0)]).square()
        direction, weights, gradient, signal, usual = _by_block(squares, index, found).sqrt()
        first = on_device(tuple(_first_of_blocks(found)), torch.int64, device)
        log_pace = self._paced(kept[LOG_PACE].index_select(0, first), signal, usual, step)
        kept[LOG_PACE] = log_pace.index_select(0, index)
        torch._foreach_copy_(states, list(kept.mT.unbind()))
        length = step.lr * log_pace.exp() * on_device(tuple(self._lengths(found)), norms.dtype, device)
        shares = _active_shares(found, norms.dtype)
        if step.max_relative_update is not None:
            rows = tuple(map(_rows, found.layouts, found.out_dims, found.tables))
            floors = RELATIVE_FLOOR * on_device(rows, norms.dtype, device).sqrt()
            length = torch.minimum(length, step.max_relative_update * torch.maximum(weights, floors))
        moves = (direction > 0) & self._has_gradient(found, gradient)
        return torch.where(moves, length * shares / direction, 0.0).index_select(0, index)

    def _has_gradient(self, found: Directions, gradient: Tensor) -> Tensor:
        """Blocks that may move: ``[blocks]`` of bool.

        One whose gradient is zero stays where it is, although its momentum still points somewhere; so does one without
        curvature whose gradient is as small beside the others' as rounding (a weight that the loss does not depend on).
        """
        curved = gathered(found.scales).to(gradient.device) > 0
        counts = on_device(tuple(self._counts(found)), gradient.dtype, gradient.device)
        rms = gradient / counts.sqrt()
        return (gradient > 0) & (curved | (rms > self.rounding * rms.max()))

    def _paced(self, log_pace: Tensor, signal: Tensor, usual: Tensor, step: StepSettings) -> Tensor:
        """``log c`` after this step, ``[blocks]``."""
        noise = averaged_noise(step.momentum)
        ratio = torch.where(usual > 0, signal / (self.threshold * noise * usual), 1.0)
        return (log_pace + self.gain * (ratio - 1.0).clamp(-1.0, 1.0)).clamp(math.log(self.smallest_pace), 0.0)

    def _lengths(self, found: Directions) -> list[float]:
        """``r sqrt(numel)`` of each block."""
        sizes = [self.size(layout, table=table) for layout, table in zip(found.layouts, found.tables)]
        return [size * math.sqrt(count) for size, count in zip(sizes, self._counts(found))]

    def _counts(self, found: Directions) -> list[int]:
        """Entries of each block; a parameter without a gradient has no part in it."""
        counts = [0] * found.num_blocks
        for parameter, block in zip(found.parameters, found.blocks):
            counts[block] += parameter.numel()
        return counts

    def size(self, layout: MatrixLayout, *, table: bool = False) -> float:
        """``r``."""
        if layout.kind == "norm" or table:
            return self.vector
        _, out_dim, in_dim = layout.shape
        in_dim -= layout.has_bias
        if layout.kind == "flat":  # a parameter of its own is a matrix if it has more than one dimension
            lengths = [length for length in layout.weight_shape if length > 1]
            if len(lengths) < 2:
                return self.vector
            out_dim, in_dim = lengths[0], math.prod(lengths[1:])
        return self.matrix * math.sqrt(out_dim / (in_dim * max(out_dim, in_dim)))


def averaged_noise(momentum: float) -> float:
    """Root mean square of the average ``(1 − β) Σ β^k g_k`` of independent terms of unit variance."""
    return math.sqrt((1.0 - momentum) / (1.0 + momentum))


def move_(found: Directions, factors: Tensor, decay: float, *, foreach: bool) -> None:
    """``p ← (1 − decay) p − f d``."""
    if decay:
        if foreach:
            torch._foreach_mul_(found.parameters, 1.0 - decay)
        else:
            for parameter in found.parameters:
                parameter.mul_(1.0 - decay)
    if on_host(found.parameters):
        for parameter, direction, factor in zip(found.parameters, found.directions, factors.tolist()):
            parameter.add_(direction, alpha=-factor)
        return
    for parameter, direction, factor in zip(found.parameters, found.directions, factors.unbind()):
        parameter.sub_(direction * factor.to(direction.device, direction.dtype))


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """Norms side by side; squares of tiny gradients need the range of double precision."""
    wide = None if tensors[0].device.type == "mps" else PACE_DTYPE
    return gathered(torch._foreach_norm(list(tensors), dtype=wide))


def _rows(layout: MatrixLayout, out_dim: int, table: bool) -> int:
    """What the floor of the bound grows with: every entry of an embedding, which may start small, is an activation."""
    return layout.numel if table else out_dim


def _by_block(squares: Tensor, index: Tensor, found: Directions) -> Tensor:
    return squares.new_zeros(len(squares), found.num_blocks).index_add_(1, index, squares)


def _first_of_blocks(found: Directions) -> list[int]:
    """Position of the first parameter of each block that has one with a gradient."""
    positions = {block: number for number, block in reversed(list(enumerate(found.blocks)))}
    return [positions[block] for block in range(found.num_blocks)]


def _active_shares(found: Directions, dtype: torch.dtype) -> Tensor:
    """Root of the share of an embedding's rows that the direction moves, 1 for all other blocks, ``[blocks]``.

    Rows count by their participation ``(Σ‖d_j‖)² / Σ‖d_j‖²``: tokens that no batch of late held move nothing, and must not
    make the steps of the others longer.
    """
    shares = torch.ones(found.num_blocks, dtype=dtype, device=found.parameters[0].device)
    for direction, block in zip(found.directions, found.blocks):
        if found.tables[block]:
            rows = torch.linalg.vector_norm(direction, dim=-1, dtype=dtype)
            length = torch.linalg.vector_norm(rows).clamp_min(torch.finfo(dtype).tiny)
            shares[block] = rows.sum() / length / math.sqrt(len(rows))
    return shares
