"""Spectra of the Fisher matrix of a trained net: the study by Ishii and Yokota, and how accurate each estimate is.

    python -m benchmarks.fisher_spectrum --config configs/fisher_spectrum/cifar10.yaml --data-root data

Six panels (exact, one sampled label, empirical × full, layer-wise) show stochastic Lanczos quadrature over all
eigenvalues; a table holds the Wasserstein error of quadrature, snapped quadrature and block Lanczos; the last figure
sets the spectrum of K-FAC's Kronecker approximation beside the true one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common.command import run_command
from benchmarks.common.data import load_data
from benchmarks.common.models import build_model
from benchmarks.common.page import Figure, Table
from benchmarks.fisher import nets  # noqa: F401
from benchmarks.fisher.report import Report, findings_table, run_script
from benchmarks.fisher.spectrum.findings import findings
from benchmarks.fisher.spectrum.pictures import kfac_figure, panels_figure
from benchmarks.fisher.spectrum.study import (
    BLOCKS,
    KINDS,
    TITLES,
    Spectrum,
    SpectrumConfig,
    fisher_examples,
    kfac_spectrum,
    measure,
)
from benchmarks.fisher.training import evaluate, train_sgd
from kfac_opt.fisher import SpectralDensity

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "fisher_spectrum" / "digits.yaml"
HEADER = ("kind", "blocks", "estimate", "products", "Wasserstein-1 / mean", "trace", "Σλ²", "λ max", "seconds")


def main(arguments: Sequence[str] | None = None) -> Report:
    """Trains the net, computes all spectra, prints the table, writes PNG, page, TensorBoard and JSON."""
    return run_script(SpectrumConfig, run, arguments, __doc__ or "", DEFAULT_CONFIG)


def run(config: SpectrumConfig) -> Report:
    """The experiment without its files."""
    dataset = load_data(config.data, config.data_root).to(config.device)
    model = build_model(config.model, config.seed).to(config.device)
    train_loss = train_sgd(model, dataset, config.training, config.seed)
    _, test_error = evaluate(model, dataset.test_inputs, dataset.test_targets)
    examples = fisher_examples(config, dataset)
    spectra = [measure(config, model, examples, kind, blocks) for kind, blocks in itertools.product(KINDS, BLOCKS)]
    kfac = kfac_spectrum(model, examples[0])
    return make_report(config, spectra, kfac, train_loss, test_error)


def make_report(
    config: SpectrumConfig, spectra: list[Spectrum], kfac: SpectralDensity, train_loss: float, test_error: float
) -> Report:
    """Tables, figures and findings."""
    table = {(spectrum.kind, spectrum.blocks): spectrum for spectrum in spectra}
    size = spectra[0].exact.size
    full, by_layer = table["exact", "full"].exact, table["exact", "layer_wise"].exact
    report = Report(
        title=f"Spectra of the Fisher matrix: {config.name}",
        text=[
            f"{config.model['name']} with {size} parameters after {config.training.steps} steps of SGD on "
            f"{config.data.name} (training loss {train_loss:.3g}, test error {100 * test_error:.1f} %), matrix over "
            f"{config.num_fisher} training examples. Errors are means over {config.num_seeds} seeds: Wasserstein-1 distance of "
            "the unbroadened measures over the mean eigenvalue ('everything at zero' scores 1), relative errors of trace, "
            "Σλ² and λ max."
        ],
        findings=findings(table),
    )
    report.tables = [
        Table("Estimates against all eigenvalues.", HEADER, [row for spectrum in spectra for row in _rows(spectrum)]),
        findings_table("Ishii & Yokota", report.findings),
    ]
    report.figures = {
        "panels": Figure(panels_figure(table, axis="linear"), _panel_caption(config)),
        "panels_log": Figure(
            panels_figure(table, axis="log"),
            "The same matrices per decade of eigenvalue (kernel 0.15 decades): all eigenvalues, and the most accurate "
            "estimate of the table. The legend says which share lies below the axis.",
        ),
        "kfac": Figure(
            kfac_figure(table, kfac),
            f"K-FAC's Kronecker approximation beside the true matrix: trace {kfac.trace:.3g} against {full.trace:.3g}, "
            f"λ max {kfac.largest:.3g} against {full.largest:.3g} (full) and {by_layer.largest:.3g} (layer-wise).",
        ),
    }
    report.content = {
        "parameters": size,
        "train_loss": train_loss,
        "test_error": test_error,
        "spectra": [_plain(spectrum) for spectrum in spectra],
        "kfac": {"trace": kfac.trace, "largest": kfac.largest, "squares": kfac.moment(2) * size},
    }
    report.scalars = {
        f"wasserstein/{s.kind}/{s.blocks}/{e.estimate.label}": [(0, e.mean("wasserstein"))] for s in spectra for e in s.estimated
    }
    return report


def _rows(spectrum: Spectrum) -> list[list[str]]:
    rows = []
    for found in spectrum.estimated:
        rows.append(
            [
                TITLES[spectrum.kind],
                TITLES[spectrum.blocks],
                found.estimate.label,
                str(found.products),
                f"{found.mean('wasserstein'):.4f}",
                f"{found.mean('trace'):.1e}",
                f"{found.mean('squares'):.1e}",
                f"{found.mean('top'):.1e}",
                f"{found.seconds:.2f}",
            ]
        )
    exact = ["all eigenvalues", "—", "0", "0", "0", "0", f"{spectrum.exact_seconds:.2f}"]
    return [*rows, [TITLES[spectrum.kind], TITLES[spectrum.blocks], *exact]]


def _plain(spectrum: Spectrum) -> dict[str, Any]:
    exact = spectrum.exact
    return {
        "kind": spectrum.kind,
        "blocks": spectrum.blocks,
        "route": spectrum.route,
        "trace": exact.trace,
        "largest": exact.largest,
        "squares": exact.moment(2) * exact.size,
        "fraction_below": exact.fraction_below(),
        "exact_seconds": spectrum.exact_seconds,
        "estimates": [
            {
                "label": found.estimate.label,
                "products": found.products,
                "seconds": found.seconds,
                "errors": [asdict(error) for error in found.errors],
            }
            for found in spectrum.estimated
        ],
    }


def _panel_caption(config: SpectrumConfig) -> str:
    return (
        f"The study's figure: density of the eigenvalues, all of them (line) and {config.estimates[0].label} (dashed), "
        "Gaussian kernel of 1 % of the range, same grid and kernel for both, logarithmic ordinate."
    )


if __name__ == "__main__":
    run_command(main)
