"""Peak memory of a piece of work, measured in a process of its own."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_bytes(work: Callable[..., None], *arguments: Any, device: str = "cpu") -> int:
    """Peak resident memory (CPU) or peak allocated memory (CUDA) of ``work(*arguments)`` in a fresh process.

    ``work`` must be importable: a function of a module. The libraries are part of a CPU figure, so compare figures
    with each other.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, device, torch.get_num_threads(), work, arguments))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError as error:
        process.join()
        raise RuntimeError(
            f"the process that measures memory ended with status {process.exitcode}; its error stands above."
        ) from error
    finally:
        process.join()


def _measure(sender: Any, device: str, threads: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        work(*arguments)
        torch.cuda.synchronize()
        sender.send(torch.cuda.max_memory_allocated())
    else:
        work(*arguments)
        sender.send(_peak_resident())


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
