"""How positive definite the damped Fisher blocks are during training: smallest eigenvalue and condition number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common.results import read_json, write_json
from benchmarks.common.tasks import Task
from benchmarks.damping.config import Setting, SweepConfig
from benchmarks.damping.results import TrialRow, keep_best
from benchmarks.damping.trial import train_trial
from kfac_opt._curvature.linalg import mean_diagonal, pi_correction


@dataclass(frozen=True)
class Extremes:
    """Extreme eigenvalues of one block.

    Attributes:
        smallest, largest: of the damped block that the gradient is divided by.
        undamped_smallest, undamped_largest: of the block itself.
    """

    smallest: float
    largest: float
    undamped_smallest: float
    undamped_largest: float

    @property
    def condition(self) -> float:
        """Of the damped block."""
        return self.largest / self.smallest


def factored_extremes(input_factor: Tensor, output_factor: Tensor, damping: float) -> Extremes:
    r"""Of :math:`(A + \pi\sqrt\gamma I) \otimes (G + \sqrt\gamma/\pi I)`, from the eigenvalues of the two factors."""
    pi = float(pi_correction(mean_diagonal(input_factor), mean_diagonal(output_factor)))
    inputs, outputs = _ends(input_factor), _ends(output_factor)
    root = damping**0.5
    damped = [(a + pi * root) * (g + root / pi) for a, g in zip(inputs, outputs, strict=True)]
    return Extremes(damped[0], damped[1], inputs[0] * outputs[0], inputs[1] * outputs[1])


def spectral_extremes(eigenvalues: Tensor, damping: float) -> Extremes:
    """Of ``F + γ I`` from the eigenvalues of ``F``."""
    low, high = float(eigenvalues.min()), float(eigenvalues.max())
    return Extremes(low + damping, high + damping, low, high)


def _ends(factor: Tensor) -> tuple[float, float]:
    """Smallest (not below zero: what rounding leaves is not curvature) and largest eigenvalue."""
    values = torch.linalg.eigvalsh(factor.double())
    return max(0.0, float(values[0])), float(values[-1])


def block_extremes(optimizer: torch.optim.Optimizer, *, style: str) -> dict[str, Extremes]:
    """Extremes of every block that has an estimate, by its name."""
    found: dict[str, Extremes] = {}
    for name, view in optimizer.curvature.items():  # type: ignore[attr-defined]
        factors = (getattr(view, "input_factor", None), getattr(view, "output_factor", None))
        matrices = [factor for factor in factors if factor is not None and factor.dim() == 2]
        if style == "factored" and len(matrices) == 2:
            found[name] = factored_extremes(matrices[0], matrices[1], view.damping)
        else:
            found[name] = spectral_extremes(view.spectral_form().eigenvalues, view.damping)
    return found


Spectra = dict[str, dict[str, dict[str, list[float]]]]
"""Setting key → step → name of the quantity (as in :class:`Extremes`) → one number per block."""


def follow_spectra(config: SweepConfig, rows: dict[Setting, list[TrialRow]], task: Task, cache: Path) -> Spectra:
    """Trains the best ``num_spectra`` runs of every damping once more and reads the eigenvalues along the way.

    The numbers are geometric means over the runs, block by block. What is in ``cache`` for the same trials is reused.
    """
    stored = read_json(cache) if cache.is_file() else {}
    spectra: Spectra = {}
    for setting, trials in rows.items():
        chosen = keep_best(config, trials)[: config.num_spectra]
        if setting.damping is None or not chosen:
            continue
        identity = [row.trial for row in chosen]
        if stored.get(setting.key, {}).get("trials") != identity:
            stored[setting.key] = {"trials": identity, "steps": _follow(config, setting, chosen, task)}
            write_json(cache, stored)
        spectra[setting.key] = stored[setting.key]["steps"]
    return spectra


def _follow(config: SweepConfig, setting: Setting, chosen: Sequence[TrialRow], task: Task) -> dict[str, dict[str, list[float]]]:
    seen: dict[str, list[list[Extremes]]] = {}
    style = _style(config, setting)

    def observe(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        seen.setdefault(str(step), []).append(list(block_extremes(optimizer, style=style).values()))

    for row in chosen:
        train_trial(config, task, setting, row.params, int(row.result["training_seed"]), observe)
    return {step: _geometric_means(runs) for step, runs in seen.items()}


def _style(config: SweepConfig, setting: Setting) -> str:
    """How damping enters the blocks of this setting."""
    fixed = config.optimizers[setting.optimizer].fixed
    if fixed.get("damping_style") == "split":
        return "factored"  # the same eigenvalues, taken in another order
    if config.kind(setting.optimizer) == "kfac" and fixed.get("curvature", "kronecker") == "kronecker":
        return str(fixed.get("damping_style", "factored"))
    return "exact"


def _geometric_means(runs: list[list[Extremes]]) -> dict[str, list[float]]:
    result: dict[str, list[float]] = {}
    tiny = float(np.finfo(np.float64).tiny)
    for key in ("smallest", "condition", "undamped_smallest", "undamped_largest"):
        values: Any = np.array([[getattr(block, key) for block in run] for run in runs], dtype=float)
        result[key] = [float(f"{value:.4g}") for value in np.exp(np.log(np.maximum(values, tiny)).mean(axis=0))]
    return result
