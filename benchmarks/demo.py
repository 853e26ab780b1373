"""The main job in a few minutes, without a download: ``make demo``, or ``python -m benchmarks.demo``.

Every section is an experiment with a small budget on the digits that scikit-learn ships; all end on one HTML page, whose
path is printed.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import compare_optimizers, damping_sweep, estimator_variance, fisher_spectrum, gradient_outliers, kfac_vi
from benchmarks.common.command import run_command
from benchmarks.common.config import LOCAL, ConfigError, ExperimentConfig, load_config, parse_arguments
from benchmarks.common.report import CONFIGS, Report, print_report, write_page, write_report
from benchmarks.damping.config import SweepConfig
from benchmarks.vi.config import VIConfig

replace = dataclasses.replace


@dataclass(frozen=True, kw_only=True)
class DemoConfig(ExperimentConfig):
    """What the demo does.

    Attributes:
        scale: factor on all budgets; 1 is the demo, tests use less.
        only: titles of the sections to run; empty means all.
    """

    name: str = "demo"
    scale: float = 1.0
    only: list[str] = field(default_factory=list)
    out: Path = field(default=Path("out/demo"), metadata=LOCAL)

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be a finite number > 0, got {self.scale}")
        unknown = set(self.only) - {section.title for section in SECTIONS}
        if unknown:
            raise ConfigError(f"only: unknown sections {sorted(unknown)}; allowed: {[s.title for s in SECTIONS]}.")

    def budget(self, number: int, at_least: int = 1) -> int:
        """``number`` scaled, but never below ``at_least``."""
        return max(at_least, round(number * self.scale))


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        config: class and file of the experiment's config; ``smaller`` cuts its budgets.
        figures: shown on the page; empty means all.
        more: command for the larger budget.
    """

    title: str
    run: Callable[[Any], Report]
    config: tuple[type[Any], str]
    smaller: Callable[[Any, DemoConfig], Any]
    more: str
    figures: tuple[str, ...] = ()


def _comparison(config: Any, demo: DemoConfig) -> Any:
    search = replace(config.search, num_trials=demo.budget(config.search.num_trials))
    task = replace(config.task, steps=demo.budget(config.task.steps, at_least=10))
    return replace(config, num_seeds=demo.budget(config.num_seeds), search=search, task=task)


def _sweep(config: Any, demo: DemoConfig) -> Any:
    trials, steps = demo.budget(config.num_trials), demo.budget(config.task.steps, at_least=12)
    return replace(
        config,
        training_seed=demo.seed,
        num_trials=trials,
        num_kept=min(trials, demo.budget(config.num_kept)),
        task=replace(config.task, steps=steps, eval_interval=max(1, steps // 3)),
        histogram=replace(config.histogram, interval=max(1, steps // 3)),
    )


def _uncertainty(config: Any, demo: DemoConfig) -> Any:
    epochs, evaluations = max(2.0, config.epochs * demo.scale), demo.budget(config.evaluations, at_least=2)
    return replace(config, num_seeds=demo.budget(config.num_seeds), epochs=epochs, evaluations=evaluations)


def _spectrum(config: Any, demo: DemoConfig) -> Any:
    first, *_, last = config.estimates
    training = replace(config.training, steps=demo.budget(config.training.steps, at_least=5))
    num_fisher = demo.budget(300, at_least=20)
    return replace(config, training=training, num_fisher=num_fisher, num_seeds=1, estimates=[first, last])


def _variance(config: Any, demo: DemoConfig) -> Any:
    steps = demo.budget(config.training.steps, at_least=5)
    few = {"widths": [8, 16], "num_width_seeds": 2, "num_probes": 5, "snapshots": [0, steps]}
    return replace(config, training=replace(config.training, steps=steps), num_draws=demo.budget(1000, at_least=10), **few)


def _outliers(config: Any, demo: DemoConfig) -> Any:
    settings = [replace(s, epochs=max(0.5, s.epochs * min(1.0, demo.scale))) for s in config.settings]
    return replace(config, settings=settings, num_checkpoints=demo.budget(12, at_least=3))


SECTIONS = (
    Section(
        "Optimizers compared",
        compare_optimizers.run,
        (compare_optimizers.ComparisonConfig, "compare_optimizers/demo.yaml"),
        _comparison,
        "compare_optimizers --config configs/compare_optimizers/digits_mlp.yaml",
    ),
    Section(
        "The effect of damping",
        damping_sweep.run,
        (SweepConfig, "damping_sweep/demo.yaml"),
        _sweep,
        "damping_sweep --config configs/damping_sweep/digits.yaml",
    ),
    Section(
        "Weight uncertainty",
        kfac_vi.run,
        (VIConfig, "kfac_vi/demo.yaml"),
        _uncertainty,
        "kfac_vi --config configs/kfac_vi/digits.yaml",
    ),
    Section(
        "The spectrum of the Fisher matrix",
        fisher_spectrum.run,
        (fisher_spectrum.SpectrumConfig, "fisher_spectrum/digits.yaml"),
        _spectrum,
        "fisher_spectrum --config configs/fisher_spectrum/cifar10.yaml --data-root data",
        ("panels", "kfac"),
    ),
    Section(
        "The noise of its estimates",
        estimator_variance.run,
        (estimator_variance.VarianceConfig, "estimator_variance/digits.yaml"),
        _variance,
        "estimator_variance --config configs/estimator_variance/mnist.yaml --data-root data",
        ("labels", "norm"),
    ),
    Section(
        "Examples that carry the gradient",
        gradient_outliers.run,
        (gradient_outliers.OutlierConfig, "gradient_outliers/digits.yaml"),
        _outliers,
        "gradient_outliers --config configs/gradient_outliers/mnist_10k.yaml --data-root data",
        ("outliers",),
    ),
)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs all sections, writes the page, prints and returns its path."""
    config = parse_arguments(DemoConfig, arguments, description="KFAC against SGD and AdamW on real digits.")
    torch.set_num_threads(config.threads)
    start, reports = time.monotonic(), []
    chosen = [section for section in SECTIONS if not config.only or section.title in config.only]
    for number, section in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {section.title}", file=sys.stderr, flush=True)
        reports.append(run_section(section, config))
    intro = (
        f"Made by make demo in {tqdm.format_interval(time.monotonic() - start)} minutes on the 8 × 8 digits that scikit-learn "
        "ships (1437 images to train on, 360 to test)."
    )
    page = write_page(config.out, "kfac_opt on real data", reports, config.device, [intro])
    print(page)
    return page


def run_section(section: Section, demo: DemoConfig) -> Report:
    """One experiment with a small budget, as a part of the page."""
    kind, file = section.config
    config = section.smaller(load_config(kind, CONFIGS / file), demo)
    name = "_".join(section.title.lower().split())
    config = replace(config, name=name, out=demo.out, device=demo.device, seed=demo.seed)
    shutil.rmtree(config.folder, ignore_errors=True)  # the demo shows what this code does now, not earlier trials
    report = section.run(config)
    write_report(report, config)
    print_report(report)
    report.title, report.place, report.notes = section.title, f"{name}/", [f"With more: python -m benchmarks.{section.more}"]
    report.figures = {stem: figure for stem, figure in report.figures.items() if not section.figures or stem in section.figures}
    return report


if __name__ == "__main__":
    run_command(main)
