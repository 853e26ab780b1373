"""Section of the demo page: predictions that know what they do not know, from few digits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.common.config import load_config
from benchmarks.common.page import Section
from benchmarks.common.results import provenance, write_json
from benchmarks.common.sections import DemoContext, demo_section
from benchmarks.common.tables import text_table
from benchmarks.vi.config import VIConfig
from benchmarks.vi.report import HEADER, rows, section, verdict
from benchmarks.vi.study import run_study

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "kfac_vi" / "demo.yaml"
TITLE = "Weight uncertainty"


@demo_section(TITLE, order=30)
def uncertainty_section(context: DemoContext) -> Section:
    """A small version of ``benchmarks.kfac_vi``."""
    config = load_config(VIConfig, CONFIG)
    config = dataclasses.replace(
        config,
        out=context.out,
        device=context.device,
        seed=context.seed,
        num_seeds=context.budget(config.num_seeds),
        epochs=max(2.0, config.epochs * context.scale),
        evaluations=context.budget(config.evaluations, at_least=2),
    )
    results = run_study(config)
    write_json(context.out / "results.json", {**provenance(config, config.seed, config.device), "results": results})
    print(text_table(HEADER, rows(results)))
    text = [
        "200 digits to train on. KFACVI trains a Gaussian over the weights and predicts with 50 draws from it; shuffled "
        "and rotated test images should make a net less sure.",
        verdict(results),
    ]
    command = "python -m benchmarks.kfac_vi --config configs/kfac_vi/digits.yaml"
    return dataclasses.replace(section(TITLE, results, text), notes=[f"With settings searched for each: {command}"])
