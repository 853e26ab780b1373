"""The findings of the spectrum study in numbers."""

from __future__ import annotations

import torch

from benchmarks.fisher.report import Finding, verdict
from benchmarks.fisher.spectrum.study import BLOCKS, KINDS, TITLES, Spectrum
from kfac_opt.fisher import SpectralDensity

SAME_CURVE = 0.1
"""L1 distance of two broadened curves below which they count as matching; disjoint ones have 2."""
PART = (0.05, 0.95)
"""Common share of two densities that counts as an overlap in part."""
MAX_PRODUCTS = 200
ACCURATE = 0.01
ACCURACY = "(not in the study) block Lanczos with snapped weights, 200 products: Wasserstein-1 at most 1 % of the mean eigenvalue"


def findings(table: dict[tuple[str, str], Spectrum]) -> list[Finding]:
    """The study's three findings in numbers."""
    first = {key: spectrum.estimated[0] for key, spectrum in table.items()}
    label = next(iter(first.values())).estimate.label
    distances = [_curve_distance(table[key].exact, found.density) for key, found in first.items()]
    wasserstein = [found.mean("wasserstein") for found in first.values()]
    matches = sum(distance < SAME_CURVE for distance in distances) / len(distances)
    overlap = {kind: _overlap(table["exact", "full"].exact, table[kind, "full"].exact) for kind in ("mc", "empirical")}
    part = all(PART[0] < value < PART[1] for value in overlap.values())
    smaller = {kind: table[kind, "layer_wise"].exact.largest / table[kind, "full"].exact.largest for kind in KINDS}
    return [
        Finding(
            "SLQ matches the exact density",
            verdict(matches),
            f"broadened curves of {label} differ by {min(distances):.3f} to {max(distances):.3f} in L1 (of 2; below "
            f"{SAME_CURVE:g}: yes); the measures by {min(wasserstein):.2f} to {max(wasserstein):.2f} of the mean eigenvalue",
        ),
        Finding(
            "one sampled label and the empirical matrix overlap with the exact one in part",
            verdict(part),
            f"common share of the eigenvalues per decade: {overlap['mc']:.2f} (sampled), {overlap['empirical']:.2f} "
            f"(empirical); traces {_trace_ratio(table, 'mc'):.2f} and {_trace_ratio(table, 'empirical'):.2f} of the exact one "
            f"(between {PART[0]:g} and {PART[1]:g}: in part)",
        ),
        Finding(
            "the layer-wise matrix has the smaller range",
            verdict(sum(value < 1 for value in smaller.values()) / len(smaller)),
            "λ max of layer-wise over full: " + ", ".join(f"{TITLES[kind]} {value:.2f}" for kind, value in smaller.items()),
        ),
        _accuracy(table),
    ]


def _accuracy(table: dict[tuple[str, str], Spectrum]) -> Finding:
    """The exact Fisher matrix's density by block Lanczos, worst seed of the most accurate block size."""
    worst: dict[str, dict[str, float]] = {}
    others: list[str] = []
    for blocks in BLOCKS:
        for found in table["exact", blocks].estimated:
            name = found.estimate.label
            errors = [error.wasserstein for error in found.errors]
            if found.estimate.method == "block_lanczos" and found.products <= MAX_PRODUCTS:
                worst.setdefault(name, {})[blocks] = max(errors)
            elif found.estimate.node_weights == "quadrature":
                others.append(f"{name} ({found.products} products) {sum(errors) / len(errors):.2g} {TITLES[blocks]}")
    if not worst:
        return Finding(ACCURACY, "not tried", "; ".join(others))
    best = min(worst, key=lambda name: max(worst[name].values()))
    ours = [f"{name}: " + ", ".join(f"{value:.2g} {TITLES[b]}" for b, value in found.items()) for name, found in worst.items()]
    holds = max(worst[best].values()) <= ACCURATE
    return Finding(ACCURACY, verdict(holds), "worst seed of " + "; ".join(ours) + "; means of " + "; ".join(others))


def _trace_ratio(table: dict[tuple[str, str], Spectrum], kind: str) -> float:
    return table[kind, "full"].exact.trace / table["exact", "full"].exact.trace


def _curve_distance(exact: SpectralDensity, estimate: SpectralDensity) -> float:
    """L1 distance of the broadened curves: same grid, same kernel."""
    sigma = exact.default_sigma
    grid = exact.grid(4000, sigma)
    return float(torch.trapezoid((exact.density(grid, sigma) - estimate.density(grid, sigma)).abs(), grid))


def _overlap(left: SpectralDensity, right: SpectralDensity) -> float:
    """Common share of two densities per decade, of the eigenvalues above the floor; 1 when they are equal."""
    floor = left.default_floor()
    grid = torch.logspace(-12, 6, 4000, dtype=torch.float64) * left.largest
    common = torch.minimum(left.log_density(grid, floor), right.log_density(grid, floor))
    mass = max(1 - left.fraction_below(floor), 1 - right.fraction_below(floor))
    return float(torch.trapezoid(common, grid.log10())) / mass
