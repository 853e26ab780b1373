"""Products of dense matrices at the speed of the machine: the library with the wider vectors, one triangle only.

Plain tensors in, plain tensors out; the results are those of ``@`` up to rounding.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

ONEDNN_OPERATIONS = 2**21  # below, a call costs more than it gains: 84 × 121 × 121 66 µs instead of 41, 10 × 513 × 513 even
SPLIT_DIM = 512  # products with a triangular result are split from this size on
BLOCK_DIM = 256  # rows of them taken at a time


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies faster than the BLAS that ``@`` calls: MKL does not use AVX-512 on AMD processors.

    Single precision, one core of an AMD EPYC (Zen 5), 512 × 784 times 784 × 784: 205 instead of 101 Gflop/s. A
    property of the machine and not a measurement at run time, so that a resumed run takes the same path.
    """
    usable = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not usable or not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    description = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (description.read_text() if description.is_file() else platform.processor())


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Teaches the C library to keep what is freed for the next step instead of giving it back to the system.

    glibc hands blocks above a threshold back at once and maps them anew, page by page: 512 × 785 numbers then take longer
    to get than to multiply (measured: 1900 page faults and 3.5 of 11 ms per step of a net of three such layers). It
    raises the threshold to the largest such block that was freed, up to 32 MB; here is one. Others just free it.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def times_transposed(left: Tensor, right: Tensor) -> Tensor:
    """``left @ rightᵀ`` of matrices ``[m, k]`` and ``[n, k]``; fastest where both (or ``rightᵀ``) are contiguous."""
    operations = left.shape[0] * left.shape[1] * right.shape[0]
    plain = left.dtype != torch.float32 or left.device.type != "cpu" or operations < ONEDNN_OPERATIONS
    # The private operator knows neither autograd nor views: strided slices fall into a loop without vectors.
    plain = plain or not left.is_contiguous() or not (right.is_contiguous() or right.mT.is_contiguous())
    plain = plain or not onednn_is_faster()
    if plain or (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)):
        return left @ right.mT
    return _onednn_product(left, right)


def product_for(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """What :func:`times_transposed` does for ``[m, k]`` and ``[n, k]``, chosen once for many calls.

    For contiguous arguments (the right one may be the transpose of such a matrix) and outside autograd alone.
    """
    pays = dtype == torch.float32 and device.type == "cpu" and m * k * n >= ONEDNN_OPERATIONS and onednn_is_faster()
    return _onednn_product if pays else _plain_product


def _onednn_product(left: Tensor, right: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")  # type: ignore[no-any-return]


def _plain_product(left: Tensor, right: Tensor) -> Tensor:
    return left @ right.mT


def outer_gram(rows: Tensor) -> Tensor:
    """``rows @ rowsᵀ`` of a contiguous matrix ``[n, k]``: symmetric ``[n, n]``; of large ones only one triangle."""
    n = rows.shape[0]
    if n < SPLIT_DIM:
        return times_transposed(rows, rows)
    result = rows.new_empty(n, n)
    for start in range(0, n, BLOCK_DIM):
        end = min(start + BLOCK_DIM, n)
        result[start:end, :end] = times_transposed(rows[start:end], rows[:end])
        result[:start, start:end] = result[start:end, :start].mT
    return result
