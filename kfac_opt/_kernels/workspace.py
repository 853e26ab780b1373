"""Memory for one large matrix at a time, shared by all who need it one after the other."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

HUGE_BYTES = 2**22  # from here on worth asking for large pages


class _Shared(threading.local):
    """The buffer of the thread's open :func:`shared_workspace`."""

    def __init__(self) -> None:
        self.depth = 0
        self.buffer: Tensor | None = None


_shared = _Shared()


@contextmanager
def shared_workspace() -> Iterator[None]:
    """Inside, :func:`square_buffer` hands out the same memory again and again; it is freed at the end.

    The refreshes of one optimizer step are one such context: memory is mapped once however many layers they are, and
    nothing is kept for the many steps without a refresh (85 MB for the largest layers of a ResNet18).
    """
    _shared.depth += 1
    try:
        yield
    finally:
        _shared.depth -= 1
        if not _shared.depth:
            _shared.buffer = None


def square_buffer(n: int, dtype: torch.dtype) -> Tensor:
    """``[n, n]`` of anything, on the CPU: only one at a time is in use, the next call may hand out the same memory."""
    buffer = _shared.buffer
    if buffer is None or buffer.dtype != dtype or buffer.numel() < n * n:
        _shared.buffer = None  # gone before its successor comes
        buffer = empty_in_large_pages(n * n, dtype)
        if _shared.depth:
            _shared.buffer = buffer
    return buffer[: n * n].view(n, n)


def empty_in_large_pages(number: int, dtype: torch.dtype) -> Tensor:
    """``torch.empty(number)`` on the CPU, in pages of 2 MB where the system grants them.

    Fresh memory costs a page fault per page when it is first touched: 4608 × 4608 numbers 20,000 of 4 kB.
    """
    size = number * torch.empty((), dtype=dtype).element_size()
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < HUGE_BYTES:
        return torch.empty(number, dtype=dtype)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(advice)
    except OSError:  # a kernel without large pages
        return torch.empty(number, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=number)
