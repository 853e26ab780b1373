"""Section of the demo page: spectra, estimator variance and gradient outliers of small nets on the digits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import estimator_variance, fisher_spectrum, gradient_outliers
from benchmarks.common.config import load_config
from benchmarks.common.page import Figure, Section
from benchmarks.common.results import write_json
from benchmarks.common.sections import DemoContext, demo_section
from benchmarks.common.tables import text_table
from benchmarks.fisher.report import Report
from benchmarks.fisher.training import SGDConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SHOWN = {"fisher_spectrum": ("panels", "kfac"), "estimator_variance": ("labels", "norm"), "gradient_outliers": ("outliers",)}
Config = TypeVar("Config")


@demo_section("Looking at the Fisher matrix", order=40)
def fisher_section(context: DemoContext) -> Section:
    """Small versions of ``fisher_spectrum``, ``estimator_variance`` and ``gradient_outliers``."""
    reports = {
        "fisher_spectrum": fisher_spectrum.run(_spectrum_config(context)),
        "estimator_variance": estimator_variance.run(_variance_config(context)),
        "gradient_outliers": gradient_outliers.run(_outlier_config(context)),
    }
    for name, report in reports.items():
        write_json(context.out / f"{name}.json", report.content)
        for table in report.tables[-1:]:
            print(text_table(table.header, table.rows))
    return Section(
        "Looking at the Fisher matrix",
        text=[line for report in reports.values() for line in report.text[:1]],
        tables=[table for name, report in reports.items() for table in _tables(name, report)],
        figures=[figure for name, report in reports.items() for figure in _figures(name, report)],
        notes=[
            f"With more: python -m benchmarks.{name} --config configs/{name}/{config}.yaml --data-root data"
            for name, config in (
                ("fisher_spectrum", "cifar10"),
                ("estimator_variance", "mnist"),
                ("gradient_outliers", "mnist_10k"),
            )
        ],
    )


def _tables(name: str, report: Report) -> list[Any]:
    return report.tables if name == "estimator_variance" else report.tables[-1:]


def _figures(name: str, report: Report) -> list[Figure]:
    return [figure for stem, figure in report.figures.items() if stem in SHOWN[name]]


def _load(kind: type[Config], folder: str, context: DemoContext) -> Config:
    config: Any = load_config(kind, CONFIGS / folder / "digits.yaml")
    return dataclasses.replace(config, out=context.out, device=context.device, seed=context.seed)


def _shorter(training: SGDConfig, context: DemoContext) -> SGDConfig:
    return dataclasses.replace(training, steps=context.budget(training.steps, at_least=5))


def _spectrum_config(context: DemoContext) -> fisher_spectrum.SpectrumConfig:
    config = _load(fisher_spectrum.SpectrumConfig, "fisher_spectrum", context)
    first, *_, last = config.estimates
    return dataclasses.replace(
        config,
        training=_shorter(config.training, context),
        num_fisher=context.budget(300, at_least=20),
        num_seeds=1,
        estimates=[first, last],
    )


def _variance_config(context: DemoContext) -> estimator_variance.VarianceConfig:
    config = _load(estimator_variance.VarianceConfig, "estimator_variance", context)
    return dataclasses.replace(
        config,
        training=_shorter(config.training, context),
        num_draws=context.budget(1000, at_least=10),
        widths=[8, 16],
        num_width_seeds=2,
        num_probes=5,
        snapshots=[0, context.budget(config.training.steps, at_least=5)],
    )


def _outlier_config(context: DemoContext) -> gradient_outliers.OutlierConfig:
    config = _load(gradient_outliers.OutlierConfig, "gradient_outliers", context)
    settings = [dataclasses.replace(s, epochs=max(0.5, s.epochs * min(1.0, context.scale))) for s in config.settings]
    return dataclasses.replace(config, settings=settings, num_checkpoints=context.budget(12, at_least=3))
