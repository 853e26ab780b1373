"""The laws of the variance study in numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.fisher.report import Finding, verdict
from benchmarks.fisher.variance.checks import Check
from benchmarks.fisher.variance.study import Point, VarianceConfig
from kfac_opt.fisher import EstimatorVariance


def findings(
    config: VarianceConfig,
    found: EstimatorVariance,
    labels: list[Check],
    averages: list[Check],
    snapshots: list[Point],
    widths: list[Point],
    norms: list[Point],
) -> list[Finding]:
    """The laws of the study in numbers."""
    sweep = [*snapshots, *widths, *norms]
    ratios = [p.covariance / p.bound for p in sweep if p.bound > 0]
    seconds = [p.second_covariance / p.second_bound for p in sweep if p.second_bound > 0]
    inside = sum(check.low <= check.predicted <= check.high for check in labels) / len(labels)
    inside_average = sum(check.low <= check.predicted <= check.high for check in averages) / len(averages)
    own = [layer.second.total_variance for layer in found.layers.values() if layer.second is not None]
    across = found.second.total_variance if found.second is not None else math.nan
    spectral = [layer.spectral_norm / layer.spectral_bound for layer in found.layers.values() if layer.spectral_bound]
    width_slope = _slope(widths, lambda p: p.covariance)
    norm_slope = _slope([p for p in norms if p.x <= 1.0], lambda p: p.covariance)
    correlation = _rank_correlation([p.covariance for p in sweep], [p.bound for p in sweep])
    relative = [math.sqrt(p.total) / p.fisher_norm for p in snapshots]
    return [
        Finding(
            "the variance falls as 1/m with the number of labels",
            verdict(inside),
            f"predicted error inside three standard errors of {config.num_draws} sampled matrices for {inside:.0%} of the m's; "
            f"m = {labels[0].x:g}: predicted {labels[0].predicted:.3f}, seen {labels[0].seen:.3f}; m = {labels[-1].x:g}: "
            f"{labels[-1].predicted:.3f}, {labels[-1].seen:.3f}",
        ),
        Finding(
            "(not in the study) an average with decay d is worth m (1+d)/(1−d) labels",
            verdict(inside_average),
            "; ".join(f"d = {c.x:g}: predicted {c.predicted:.3f}, seen {c.seen:.3f}" for c in averages),
        ),
        Finding(
            "‖Cov(I1)‖ ≤ ‖J‖⁴ ‖K − H⊗H‖ / m",
            verdict(all(ratio <= 1 for ratio in ratios)),
            f"the norm is {min(ratios):.2g} to {max(ratios):.2g} of the bound over all nets of this page",
        ),
        Finding(
            "‖Cov(I2)‖ ≤ ‖∂²h‖² ‖H‖ / m",
            verdict(all(ratio <= 1 for ratio in seconds)),
            f"{min(seconds):.2g} to {max(seconds):.2g} of the bound" if seconds else "I2 has no variance here",
        ),
        Finding(
            "ReLU nets: I2's diagonal blocks have no variance, its cross-layer blocks have",
            verdict(max(own) == 0.0 and across > 0.0) if config.activation == "relu" else "not tried",
            f"sum over the diagonal blocks {sum(own):.2g}, whole matrix {across:.2g} (I1: {found.total_variance:.2g})",
        ),
        Finding(
            "a layer's Jacobian is bounded by the spectral norms of the weights above it",
            verdict(all(ratio <= 1 + 1e-5 for ratio in spectral)) if spectral else "not tried",
            f"it is {min(spectral):.2g} to {max(spectral):.2g} of the bound" if spectral else "the net is no chain of layers",
        ),
        Finding(
            "the variance follows the size of the Jacobian, so that it grows with the norm of the weights",
            verdict(correlation > 0.8 and norm_slope > 0),
            f"rank correlation of ‖Cov(I1)‖ with its bound over all nets {correlation:.2f}; it grows as (weight norm)^"
            f"{norm_slope:.2f} up to the trained norm{_beyond(norms)}, and as width^"
            f"{width_slope:.2f} at PyTorch's initialisation, whose weights shrink with the width",
        ),
        Finding(
            "(not in the study) relative to ‖F‖ the noise changes along the training",
            "—",
            ", ".join(f"step {p.x:g}: {value:.2f}" for p, value in zip(snapshots, relative)),
        ),
    ]


def _beyond(norms: list[Point]) -> str:
    """What larger weights than the trained ones do."""
    largest = max(norms, key=lambda p: p.x)
    trained = min(norms, key=lambda p: abs(p.x - 1.0))
    if largest.x <= 1.0:
        return ""
    if largest.covariance < trained.covariance:
        return f" (at × {largest.x:g} it is {largest.covariance:.2g} of {trained.covariance:.2g}: the predictions are sure)"
    return f", to {largest.covariance / trained.covariance:.2g} times at × {largest.x:g}"


def _rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (left, right)]
    return float(np.corrcoef(*ranks)[0, 1])


def _slope(points: Sequence[Point], value: Callable[[Point], float]) -> float:
    """Exponent of a power law fitted on logarithmic axes."""
    pairs = [(math.log(p.x), math.log(value(p))) for p in points if value(p) > 0]
    if len(pairs) < 2:
        return math.nan
    x, y = np.asarray(pairs).T
    return float(np.polyfit(x, y, 1)[0])
