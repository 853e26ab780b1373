"""Refreshes beside the training loop: a worker thread, on CUDA with a stream of its own."""

from __future__ import annotations

import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from kfac_opt.curvature.kronecker import Refreshed, Work

_waited = [0.0]


def seconds_waited() -> float:
    """Wall time that steps have waited for refreshes at the hand-over, in this process."""
    return _waited[0]


@dataclass(frozen=True)
class Job:
    """A refresh under way.

    Attributes:
        step: at which its result comes into force, whether it was ready long before or has to be waited for, so that
            results do not depend on timing.
        estimates: number of estimates in the factors it works on.
    """

    step: int
    estimates: int
    future: Future[Refreshed]
    done: torch.cuda.Event | None

    def result(self) -> Refreshed:
        """What was computed; waits for it. Raises what the computation raised."""
        start = time.perf_counter()
        found = self.future.result()
        _waited[0] += time.perf_counter() - start
        if self.done is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
            for value in (tensor for tensors in found.values() for tensor in tensors):
                value.record_stream(stream)
        return found


class Background:
    """One worker for the refreshes of all layers, in the order in which they were started."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self, name: str, work: Work, step: int, estimates: int, device: torch.device) -> None:
        """Begins ``work``, whose result comes into force at ``step``."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "kfac-refresh", _like_the_caller, (torch.get_num_threads(),))
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        done = None
        if device.type == "cuda":
            work, done = self._on_stream(work, device)
        self.jobs[name] = Job(step, estimates, self._pool.submit(_without_gradients, work), done)

    def arriving(self, step: int) -> list[str]:
        """Layers whose refresh comes into force at this step (or should have before)."""
        return [name for name, job in self.jobs.items() if job.step <= step]

    def _on_stream(self, work: Work, device: torch.device) -> tuple[Work, torch.cuda.Event]:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream, ready, done = self._streams[device], torch.cuda.Event(), torch.cuda.Event()
        ready.record(torch.cuda.current_stream(device))

        def beside() -> Refreshed:
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                found = work()
                done.record(stream)
            return found

        return beside, done


def _like_the_caller(num_threads: int) -> None:
    """The number of threads is a setting of each thread: without this the worker would take every core."""
    torch.set_num_threads(num_threads)


def _without_gradients(work: Work) -> Refreshed:
    with torch.no_grad():
        return work()
