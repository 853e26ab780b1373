r"""Second moments of convolution patches without the patches.

For stride 1 the moment of the taps at offsets :math:`o_a` and :math:`o_b` is a sum over image positions,
:math:`M_{ab} = \sum_q x_q x_{q + o_b - o_a}^\top` over those ``q`` whose patch centre ``q − o_a`` lies in the image. Up
to that condition it depends on the displacement :math:`o_b - o_a` alone: a 3 × 3 kernel has 13 displacements up to
transposition instead of 45 pairs of taps. The condition takes away thin strips along the border, which are
moments of the same kind of smaller images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_opt._kernels.products import outer_gram, times_transposed

PRODUCT_CHANNELS = 200  # from here on one product per displacement, below one weight-gradient call for all


def patch_moment(x: Tensor, kernel: tuple[int, int], dilation: tuple[int, int], groups: int, *, with_one: bool) -> Tensor:
    """Sum of outer products of the zero-padded patches around every pixel, features in the order of a weight.

    Args:
        x: ``[batch, channels, height, width]``.
        kernel: 1 or 3 in each direction.
        dilation: distance of the taps, also the width of the zeros around the image.
        with_one: a last feature that is 1.

    Returns:
        ``[groups, n, n]``, ``n = channels / groups · kernel[0] · kernel[1] (+ 1)``.
    """
    blocks = PatchBlocks(x, kernel, dilation, groups)
    size = blocks.size
    moment = x.new_empty(groups, size + with_one, size + with_one)
    blocks.write_rows_(moment[:, :size, :size], 0, blocks.channels)
    if with_one:
        sums = _patch_sums(x, kernel, dilation).reshape(groups, size)
        moment[:, :size, size] = sums
        moment[:, size, :size] = sums
        moment[:, size, size] = x.shape[0] * x.shape[2] * x.shape[3]
    return moment


class PatchBlocks:
    """The moment of all pairs of taps, ``[groups, channels, channels]`` each, to be read by rows of features.

    The features of a weight run over the taps of a channel before the next channel: every row of the moment takes a
    little from every pair, and the matrix as a whole is strewn over memory as it is written. In slices of rows that
    fit the cache it costs half of the time.

    Args:
        x, kernel, dilation, groups: as for :func:`patch_moment`.
    """

    def __init__(self, x: Tensor, kernel: tuple[int, int], dilation: tuple[int, int], groups: int) -> None:
        self.channels, self.taps = x.shape[1] // groups, kernel[0] * kernel[1]
        self.size = self.channels * self.taps
        self.pairs: dict[tuple[int, int], Tensor] = {}
        inner = displacement_moments(x, kernel, dilation, groups)
        rows = {side: _strip(x, 2, 1 - side, dilation[0]) for side in _sides(kernel[0])}
        columns = {side: _strip(x, 3, 1 - side, dilation[1]) for side in _sides(kernel[1])}
        row_moments = {side: displacement_moments(part, (1, kernel[1]), dilation, groups) for side, part in rows.items()}
        column_moments = {side: displacement_moments(part, (kernel[0], 1), dilation, groups) for side, part in columns.items()}
        places = [(y, x) for y in range(kernel[0]) for x in range(kernel[1])]
        for first, (first_y, first_x) in enumerate(places):
            for second, (second_y, second_x) in enumerate(places[first:], start=first):
                down, across = second_y - first_y, second_x - first_x
                block = inner[down, across]
                # Pixels at the border that the first tap never sees; their partners lie in the image along it only.
                beside_y = down == 0 and kernel[0] == 3 and first_y != 1
                beside_x = across == 0 and kernel[1] == 3 and first_x != 1
                if beside_y:
                    block = block - row_moments[first_y // 2][0, across]
                if beside_x:
                    block = block - column_moments[first_x // 2][down, 0]
                if beside_y and beside_x:
                    corner = _strip(rows[first_y // 2], 3, 1 - first_x // 2, dilation[1])
                    block = block + displacement_moments(corner, (1, 1), dilation, groups)[0, 0]
                self.pairs[first, second] = block

    def write_rows_(self, target: Tensor, start: int, end: int) -> None:
        """Rows of the channels from ``start`` to ``end`` into ``[groups, (end − start) · taps, columns]``."""
        columns = target.shape[2] // self.taps
        by_tap = target.unflatten(2, (columns, self.taps)).unflatten(1, (end - start, self.taps))
        for (first, second), block in self.pairs.items():
            by_tap[:, :, first, :, second] = block[:, start:end, :columns]
            if first != second:
                by_tap[:, :, second, :, first] = block[:, :columns, start:end].mT


def displacement_moments(
    x: Tensor, kernel: tuple[int, int], dilation: tuple[int, int], groups: int
) -> dict[tuple[int, int], Tensor]:
    """``Σ_q x_q x_{q + d}ᵀ`` over all pairs inside the image, for the displacements ``d`` from a tap to a later one.

    Returns:
        ``[groups, channels, channels]`` by ``(d_y, d_x)`` with ``d_y > 0``, or ``d_y = 0`` and ``d_x ≥ 0``: the others
        are transposes of these.
    """
    reach = kernel[0] - 1, kernel[1] - 1
    by_products = groups == 1 and (x.shape[1] >= PRODUCT_CHANNELS or reach == (0, 0))
    return _by_products(x, reach, dilation) if by_products else _by_weight_gradient(x, reach, dilation, groups)


def _half_plane(reach: tuple[int, int]) -> list[tuple[int, int]]:
    return [(down, across) for down in range(reach[0] + 1) for across in range(-reach[1] if down else 0, reach[1] + 1)]


def _by_weight_gradient(
    x: Tensor, reach: tuple[int, int], dilation: tuple[int, int], groups: int
) -> dict[tuple[int, int], Tensor]:
    """All at once: the weight gradient of a convolution of ``x`` whose output gradient is ``x``."""
    channels = x.shape[1]
    padded = F.pad(x, (0, 0, 0, reach[0] * dilation[0]))
    weight = x.new_empty(channels, channels // groups, reach[0] + 1, 2 * reach[1] + 1)
    padding = [0, reach[1] * dilation[1]]
    wanted = [False, True, False]  # the weight's
    gradient = torch.ops.aten.convolution_backward(
        x.contiguous(), padded, weight, None, [1, 1], padding, list(dilation), False, [0, 0], groups, wanted
    )[1]
    by_displacement = gradient.unflatten(0, (groups, channels // groups)).permute(3, 4, 0, 1, 2).contiguous()
    return {(down, across): by_displacement[down, across + reach[1]] for down, across in _half_plane(reach)}


def _by_products(x: Tensor, reach: tuple[int, int], dilation: tuple[int, int]) -> dict[tuple[int, int], Tensor]:
    """Each as one product of the pixels that have a partner."""
    channels, height, width = x.shape[1:]
    left, right = x.transpose(0, 1).contiguous(), x.permute(0, 2, 3, 1).contiguous()
    found = {}
    for down, across in _half_plane(reach):
        y, across_pixels = down * dilation[0], across * dilation[1]
        start, end = max(0, -across_pixels), width - max(0, across_pixels)
        if y >= height or end <= start:
            found[down, across] = x.new_zeros(1, channels, channels)
            continue
        here = left[:, :, : height - y, start:end].reshape(channels, -1)
        if not y and not across:
            product = outer_gram(here)
        else:
            there = right[:, y:, start + across_pixels : end + across_pixels].reshape(-1, channels)
            product = times_transposed(here, there.mT)
        found[down, across] = product.unsqueeze(0)
    return found


def _sides(kernel: int) -> tuple[int, ...]:
    """First and last tap (0, 1) of the three that miss pixels at one border."""
    return (0, 1) if kernel == 3 else ()


def _strip(x: Tensor, dim: int, side: int, width: int) -> Tensor:
    """The first (0) or last (1) ``width`` rows or columns."""
    width = min(width, x.shape[dim])
    return x.narrow(dim, x.shape[dim] - width if side else 0, width)


def _patch_sums(x: Tensor, kernel: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """Sum of all patches, ``[channels, kernel[0] · kernel[1]]``."""
    image = x.sum(0)
    sums = []
    for tap_y in range(kernel[0]):
        for tap_x in range(kernel[1]):
            part = image
            for dim, tap, size, step in ((1, tap_y, kernel[0], dilation[0]), (2, tap_x, kernel[1], dilation[1])):
                offset = (tap - size // 2) * step
                length = max(part.shape[dim] - abs(offset), 0)
                part = part.narrow(dim, min(max(offset, 0), part.shape[dim]), length)
            sums.append(part.sum((1, 2)))
    return torch.stack(sums, dim=-1)
