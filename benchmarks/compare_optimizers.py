"""SGD, AdamW, Muon, KFAC and EKFAC on one task, with equal search budgets and several seeds.

    python -m benchmarks.compare_optimizers --config configs/compare_optimizers/mnist_mlp.yaml --data-root ~/data

Stopped at any point, the same command goes on: trials are kept by optuna, runs as one JSON file each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.command import run_command
from benchmarks.common.comparison import Comparison, ComparisonConfig, Contestant, run_comparison, summarize
from benchmarks.common.comparison_report import HEADER, comparison_section, summary_row
from benchmarks.common.config import parse_arguments
from benchmarks.common.figures import save_png
from benchmarks.common.page import machine_footer, write_page
from benchmarks.common.results import describe_machine, describe_versions, provenance, write_json
from benchmarks.common.tables import text_table

MAX_KEPT_POINTS = 60


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs the comparison of a config and returns the path of its page."""
    config = parse_arguments(ComparisonConfig, arguments, description="Compare optimizers on one task with equal search budgets.")
    contestants = run_comparison(config)
    comparison = summarize(config, contestants)
    page = write_report(config, contestants, comparison)
    error_name = _error_name(config)
    print(text_table(HEADER, [summary_row(summary, error_name) for summary in comparison.summaries]))
    print(f"target: {comparison.median_target:.4g} (lowest {comparison.best_target:.4g})")
    print(f"page: {page}")
    return page


def write_report(config: ComparisonConfig, contestants: list[Contestant], comparison: Comparison) -> Path:
    """Results as JSON, figures as PNG, the page; and the small summary in ``config.keep``."""
    folder = config.out / config.name
    content: dict[str, Any] = {**provenance(config, config.seed, config.device), **comparison.to_dict()}
    content["curves"] = {c.name: [_thin(run.to_dict()) for run in c.runs] for c in contestants}
    write_json(folder / "results.json", {**content, "trials": {c.name: c.search and c.search.trials for c in contestants}})
    if config.keep is not None:
        write_json(config.keep / f"{config.name}.json", content)
    section = comparison_section(config, contestants, comparison, config.name.replace("_", " "), _error_name(config))
    for figure, stem in zip(section.figures, ("loss_steps", "loss_seconds", "test_error"), strict=True):
        save_png(folder / f"{stem}.png", figure.png)
    footer = machine_footer(describe_machine(config.device), describe_versions())
    return write_page(folder / "index.html", f"Optimizers compared: {config.name}", [section], footer=footer)


def _error_name(config: ComparisonConfig) -> str:
    return "error" if config.task.likelihood == "categorical" else "squared error"


def _thin(history: dict[str, Any]) -> dict[str, Any]:
    """A run without its mini-batch losses and with at most ``MAX_KEPT_POINTS`` evaluations, the last one among them."""
    stride = -(-len(history["steps"]) // MAX_KEPT_POINTS)
    kept = sorted({*range(0, len(history["steps"]), stride), len(history["steps"]) - 1})
    series = {key: value for key, value in history.items() if isinstance(value, list) and key != "batch_loss"}
    points = {key: [_short(value[index]) for index in kept] for key, value in series.items()}
    return {**points, "diverged_step": history["diverged_step"]}


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")


if __name__ == "__main__":
    run_command(main)
