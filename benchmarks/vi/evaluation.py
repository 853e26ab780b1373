"""Numbers of one trained method: accuracy, likelihood, calibration, and whether it notices unfamiliar inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.common.data import Dataset
from benchmarks.vi.config import VIConfig
from benchmarks.vi.data import load_unfamiliar, rotated, shuffled
from benchmarks.vi.methods import Trained
from kfac_opt.bayes import metrics
from kfac_opt.bayes.prediction import Prediction

TINY = 1e-12
"""Least probability that enters a logarithm: single precision rounds smaller ones to zero."""


def evaluate(trained: Trained, data: Dataset, config: VIConfig, seed: int) -> dict[str, Any]:
    """Plain data: ``mean`` and ``samples`` with their metrics; None without an ensemble, or where nothing is finite."""
    # Weights may be finite and yet so large that the outputs are not.
    usable = trained.is_finite and bool(torch.isfinite(trained.at_mean(data.test_inputs).probabilities).all())
    return {
        "mean": _evaluate(trained, data, config, None) if usable else None,
        "samples": _evaluate(trained, data, config, seed) if usable and _has_ensemble(trained, data) else None,
        "curve": vars(trained.curve),
        "seconds": trained.seconds,
        "cost": trained.method.cost,
        "diverged": trained.diverged,
        "dropped_samples": trained.dropped_samples,
    }


def ensemble_nll(trained: Trained, data: Dataset, num_samples: int, seed: int) -> float:
    """What a search minimises: the likelihood loss of the ensemble, or of the net where there is none."""
    if trained.diverged:
        return float("inf")
    prediction = trained.ensemble(data.test_inputs, num_samples, seed) or trained.at_mean(data.test_inputs)
    return _nll(prediction, data.test_targets)


def _has_ensemble(trained: Trained, data: Dataset) -> bool:
    return trained.ensemble(data.test_inputs[:1], 2, 0) is not None


def _evaluate(trained: Trained, data: Dataset, config: VIConfig, seed: int | None) -> dict[str, Any]:
    def predicted(inputs: Tensor) -> Prediction:
        prediction = None if seed is None else trained.ensemble(inputs, config.predict_samples, seed)
        return trained.at_mean(inputs) if prediction is None else prediction

    def turned(angle: float) -> Prediction:
        if angle not in at_angle:
            at_angle[angle] = predicted(rotated(data.test_inputs, angle))
        return at_angle[angle]

    known = predicted(data.test_inputs)
    at_angle = {0.0: known}
    diagram = metrics.reliability_diagram(known.probabilities, data.test_targets)
    result: dict[str, Any] = {
        "accuracy": float(metrics.accuracy(known.probabilities, data.test_targets)),
        "nll": _nll(known, data.test_targets),
        "brier": float(metrics.brier_score(known.probabilities, data.test_targets)),
        "ece": float(diagram.calibration_error),
        "error": _test_set_errors(known, data.test_targets),
        "reliability": {
            "counts": diagram.counts.tolist(),
            "confidence": diagram.confidence.tolist(),
            "accuracy": diagram.accuracy.tolist(),
        },
        "entropy": float(known.entropy.mean()),
    }
    others = {"shuffled": predicted(shuffled(data.test_inputs)), "rotated": turned(90.0)}
    unfamiliar = load_unfamiliar(config)
    if unfamiliar is not None:
        others["unfamiliar"] = predicted(unfamiliar)
    result["detection"] = {name: _detection(known, other) for name, other in others.items()}
    result["angles"] = [_at_angle(turned(a), data.test_targets, a) for a in config.angles]
    return result


def _nll(prediction: Prediction, targets: Tensor) -> float:
    return float(metrics.negative_log_likelihood(prediction.probabilities.clamp_min(TINY), targets))


def _test_set_errors(prediction: Prediction, targets: Tensor) -> dict[str, float]:
    """Standard errors of accuracy and likelihood loss: what another test set of this size would change."""
    chosen = prediction.probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1).clamp_min(TINY)
    right = (prediction.probabilities.argmax(-1) == targets).to(chosen.dtype)
    root = len(targets) ** 0.5
    return {"accuracy": float(right.std(correction=0)) / root, "nll": float(chosen.log().std(correction=0)) / root}


def _detection(known: Prediction, other: Prediction) -> dict[str, float]:
    """How well the entropy and the mutual information tell the inputs apart."""
    scores = {
        "entropy": (known.entropy, other.entropy),
        "mutual_information": (known.mutual_information, other.mutual_information),
    }
    found: dict[str, float] = {}
    for name, (familiar, unfamiliar) in scores.items():
        found[f"auroc_{name}"] = float(metrics.auroc(familiar, unfamiliar))
        found[f"fpr95_{name}"] = float(metrics.fpr95(familiar, unfamiliar))
    return found


def _at_angle(prediction: Prediction, targets: Tensor, angle: float) -> dict[str, float]:
    return {
        "angle": angle,
        "entropy": float(prediction.entropy.mean()),
        "mutual_information": float(prediction.mutual_information.mean()),
        "accuracy": float(metrics.accuracy(prediction.probabilities, targets)),
        "confidence": float(torch.max(prediction.probabilities, -1).values.mean()),
    }
