"""Step times measured side by side: one step of each in turn, so that a busy machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Timed:
    """A step to be timed in every ``stride``-th round."""

    step: Callable[[], None]
    stride: int = 1


def interleave(
    contestants: Mapping[str, Timed],
    rounds: int,
    *,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    on_round: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every timed step; within a round the order moves on by one, so that nobody is always first.

    Args:
        contestants: what is timed, by name.
        rounds: those with ``stride`` 1 are timed so often.
        warmup: untimed steps of each before.
        device: synchronised around each step if it works asynchronously.
        clock: ``time.process_time`` leaves out what other processes take of a busy CPU.
    """
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else _nothing
    for timed in contestants.values():
        for _ in range(warmup):
            timed.step()
    synchronize()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if number % contestants[name].stride:
                continue
            start = clock()
            contestants[name].step()
            synchronize()
            seconds[name].append(clock() - start)
        on_round()
    return seconds


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest measured value that at least ``percent`` of the values do not exceed (no interpolation)."""
    return float(np.percentile(values, percent, method="inverted_cdf" if percent < 99 else "higher"))


def cycle_ratio(values: Sequence[float], reference: Sequence[float], period: int) -> float:
    """Median over whole periods of (mean of ``values``) / (mean of ``reference`` in the same rounds).

    The mean over a period counts rare expensive steps with their true share; the reference from the same rounds
    takes out the load of the machine.
    """
    whole = max(1, len(values) // period)
    ratios = []
    for index in range(whole):
        chosen = slice(index * period, (index + 1) * period)
        ratios.append(float(np.mean(values[chosen]) / np.mean(reference[chosen])))
    return float(np.median(ratios))


def _nothing() -> None:
    return
