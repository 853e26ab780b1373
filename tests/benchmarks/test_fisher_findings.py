"""Verdicts of the Fisher studies follow from their numbers."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from benchmarks.common.data import DataConfig
from benchmarks.estimator_variance import VarianceConfig
from benchmarks.estimator_variance import findings as variance_findings
from benchmarks.fisher_spectrum import BLOCKS, KINDS, EstimateConfig, Estimated, Spectrum
from benchmarks.fisher_spectrum import findings as spectrum_findings
from benchmarks.gradient_outliers import Run, Setting
from benchmarks.gradient_outliers import findings as outlier_findings
from kfac_opt.fisher import SpectralDensity, estimator_variance
from tests.support import data, mlp


def run(losses: list[float], outliers: list[float], trimmed: float = 0.1, small: float = 0.9, lr: float = 0.1) -> Run:
    part = {"eigenvalue": 1.0, "trimmed_eigenvalue": trimmed, "small_share": small}
    moments = [
        {"epoch": float(step), "validation_loss": loss, "parts": {"(network)": {**part, "outliers": n}}}
        for step, (loss, n) in enumerate(zip(losses, outliers, strict=True))
    ]
    return Run(Setting(lr, 16, 4), pd.DataFrame(moments))


FALLING = [2.0, 1.5, 1.0, 0.5, 0.9, 1.5, 2.5]


@pytest.mark.parametrize(
    ("losses", "outliers", "trimmed", "verdicts"),
    [
        (FALLING, [0, 0, 1, 5, 90, 95, 99], 0.1, ["yes", "yes"]),  # next to the lowest loss
        ([2.0, 0.6, 0.55, 0.52, 0.51, 0.5, 0.7], [0, 90, 91, 92, 93, 94, 95], 0.5, ["no", "in part"]),  # loss nearly down
        ([2.0, 1.8, 1.5, 1.2, 0.9, 0.5, 0.6], [0, 90, 91, 92, 93, 94, 95], 0.3, ["yes", "no"]),  # long before
        ([2.0, 0.5, 0.9, 1.5, 2.5, 3.0, 3.5], [0, 0, 0, 0, 0, 1, 90], 0.3, ["yes", "no"]),  # long after
        ([2.0, 1.8, 1.5, 1.2, 0.9, 0.6, 0.5], [0, 0, 0, 0, 0, 1, 90], 0.3, ["yes", "not shown"]),  # no minimum inside
        ([2.0, 2.0, 1.99, 1.98, 1.97, 1.97, 1.98], [0, 0, 0, 0, 0, 50, 90], 0.9, ["not shown", "yes"]),  # has not learned
    ],
)
def test_outlier_verdicts(losses, outliers, trimmed, verdicts):
    found = outlier_findings([run(losses, outliers, trimmed)])
    assert [finding.verdict for finding in found[:2]] == verdicts


def test_share_of_runs_makes_in_part():
    rising = [0, 0, 1, 5, 90, 95, 99]
    found = outlier_findings([run(FALLING, rising, 0.1), run(FALLING, rising, 0.9, 0.1, lr=0.2)])
    assert [finding.verdict for finding in found] == ["in part", "yes", "in part"]
    assert list(found[0].numbers.values()) == pytest.approx([0.9, 0.1])


def density(values: list[float]) -> SpectralDensity:
    nodes = torch.tensor(values, dtype=torch.float64).sort().values
    return SpectralDensity(nodes, torch.full_like(nodes, 1 / len(nodes)), len(nodes), "test", 200)


def spectra(shift: float, layer_wise: float) -> dict[tuple[str, str], Spectrum]:
    table = {}
    for kind in KINDS:
        for blocks in BLOCKS:
            scale = layer_wise if blocks == "layer_wise" else 1.0
            other = 1.0 if kind == "exact" else 10.0
            exact = density([scale * v for v in (0.001 * other, 0.01 * other, 0.1, 1.0)])
            wrong = SpectralDensity(exact.nodes + shift * exact.mean, exact.weights, exact.size, "test", 200)
            estimate = EstimateConfig("block_lanczos", 4, 50, "snapped")
            estimated = Estimated(estimate, [wrong.errors(exact)], 1.0, wrong)
            table[kind, blocks] = Spectrum(kind, blocks, exact, 1.0, "dense", [estimated])
    return table


def test_spectrum_verdicts():
    good = {finding.statement: finding for finding in spectrum_findings(spectra(0.002, 0.5))}
    bad = {finding.statement: finding for finding in spectrum_findings(spectra(0.5, 2.0))}
    assert [finding.verdict for finding in good.values()] == ["yes", "yes", "yes", "yes"]
    assert [finding.verdict for finding in bad.values()] == ["no", "yes", "no", "no"]
    assert list(good.values())[-1].numbers == {"block Lanczos 4 × 50, snapped": pytest.approx(0.002)}


def test_variance_verdicts_turn_with_the_numbers():
    x, _ = data(3)
    found = estimator_variance(mlp(), x)
    config = VarianceConfig(name="test", data=DataConfig("digits"), hidden=[3])
    checks = pd.DataFrame({"x": m, "predicted": 1 / m, "seen": 1 / m, "low": 0.9 / m, "high": 1.1 / m} for m in (1, 2))
    second = {"second_total": 0.1, "second_covariance": 0.1, "second_bound": 1.0, "fisher_norm": 1.0}
    points = pd.DataFrame({"x": w, "total": w**2, "covariance": w**2, "bound": 10 * w**2, **second} for w in (0.5, 1.0, 2.0))

    def verdicts(labels: pd.DataFrame, norms: pd.DataFrame) -> dict[str, str]:
        told = variance_findings(config, found, labels, checks, {"training": points, "widths": points, "norms": norms})
        return {finding.statement[:24]: finding.verdict for finding in told}

    good = verdicts(checks, points)
    assert good["the variance falls as 1/"] == "yes"
    assert good["‖Cov(I1)‖ ≤ ‖J‖⁴ ‖K − H⊗"] == "yes"
    assert good["the variance follows the"] == "yes"
    loose = points.assign(bound=0.5 * points["covariance"])
    assert verdicts(checks.assign(low=2.0, high=3.0), points)["the variance falls as 1/"] == "no"
    assert verdicts(checks, loose)["‖Cov(I1)‖ ≤ ‖J‖⁴ ‖K − H⊗"] == "no"
    shrinking = points.assign(covariance=1 / points["x"], bound=2 / points["x"])
    assert verdicts(checks, shrinking)["the variance follows the"] == "no"
