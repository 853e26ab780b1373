"""Damping that adapts itself against the best fixed damping of a grid, from starts that are far off.

    python -m benchmarks.damping_rules --config configs/damping_rules/mnist.yaml --data-root ~/data

Stopped at any point, the same command goes on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.command import run_command
from benchmarks.common.config import parse_arguments
from benchmarks.common.figures import COLOURS, Curve, line_figure, save_png
from benchmarks.common.page import Figure, Section, Table, machine_footer, write_page
from benchmarks.common.results import describe_machine, describe_versions, provenance, write_json
from benchmarks.common.tables import text_table
from benchmarks.damping.rules import Line, RuleRun, RulesConfig, lines, run_rules

HEADER = ("damping", "final loss", "relative", "area", "relative", "test error", "extra time", "diverged")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs what is missing, writes page and summary, returns the page."""
    config = parse_arguments(RulesConfig, arguments, description="Adaptive damping against the best fixed damping.")
    runs = run_rules(config)
    section, content = make_section(config, runs, config.name.replace("_", " "))
    footer = machine_footer(describe_machine(config.device), describe_versions())
    folders = [config.folder] if config.keep is None else [config.folder, config.keep]
    for folder in folders:
        write_json(folder / "summary.json", {**provenance(config, config.seed, config.device), **content})
        for stem, figure in zip(("learning_curves", "dampings"), section.figures, strict=True):
            save_png(folder / f"{stem}.png", figure.png)
    page = write_page(config.folder / "index.html", f"Adaptive damping: {config.name}", [section], footer=footer)
    print(text_table(HEADER, section.tables[0].rows))
    print(f"page: {page}")
    return page


def make_section(config: RulesConfig, runs: dict[str, list[RuleRun]], title: str) -> tuple[Section, dict[str, Any]]:
    """The page's section and the numbers behind it."""
    all_lines = lines(config)
    fixed = [line for line in all_lines if line.rule is None and line.name not in config.tuned]
    best = min(fixed, key=lambda line: _median(runs[line.name], "final_loss"))
    best_area = min(fixed, key=lambda line: _median(runs[line.name], "area"))
    targets = (_median(runs[best.name], "final_loss"), _median(runs[best.name], "area"))
    rows = [_row(line, runs[line.name], targets) for line in all_lines]
    caption = (
        f"Medians over {config.num_seeds} seeds (lowest to highest); relative: to the fixed damping with the lowest final "
        f"loss, {best.damping:.0e} (the lowest area has {best_area.damping:.0e}). Area: mean mini-batch loss over the run. "
        "Extra time: of the rule, relative to forward, backward and step."
    )
    adaptive = [line for line in all_lines if line.rule is not None]
    others = [best, *[line for line in all_lines if line.name in config.tuned]]
    shown = [line for line in [*others, *adaptive] if not math.isinf(_median(runs[line.name], "final_loss"))]
    figures = [
        Figure(_curves(config, runs, shown, "curve", "training loss in nats"), "Training loss: median over seeds."),
        Figure(_curves(config, runs, shown, "dampings", "damping"), "Damping over the run: median over seeds."),
    ]
    text = [
        f"{config.task.steps} steps of batch {config.task.batch_size} on {config.task.data.name}; every run has the same "
        "settings except for the damping: " + ", ".join(f"{key} {value}" for key, value in config.kfac.items()) + "."
    ]
    section = Section(title, text, [Table(caption, HEADER, rows, [all_lines.index(best)])], figures)
    return section, {"best_fixed": best.name, "lines": {line.name: _numbers(runs[line.name], targets) for line in all_lines}}


def _median(runs: list[RuleRun], key: str) -> float:
    values = [getattr(run, key) for run in runs]
    return float(statistics.median(math.inf if math.isnan(value) else value for value in values))


def _extra_time(runs: list[RuleRun]) -> float:
    return sum(run.rule_seconds for run in runs) / max(1e-12, sum(run.step_seconds for run in runs))


def _row(line: Line, runs: list[RuleRun], targets: tuple[float, float]) -> list[str]:
    final, area = _median(runs, "final_loss"), _median(runs, "area")
    finals = sorted(run.final_loss for run in runs)
    return [
        line.name,
        f"{final:.3g} ({finals[0]:.2g} to {finals[-1]:.2g})",
        f"{final / targets[0]:.2f}",
        f"{area:.3g}",
        f"{area / targets[1]:.2f}",
        f"{100 * _median(runs, 'test_error'):.2f} %",
        "" if line.rule is None else f"{100 * _extra_time(runs):.1f} %",
        f"{sum(math.isinf(value) for value in finals)} of {len(runs)}",
    ]


def _numbers(runs: list[RuleRun], targets: tuple[float, float]) -> dict[str, Any]:
    return {
        "final_loss": [run.final_loss for run in runs],
        "area": [run.area for run in runs],
        "test_error": [run.test_error for run in runs],
        "relative_final_loss": _median(runs, "final_loss") / targets[0],
        "relative_area": _median(runs, "area") / targets[1],
        "extra_time": _extra_time(runs),
        "final_damping": [run.dampings[-1] if run.dampings else None for run in runs],
    }


def _curves(config: RulesConfig, runs: dict[str, list[RuleRun]], shown: list[Line], key: str, y_label: str) -> bytes:
    curves = []
    kinds = list(config.rules)
    for line in shown:
        healthy = [getattr(run, key) for run in runs[line.name] if math.isfinite(run.final_loss)]
        points = list(zip(*healthy, strict=True))
        steps = [config.read_interval * (index + 1) for index in range(len(points))]
        colour = "#000000" if line.rule is None else COLOURS[kinds.index(line.rule) % len(COLOURS)]
        style = "-" if line.rule is None or line.damping == config.starts[0] else "--"
        if line.name in config.tuned:
            style = ":"
        middle = [statistics.median(values) for values in points]
        low, high = [min(values) for values in points], [max(values) for values in points]
        curves.append(Curve(line.name, steps, middle, low, high, colour, style))
    return line_figure(curves, x_label="step", y_label=y_label)


if __name__ == "__main__":
    run_command(main)
