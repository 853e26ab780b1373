"""How noisy is a Fisher matrix from sampled labels? Variance against labels, width and weight norm (Soen & Sun 2021).

    python -m benchmarks.estimator_variance --config configs/estimator_variance/mnist.yaml --data-root data

Everything is computed in closed form, for both estimators (outer products of the scores, and the Hessian with sampled
labels), and held against matrices from really sampled labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.command import run_command
from benchmarks.common.data import load_data
from benchmarks.common.page import Table
from benchmarks.common.progress import progress
from benchmarks.fisher.report import Report, findings_table, run_script
from benchmarks.fisher.training import evaluate, train_sgd
from benchmarks.fisher.variance.checks import Check, SampledErrors, check_averages, check_labels
from benchmarks.fisher.variance.findings import findings
from benchmarks.fisher.variance.pictures import pictures
from benchmarks.fisher.variance.study import Point, VarianceConfig, flat, fresh_nets, mlp, scaled, variance_of
from kfac_opt.fisher import EstimatorVariance, decay_for, effective_labels

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "estimator_variance" / "digits.yaml"
LAYER_HEADER = (
    "layer", "√Var / ‖F‖, one label", "with the average", "labels for 10 %", "factor_decay for 10 %", "‖Cov‖ / bound",
    "‖∂h/∂W‖ / bound",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> Report:
    """All sweeps; prints the tables, writes PNG, page, TensorBoard and JSON."""
    return run_script(VarianceConfig, run, arguments, __doc__ or "", DEFAULT_CONFIG)


def run(config: VarianceConfig) -> Report:
    """The experiment without its files."""
    dataset = load_data(config.data, config.data_root).to(config.device)
    inputs = dataset.train_inputs[: config.num_inputs].flatten(1)
    model = mlp(config, dataset, config.hidden, config.seed)
    snapshots: list[Point] = []

    def look(step: int) -> None:
        if step in config.snapshots:
            snapshots.append(Point.of(step, variance_of(config, model, inputs)))

    with progress(4 + len(config.widths) + len(config.norms), config.name) as display:
        train_sgd(model, flat(dataset), config.training, config.seed, on_step=look)
        display.advance(note="training")
        test_error = evaluate(model, dataset.test_inputs.flatten(1), dataset.test_targets)[1]
        found = variance_of(config, model, inputs)
        errors = SampledErrors(model, inputs)
        labels = check_labels(config, errors, found)
        display.advance(note="labels")
        averages = check_averages(config, errors, found)
        display.advance(note="averages")
        widths = []
        for width in config.widths:
            widths.append(fresh_nets(config, dataset, inputs, width))
            display.advance(note=f"width {width}")
        norms = []
        for factor in config.norms:
            norms.append(Point.of(factor, variance_of(config, scaled(model, factor), inputs)))
            display.advance(note=f"weights × {factor:g}")
    return make_report(config, found, labels, averages, snapshots, widths, norms, test_error)


def make_report(
    config: VarianceConfig,
    found: EstimatorVariance,
    labels: list[Check],
    averages: list[Check],
    snapshots: list[Point],
    widths: list[Point],
    norms: list[Point],
    test_error: float,
) -> Report:
    """Tables, figures, findings and the sentences about label_samples and factor_decay."""
    report = Report(
        title=f"Variance of the Fisher estimators: {config.name}",
        text=[
            f"Fully connected net {config.hidden} ({config.activation}) after {config.training.steps} steps of SGD on "
            f"{config.data.name} (test error {100 * test_error:.1f} %), {config.num_inputs} training inputs as one batch. "
            "I1: outer products of scores of sampled labels, what K-FAC's default averages; I2: the Hessian of the loss with "
            f"sampled labels. I1 in closed form; I2 from {config.num_probes} random vectors per layer.",
            *found.describe(config.label_samples, config.factor_decay).splitlines()[:1],
        ],
        findings=findings(config, found, labels, averages, snapshots, widths, norms),
        notes=found.describe(config.label_samples, config.factor_decay).splitlines(),
    )
    report.tables = [
        Table(
            f"Relative error of one layer's block from one batch with one label, averaged with factor_decay "
            f"{config.factor_decay:g} (worth {effective_labels(config.label_samples, config.factor_decay):.3g} labels), and "
            "what an error of 10 % needs.",
            LAYER_HEADER,
            _layer_rows(config, found),
        ),
        findings_table("Soen & Sun", report.findings),
    ]
    report.figures = pictures(config, labels, averages, snapshots, widths, norms)
    report.content = {
        "network": _numbers(found),
        "layers": {name: _numbers(layer) for name, layer in found.layers.items()},
        "labels": [vars(check) for check in labels],
        "averages": [vars(check) for check in averages],
        "training": [vars(point) for point in snapshots],
        "widths": [vars(point) for point in widths],
        "norms": [vars(point) for point in norms],
        "test_error": test_error,
    }
    report.scalars = {"training/relative_error": [(int(p.x), math.sqrt(p.total) / p.fisher_norm) for p in snapshots]}
    return report


def _numbers(part: Any) -> dict[str, Any]:
    second = part.second
    return {
        "total_variance": part.total_variance,
        "covariance_norm": part.covariance_norm,
        "bound": part.bound,
        "fisher_norm": part.fisher_norm,
        "relative_error": part.relative_error(),
        "spectral_norm": part.spectral_norm,
        "spectral_bound": part.spectral_bound,
        "second": None if second is None else vars(second),
    }


def _layer_rows(config: VarianceConfig, found: EstimatorVariance) -> list[list[str]]:
    rows = []
    for part in [*found.layers.values(), found]:
        needed = part.labels_for(0.1)
        bound = part.spectral_bound
        rows.append(
            [
                part.name,
                f"{part.relative_error(1):.3f}",
                f"{part.relative_error(config.label_samples, config.factor_decay):.3f}",
                f"{needed:.3g}",
                f"{decay_for(needed, config.label_samples):.4f}",
                f"{part.covariance_norm / part.bound:.2g}" if part.bound else "—",
                "—" if bound is None else f"{part.spectral_norm / bound:.2g}",
            ]
        )
    return rows


if __name__ == "__main__":
    run_command(main)
