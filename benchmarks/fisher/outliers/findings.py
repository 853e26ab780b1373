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
    network = [fall(found.moments[-1].parts[NETWORK]) for found in runs]
    layers = [fall(part) for found in runs for name, part in found.moments[-1].parts.items() if name != NETWORK]
    inside = [found for found in runs if 0 < found.best < len(found.moments) - 1]
    growth = {found.setting.label: _growth(found) for found in inside}
    steepest = {found.setting.label: _steepest(found) for found in inside}
    minima = {found.setting.label: found.moments[found.best].epoch for found in inside}
    near = {key: rise[1] >= minima[key] / 2 and rise[0] <= 2 * minima[key] for key, rise in steepest.items()}
    never = [found.setting.label for found in runs if found not in inside]
    small = [found.moments[-1].parts[NETWORK]["small_share"] for found in runs]
    fallen = {found.setting.label: _fallen(found, steepest[found.setting.label][1]) for found in inside}
    grew = [1.0 if near[label] and growth[label] > 1 else 0.5 * (fallen[label] >= 0.9) for label in growth]
    return [
        Finding(
            "the largest eigenvalue is carried by few examples: without the tenth it falls by 60 to 99 %",
            verdict(sum(value >= 0.6 for value in network) / len(network)),
            f"whole network {min(network):.0%} to {max(network):.0%}, single layers {min(layers):.0%} to {max(layers):.0%}",
        ),
        Finding(
            "outliers grow sharply about where the validation loss is lowest",
            verdict(sum(grew) / len(grew)) if grew else "not tried",
            "; ".join(
                [
                    f"{label}: lowest loss at epoch {minima[label]:.1f}, steepest rise between {steepest[label][0]:.1f} and "
                    f"{steepest[label][1]:.1f} (the loss has then done {fallen[label]:.0%} of its fall), × {grown:.3g} from "
                    "half of the lowest loss's epoch to twice"
                    for label, grown in growth.items()
                ]
                + [f"{label}: no minimum inside the run" for label in never]
            ),
        ),
        Finding(
            "most projections are near zero",
            verdict(sum(value > 0.5 for value in small) / len(small)),
            f"|a| < 0.1 for {min(small):.0%} to {max(small):.0%} of the examples at the end",
        ),
    ]


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
