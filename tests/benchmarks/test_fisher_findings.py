"""Verdicts of the Fisher studies follow from their numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.common.data import DataConfig
from benchmarks.fisher.outliers.findings import findings as outlier_findings
from benchmarks.fisher.outliers.study import Moment, Run, Setting
from benchmarks.fisher.spectrum.findings import ACCURACY
from benchmarks.fisher.spectrum.findings import findings as spectrum_findings
from benchmarks.fisher.spectrum.study import BLOCKS, KINDS, EstimateConfig, Estimated, Spectrum
from benchmarks.fisher.variance.checks import Check
from benchmarks.fisher.variance.findings import findings as variance_findings
from benchmarks.fisher.variance.study import Point, VarianceConfig
from kfac_opt.fisher import SpectralDensity, estimator_variance
from tests.support import data, mlp


def run(losses: list[float], outliers: list[float], trimmed: float = 0.1, small: float = 0.9) -> Run:
    part = {"eigenvalue": 1.0, "trimmed_eigenvalue": trimmed, "small_share": small}
    moments = [
        Moment(step, float(step), loss, loss, 0.5, {"(network)": {**part, "outliers": n}, "0": {**part, "outliers": n}}, [], [])
        for step, (loss, n) in enumerate(zip(losses, outliers))
    ]
    return Run(Setting(0.1, 16, 4), moments)


FALLING = [2.0, 1.5, 1.0, 0.5, 0.9, 1.5, 2.5]


@pytest.mark.parametrize(
    ("losses", "outliers", "trimmed", "verdicts"),
    [
        (FALLING, [0, 0, 1, 5, 90, 95, 99], 0.1, ["yes", "yes"]),  # next to the lowest loss
        ([2.0, 0.6, 0.55, 0.52, 0.51, 0.5, 0.7], [0, 90, 91, 92, 93, 94, 95], 0.5, ["no", "in part"]),  # loss nearly down
        ([2.0, 1.8, 1.5, 1.2, 0.9, 0.5, 0.6], [0, 90, 91, 92, 93, 94, 95], 0.3, ["yes", "no"]),  # long before
        ([2.0, 0.5, 0.9, 1.5, 2.5, 3.0, 3.5], [0, 0, 0, 0, 0, 1, 90], 0.3, ["yes", "no"]),  # long after
        ([2.0, 1.8, 1.5, 1.2, 0.9, 0.6, 0.5], [0, 0, 0, 0, 0, 1, 90], 0.3, ["yes", "not tried"]),  # no minimum inside
        ([2.0, 2.0, 1.99, 1.98, 1.97, 1.97, 1.98], [0, 0, 0, 0, 0, 50, 90], 0.9, ["not tried", "yes"]),  # has not learned
    ],
)
def test_outlier_verdicts(losses, outliers, trimmed, verdicts):
    found = outlier_findings([run(losses, outliers, trimmed)])
    assert [finding.verdict for finding in found[:2]] == verdicts


def test_share_of_runs_makes_in_part():
    found = outlier_findings([run(FALLING, [0, 0, 1, 5, 90, 95, 99], 0.1), run(FALLING, [0, 0, 1, 5, 90, 95, 99], 0.9, 0.1)])
    assert [finding.verdict for finding in found] == ["in part", "yes", "in part"]
    assert "10.0% to 90.0%" in found[0].ours


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
            estimated = Estimated(estimate, [wrong.errors(exact)], 1.0, 200, wrong)
            table[kind, blocks] = Spectrum(kind, blocks, exact, 1.0, "dense", [estimated])
    return table


def test_spectrum_verdicts():
    good = {finding.statement: finding for finding in spectrum_findings(spectra(0.002, 0.5))}
    bad = {finding.statement: finding for finding in spectrum_findings(spectra(0.5, 2.0))}
    assert [finding.verdict for finding in good.values()] == ["yes", "yes", "yes", "yes"]
    assert [finding.verdict for finding in bad.values()] == ["no", "yes", "no", "no"]
    assert "0.002 full, 0.002 layer-wise" in good[ACCURACY].ours


def test_variance_verdicts_turn_with_the_numbers():
    x, _ = data(3)
    found = estimator_variance(mlp(), x)
    config = VarianceConfig("test", DataConfig("digits"), [3])
    checks = [Check(m, 1.0 / m, 1.0 / m, 0.9 / m, 1.1 / m) for m in (1, 2)]
    points = [Point(w, w**2, w**2, 10 * w**2, 1.0, 0.1, 0.1, 1.0) for w in (0.5, 1.0, 2.0)]

    def verdicts(labels, norms) -> dict[str, tuple[str, str]]:
        told = variance_findings(config, found, labels, checks, points, points, norms)
        return {finding.statement[:24]: (finding.verdict, finding.ours) for finding in told}

    good = verdicts(checks, points)
    assert good["the variance falls as 1/"][0] == "yes"
    assert good["‖Cov(I1)‖ ≤ ‖J‖⁴ ‖K − H⊗"][0] == "yes"
    assert good["the variance follows the"][0] == "yes"
    assert "to 4 times at × 2" in good["the variance follows the"][1]
    off = [replace(check, low=2.0, high=3.0) for check in checks]
    loose = [replace(point, bound=0.5 * point.covariance) for point in points]
    assert verdicts(off, points)["the variance falls as 1/"][0] == "no"
    assert verdicts(checks, loose)["‖Cov(I1)‖ ≤ ‖J‖⁴ ‖K − H⊗"][0] == "no"
    shrinking = [replace(point, covariance=1 / point.x, bound=2 / point.x) for point in points]
    assert verdicts(checks, shrinking)["the variance follows the"][0] == "no"
    assert "the predictions are sure" in verdicts(checks, shrinking)["the variance follows the"][1]
