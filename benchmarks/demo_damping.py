"""Section of the demo page: the damping sweep with a small budget on the digits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.common.config import load_config
from benchmarks.common.page import Section
from benchmarks.common.sections import DemoContext, demo_section
from benchmarks.common.tables import text_table
from benchmarks.damping.config import SweepConfig
from benchmarks.damping.report import HEADER, make_report, summary_row
from benchmarks.damping.workers import run_sweep

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "damping_sweep" / "demo.yaml"


@demo_section("The effect of damping", order=20)
def damping_section(context: DemoContext) -> Section:
    """A small version of ``benchmarks.damping_sweep``."""
    config = load_config(SweepConfig, CONFIG)
    num_trials = context.budget(config.num_trials)
    steps = context.budget(config.task.steps, at_least=12)
    config = dataclasses.replace(
        config,
        out=context.out,
        device=context.device,
        seed=context.seed,
        training_seed=context.seed,
        num_trials=num_trials,
        num_kept=min(num_trials, context.budget(config.num_kept)),
        task=dataclasses.replace(config.task, steps=steps, eval_interval=max(1, steps // 3)),
        histogram=dataclasses.replace(config.histogram, interval=max(1, steps // 3)),
    )
    run_sweep(config)
    report = make_report(config, "The effect of damping")
    print(text_table(HEADER, [summary_row(summary) for summary in report.summaries]))
    command = "python -m benchmarks.damping_sweep --config configs/damping_sweep/digits.yaml"
    return dataclasses.replace(report.section, notes=[f"With the study's budget: {command}"])
