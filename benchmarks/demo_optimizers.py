"""First section of the demo page: SGD, AdamW, KFAC and EKFAC on the digits, with equal search budgets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.common.comparison import ComparisonConfig, run_comparison, summarize
from benchmarks.common.comparison_report import HEADER, comparison_section, summary_row
from benchmarks.common.config import load_config
from benchmarks.common.page import Section
from benchmarks.common.results import provenance, write_json
from benchmarks.common.sections import DemoContext, demo_section
from benchmarks.common.tables import text_table

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "compare_optimizers" / "demo.yaml"


@demo_section("Optimizers compared", order=10)
def optimizers_section(context: DemoContext) -> Section:
    """Loss against steps and seconds, final accuracy; a small version of ``benchmarks.compare_optimizers``."""
    config = load_config(ComparisonConfig, CONFIG)
    config = dataclasses.replace(
        config,
        out=context.out,
        device=context.device,
        seed=context.seed,
        num_seeds=context.budget(config.num_seeds),
        search=dataclasses.replace(config.search, num_trials=context.budget(config.search.num_trials)),
        task=dataclasses.replace(config.task, steps=context.budget(config.task.steps, at_least=10)),
    )
    contestants = run_comparison(config)
    comparison = summarize(config, contestants)
    write_json(context.out / "results.json", {**provenance(config, config.seed, config.device), **comparison.to_dict()})
    print(text_table(HEADER, [summary_row(summary, "error") for summary in comparison.summaries]))
    section = comparison_section(config, contestants, comparison, "Optimizers compared", "error")
    command = "python -m benchmarks.compare_optimizers --config configs/compare_optimizers/digits_mlp.yaml"
    return dataclasses.replace(section, notes=[f"With a larger budget: {command}"])
