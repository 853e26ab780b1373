"""Weight samples during training, ensembles at test time: KFACVI against its rivals.

    python -m benchmarks.kfac_vi --config configs/kfac_vi/digits.yaml
    python -m benchmarks.kfac_vi --config configs/kfac_vi/lenet5_cifar10.yaml --data-root ~/data --only '[kfac, kfac_vi_1]'

Stopped at any point, the same command goes on. ``--only`` runs some of the methods; the page shows what it ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common.command import run_command
from benchmarks.common.config import parse_arguments
from benchmarks.common.figures import save_png
from benchmarks.common.page import machine_footer, write_page
from benchmarks.common.results import describe_machine, describe_versions, provenance, write_json
from benchmarks.common.tables import text_table
from benchmarks.vi.config import VIConfig
from benchmarks.vi.report import HEADER, rows, section, verdict
from benchmarks.vi.study import run_study


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs the experiment of a config and returns the path of its page."""
    config = parse_arguments(VIConfig, arguments, description="Weight uncertainty: accuracy, calibration, novelty.")
    torch.set_num_threads(config.threads)
    results = run_study(config)
    folder = config.out / config.name
    content = {**provenance(config, config.seed, config.device), "results": results}
    write_json(folder / "results.json", content)
    if config.keep is not None:
        small = {name: {"settings": r["settings"], "summary": r["summary"]} for name, r in results.items()}
        write_json(config.keep / f"{config.name}.json", {**content, "results": small})
    text = [f"{config.num_seeds} seeds, {config.epochs:g} epochs, batch {config.batch_size}.", verdict(results)]
    report = section(config.name.replace("_", " "), results, text)
    for figure, stem in zip(report.figures, ("accuracy", "reliability", "rotation"), strict=True):
        save_png(folder / f"{stem}.png", figure.png)
    footer = machine_footer(describe_machine(config.device), describe_versions())
    page = write_page(folder / "index.html", f"Weight uncertainty: {config.name}", [report], footer=footer)
    print(text_table(HEADER, rows(results)))
    print(verdict(results))
    print(f"page: {page}")
    return page


if __name__ == "__main__":
    run_command(main)
