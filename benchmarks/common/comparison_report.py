"""Tables and figures of a comparison of optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.common.comparison import Comparison, ComparisonConfig, Contestant, Summary, mean_and_error, median_reach
from benchmarks.common.figures import OPTIMIZER_COLOURS, Curve, line_figure, spread
from benchmarks.common.optimizers import label
from benchmarks.common.page import Figure, Section, Table
from benchmarks.common.train import History

Series = Callable[[History], Sequence[float]]

HEADER = (
    "optimizer",
    "settings",
    "final training loss",
    "test error",
    "steps to target (to lowest)",
    "seconds to target (to lowest)",
    "ms / step",
    "diverged",
)


def comparison_section(
    config: ComparisonConfig, contestants: list[Contestant], comparison: Comparison, title: str, error_name: str
) -> Section:
    """The section of a page: what was done, the table, loss against steps and seconds, test error."""
    reference = label(config.reference)
    text = [
        f"Each optimizer got {config.search.num_trials} trials of hyper-parameter search for the lowest final training "
        f"loss, then {config.num_seeds} seeds at its best setting; {config.task.steps} steps of batch "
        f"{config.task.batch_size}. Lines are medians over the seeds, bands go from the lowest to the highest.",
        f"The target is the median of {reference}'s final training losses, {comparison.median_target:.3g}; its lowest "
        f"is {comparison.best_target:.3g}. Seconds are training time alone, without evaluations.",
    ]
    figures = [
        Figure(_figure(config, contestants, comparison, key="steps"), "Training loss against steps."),
        Figure(_figure(config, contestants, comparison, key="seconds"), "Training loss against training time."),
        Figure(_error_figure(contestants, error_name), f"Test {error_name} against steps."),
    ]
    return Section(title, text, [_table(comparison, error_name)], figures)


def _table(comparison: Comparison, error_name: str) -> Table:
    rows = [summary_row(summary, error_name) for summary in comparison.summaries]
    caption = (
        "Medians over seeds (lowest to highest); test error: mean ± standard error over seeds. Target: the reference's "
        "median final training loss, in brackets its lowest; — missed by half of the seeds or more."
    )
    return Table(caption, HEADER, rows)


def summary_row(summary: Summary, error_name: str) -> list[str]:
    """One row under ``HEADER``."""
    finals = sorted(summary.final_loss)
    middle = finals[len(finals) // 2]
    error, standard_error = mean_and_error(summary.test_error)
    factor, unit = (100.0, " %") if error_name == "error" else (1.0, "")
    spread_text = "" if math.isnan(standard_error) else f" ± {factor * standard_error:.2f}"
    return [
        summary.label,
        ", ".join(f"{key} {_number(value)}" for key, value in summary.settings.items()) or "defaults",
        f"{middle:.2e} ({finals[0]:.1e} to {finals[-1]:.1e})",
        f"{factor * error:.2f}{spread_text}{unit}",
        f"{_reach(summary.reach_steps, '{:.0f}')} ({_reach(summary.reach_best_steps, '{:.0f}')})",
        f"{_reach(summary.reach_seconds, '{:.2f}')} ({_reach(summary.reach_best_seconds, '{:.2f}')})",
        f"{sorted(summary.milliseconds_per_step)[len(summary.milliseconds_per_step) // 2]:.2f}",
        f"{summary.num_diverged} of {len(summary.final_loss)}",
    ]


def _reach(values: Any, form: str) -> str:
    median = median_reach(values)
    return "—" if median is None else form.format(median)


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _curve(contestant: Contestant, x: Series, y: Series) -> Curve | None:
    runs = [run for run in contestant.runs if run.diverged_step is None]
    if not runs:
        return None
    return spread(
        contestant.label,
        [x(run) for run in runs],
        [y(run) for run in runs],
        colour=OPTIMIZER_COLOURS.get(contestant.optimizer),
        style="-" if contestant.search is not None else "--",
    )


def _curves(contestants: list[Contestant], x: Series, y: Series) -> list[Curve]:
    return [curve for curve in (_curve(c, x, y) for c in contestants) if curve is not None]


def _figure(config: ComparisonConfig, contestants: list[Contestant], comparison: Comparison, key: str) -> bytes:
    curves = _curves(contestants, lambda run: getattr(run, key), lambda run: run.train_loss)
    level = (comparison.median_target, f"{label(config.reference)}'s final loss")
    x_label = "step" if key == "steps" else "training time in s"
    return line_figure(curves, x_label=x_label, y_label="training loss in nats", level=level)


def _error_figure(contestants: list[Contestant], error_name: str) -> bytes:
    factor = 100.0 if error_name == "error" else 1.0
    curves = _curves(contestants, lambda run: run.steps, lambda run: [factor * value for value in run.test_error])
    return line_figure(curves, x_label="step", y_label=f"test {error_name}" + (" in %" if error_name == "error" else ""))
