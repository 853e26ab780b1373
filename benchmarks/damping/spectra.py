"""How positive definite the damped Fisher blocks are during training: smallest eigenvalue and condition number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.common.results import RunLog
from benchmarks.common.tasks import Task
from benchmarks.damping.config import Setting, SweepConfig
from benchmarks.damping.trial import train_trial
from kfac_opt._curvature.linalg import mean_diagonal, pi_correction

Spectra = dict[str, dict[str, dict[str, list[float]]]]
"""Setting key → step → name of the quantity (as in :class:`Extremes`) → one number per block."""


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


def _ends(factor: Tensor) -> tuple[float, float]:
    """Smallest (not below zero: what rounding leaves is not curvature) and largest eigenvalue."""
    values = torch.linalg.eigvalsh(factor.double())
    return max(0.0, float(values[0])), float(values[-1])


def block_extremes(optimizer: Any, *, style: str) -> list[Extremes]:
    """Extremes of every block that has an estimate."""
    found = []
    for view in optimizer.curvature.values():
        factors = (getattr(view, "input_factor", None), getattr(view, "output_factor", None))
        matrices = [factor for factor in factors if factor is not None and factor.dim() == 2]
        if style == "factored" and len(matrices) == 2:
            found.append(factored_extremes(matrices[0], matrices[1], view.damping))
        else:
            values = view.spectral_form().eigenvalues
            low, high = float(values.min()), float(values.max())
            found.append(Extremes(low + view.damping, high + view.damping, low, high))
    return found


def follow_spectra(config: SweepConfig, trials: pd.DataFrame, task: Task) -> Spectra:
    """Trains the best ``num_spectra`` of every damping's kept ``trials`` once more and reads the eigenvalues along the way.

    The numbers are geometric means over the runs, block by block. What was done for the same trials before is reused.
    """
    log, spectra = RunLog(config.folder / "spectra.jsonl"), {}
    for setting in config.settings():
        chosen = trials[trials["setting"] == setting.key][: config.num_spectra].to_dict("records")
        if setting.damping is not None and chosen:
            identity = [config.study_name(setting), [trial["trial"] for trial in chosen]]
            spectra[setting.key] = log.get(identity, lambda: _follow(config, setting, chosen, task))  # noqa: B023
    return spectra


def _follow(config: SweepConfig, setting: Setting, chosen: Sequence[dict[str, Any]], task: Task) -> dict[str, Any]:
    seen: dict[str, list[list[Extremes]]] = {}
    style = _style(config, setting)

    def observe(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        seen.setdefault(str(step), []).append(block_extremes(optimizer, style=style))

    for trial in chosen:
        train_trial(config, task, setting, trial, int(trial["training_seed"]), observe)
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
    for key in ("smallest", "condition", "undamped_smallest", "undamped_largest"):
        values = np.array([[getattr(block, key) for block in run] for run in runs], dtype=float)
        means = np.exp(np.log(np.maximum(values, np.finfo(np.float64).tiny)).mean(axis=0))
        result[key] = [float(f"{value:.4g}") for value in means]
    return result
