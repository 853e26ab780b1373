"""The findings of the study of gradient outliers in numbers."""

from __future__ import annotations

import math

import numpy as np

from benchmarks.fisher.outliers.study import NETWORK, Run
from benchmarks.fisher.report import Finding, verdict


def fall(part: dict[str, float]) -> float:
    """Share of the eigenvalue that the trimmed tenth carries."""
    return 1.0 - part["trimmed_eigenvalue"] / part["eigenvalue"] if part["eigenvalue"] > 0 else math.nan


def findings(runs: list[Run]) -> list[Finding]:
    """The study's findings in numbers."""
    trained = [found for found in runs if _has_learned(found)]
    network = [fall(found.moments[-1].parts[NETWORK]) for found in trained]
    layers = [fall(part) for found in trained for name, part in found.moments[-1].parts.items() if name != NETWORK]
    trimmed = [f"whole network {_range(network)}, single layers {_range(layers)} at the end"] if network else []
    untrained = [
        f"{found.setting.label}: {fall(found.moments[-1].parts[NETWORK]):.0%}, not counted: its loss has hardly fallen"
        for found in runs
        if found not in trained
    ]
    inside = [found for found in runs if 0 < found.best < len(found.moments) - 1]
    growth = {found.setting.label: _growth(found) for found in inside}
    steepest = {found.setting.label: _steepest(found) for found in inside}
    minima = {found.setting.label: found.moments[found.best].epoch for found in inside}
    near = {key: rise[1] >= minima[key] / 2 and rise[0] <= 2 * minima[key] for key, rise in steepest.items()}
    never = [found.setting.label for found in runs if found not in inside]
    small = [found.moments[-1].parts[NETWORK]["small_share"] for found in trained]
    fallen = {found.setting.label: _fallen(found, steepest[found.setting.label][1]) for found in inside}
    grew = [1.0 if near[label] and growth[label] > 1 else 0.5 * (fallen[label] >= 0.9) for label in growth]
    return [
        Finding(
            "the largest eigenvalue is carried by few examples: without the tenth it falls by 60 to 99 %",
            verdict(sum(value >= 0.6 for value in network) / len(network)) if network else "not tried",
            "; ".join(trimmed + untrained),
        ),
        Finding(
            "outliers grow sharply about where the validation loss is lowest",
            verdict(sum(grew) / len(grew)) if grew else "not tried",
            "; ".join(
                [_told(found, steepest[found.setting.label]) for found in inside]
                + [f"{label}: no minimum inside the run" for label in never]
                + ["within a factor of two of that epoch: yes; where nine tenths of the loss's fall are done: in part"]
            ),
        ),
        Finding(
            "most projections are near zero",
            verdict(sum(value > 0.5 for value in small) / len(small)) if small else "not tried",
            f"|a| < 0.1 for {_range(small)} of the examples at the end" if small else "no run has learned",
        ),
    ]


def _has_learned(found: Run) -> bool:
    """Whether the validation loss fell by a tenth at some time: an untrained net has no examples that stand out."""
    losses = [moment.validation_loss for moment in found.moments]
    return min(losses) < 0.9 * losses[0]


def _range(values: list[float]) -> str:
    return f"{min(values):.1%} to {max(values):.1%}"


def _told(found: Run, rise: tuple[float, float]) -> str:
    """Where the loss is lowest, and where the outliers rise, in numbers."""
    low = found.moments[found.best]
    first, last = (next(m for m in found.moments if m.epoch == epoch) for epoch in rise)
    counts = [f"{moment.parts[NETWORK]['outliers']:.0f}" for moment in (first, last)]
    return (
        f"{found.setting.label}: lowest loss {low.validation_loss:.2f} at epoch {low.epoch:.1f}, outliers rise fastest from "
        f"{counts[0]} to {counts[1]} between epochs {first.epoch:.1f} and {last.epoch:.1f}, at losses "
        f"{first.validation_loss:.2f} and {last.validation_loss:.2f}"
    )


def _growth(found: Run) -> float:
    """Outliers at twice the epoch of the lowest validation loss over those at half of it (at least one)."""
    epoch = found.moments[found.best].epoch
    counts = found.curve("outliers")
    before = float(np.interp(epoch / 2, found.epochs, counts))
    after = float(np.interp(min(2 * epoch, found.epochs[-1]), found.epochs, counts))
    return after / max(before, 1.0)


def _steepest(found: Run) -> tuple[float, float]:
    """Epochs of the two neighbouring checkpoints between which the number of outliers rises fastest."""
    rises = np.diff(found.curve("outliers")) / np.diff(found.epochs)
    start = int(np.argmax(rises))
    return found.epochs[start], found.epochs[start + 1]


def _fallen(found: Run, epoch: float) -> float:
    """Share of the whole fall of the validation loss that is done at this epoch."""
    losses = [moment.validation_loss for moment in found.moments]
    now = float(np.interp(epoch, found.epochs, losses))
    return (losses[0] - now) / (losses[0] - min(losses))
