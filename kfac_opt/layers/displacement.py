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

from kfac_opt.products import outer_gram, times_transposed

PRODUCT_CHANNELS = 200  # from here on one product per displacement, below one weight-gradient call for all


def patch_moment(
    x: Tensor, kernel: tuple[int, int], dilation: tuple[int, int], groups: int, *, with_one: bool
) -> Tensor:
    """Sum of outer products of the zero-padded patches around every pixel, features in the order of a weight.

    Args:
        x: ``[batch, channels, height, width]``.
        kernel: 1 or 3 in each direction.
        dilation: distance of the taps, also the width of the zeros around the image.
        with_one: a last feature that is 1.

    Returns:
        ``[groups, n, n]``, ``n = channels / groups · kernel[0] · kernel[1] (+ 1)``.
    """
    channels, taps = x.shape[1] // groups, kernel[0] * kernel[1]
    size = channels * taps
    moment = x.new_empty(groups, size + with_one, size + with_one)
    by_tap = moment[:, :size, :size].unflatten(2, (channels, taps)).unflatten(1, (channels, taps))
    inner = displacement_moments(x, kernel, dilation, groups)
    rows = [_strip(x, 2, side, dilation[0]) for side in _sides(kernel[0])]
    columns = [_strip(x, 3, side, dilation[1]) for side in _sides(kernel[1])]
    row_moments = [displacement_moments(part, (1, kernel[1]), dilation, groups) for part in rows]
    column_moments = [displacement_moments(part, (kernel[0], 1), dilation, groups) for part in columns]
    reach = kernel[0] - 1, kernel[1] - 1
    for tap_y in range(kernel[0]):
        for tap_x in range(kernel[1]):
            starts = reach[0] - tap_y, reach[1] - tap_x
            window = slice(starts[0], starts[0] + kernel[0]), slice(starts[1], starts[1] + kernel[1])
            blocks = inner[window].clone()  # [kernel, kernel, groups, channels, channels]
            if tap_y != reach[0] - tap_y:
                blocks[tap_y] -= row_moments[tap_y // 2][0, window[1]]
            if tap_x != reach[1] - tap_x:
                blocks[:, tap_x] -= column_moments[tap_x // 2][window[0], 0]
            if tap_y != reach[0] - tap_y and tap_x != reach[1] - tap_x:
                corner = _strip(rows[tap_y // 2], 3, _sides(kernel[1])[tap_x // 2], dilation[1])
                blocks[tap_y, tap_x] += displacement_moments(corner, (1, 1), dilation, groups)[0, 0]
            by_tap[:, :, tap_y * kernel[1] + tap_x] = blocks.flatten(0, 1).permute(1, 2, 3, 0)
    if with_one:
        sums = _patch_sums(x, kernel, dilation).reshape(groups, size)
        moment[:, :size, size] = sums
        moment[:, size, :size] = sums
        moment[:, size, size] = x.shape[0] * x.shape[2] * x.shape[3]
    return moment


def displacement_moments(x: Tensor, kernel: tuple[int, int], dilation: tuple[int, int], groups: int) -> Tensor:
    """``Σ_q x_q x_{q + d}ᵀ`` over all pairs inside the image, for every displacement ``d`` between two taps.

    Returns:
        ``[2 kernel[0] − 1, 2 kernel[1] − 1, groups, channels, channels]``; zero displacement in the middle.
    """
    reach = kernel[0] - 1, kernel[1] - 1
    channels = x.shape[1] // groups
    by_products = groups == 1 and (channels >= PRODUCT_CHANNELS or reach == (0, 0))
    half = _by_products(x, reach, dilation) if by_products else _by_weight_gradient(x, reach, dilation, groups)
    if not reach[0]:
        return half
    return torch.cat([half[1:].flip(0, 1).mT, half])


def _by_weight_gradient(x: Tensor, reach: tuple[int, int], dilation: tuple[int, int], groups: int) -> Tensor:
    """Displacements with ``d_y ≥ 0``: the weight gradient of a convolution of ``x`` whose output gradient is ``x``."""
    channels = x.shape[1]
    padded = F.pad(x, (0, 0, 0, reach[0] * dilation[0]))
    weight = x.new_empty(channels, channels // groups, reach[0] + 1, 2 * reach[1] + 1)
    padding = [0, reach[1] * dilation[1]]
    wanted = [False, True, False]  # the weight's
    gradient = torch.ops.aten.convolution_backward(
        x.contiguous(), padded, weight, None, [1, 1], padding, list(dilation), False, [0, 0], groups, wanted
    )[1]
    return gradient.unflatten(0, (groups, channels // groups)).permute(3, 4, 0, 1, 2).contiguous()


def _by_products(x: Tensor, reach: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """Displacements with ``d_y ≥ 0``, each as one product of the pixels that have a partner."""
    channels, height, width = x.shape[1:]
    left, right = x.transpose(0, 1).contiguous(), x.permute(0, 2, 3, 1).contiguous()
    found = x.new_zeros(reach[0] + 1, 2 * reach[1] + 1, 1, channels, channels)
    for down in range(reach[0] + 1):
        for across in range(-reach[1], reach[1] + 1):
            y, across_pixels = down * dilation[0], across * dilation[1]
            start, end = max(0, -across_pixels), width - max(0, across_pixels)
            if y >= height or end <= start or (not down and across < 0):
                continue
            here = left[:, :, : height - y, start:end].reshape(channels, -1)
            if not y and not across:
                found[down, across + reach[1], 0] = outer_gram(here)
                continue
            there = right[:, y:, start + across_pixels : end + across_pixels].reshape(-1, channels)
            found[down, across + reach[1], 0] = times_transposed(here, there.mT)
    found[0, : reach[1]] = found[0, reach[1] + 1 :].flip(0).mT
    return found


def _sides(kernel: int) -> tuple[int, ...]:
    """For the first and the last tap: whether it misses the pixels at the end (1) or the start (0)."""
    return (1, 0) if kernel == 3 else ()


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
