"""The effect of damping, each value with a fair search of the other hyper-parameters.

    python -m benchmarks.damping_sweep --config configs/damping_sweep/digits.yaml --workers 4

Stopped at any point (also by ``kill -9``) the same command goes on: finished trials are kept, trials that died are run
again. With ``--storage postgresql://user:password@host/database`` any number of machines work on one sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common.command import run_command
from benchmarks.common.config import parse_arguments
from benchmarks.common.progress import duration
from benchmarks.common.tables import text_table
from benchmarks.damping.config import SweepConfig
from benchmarks.damping.report import HEADER, make_report, summary_row, write_report
from benchmarks.damping.workers import run_sweep

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "damping_sweep" / "digits.yaml"


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs what is missing of a sweep, writes pictures, table and page, returns the path of the page."""
    config = parse_arguments(SweepConfig, arguments, description=__doc__ or "", default=DEFAULT_CONFIG)
    torch.set_num_threads(config.threads)
    progressed = run_sweep(config)
    report = make_report(config, config.name.replace("_", " "))
    page = write_report(report)
    print(text_table(HEADER, [summary_row(summary) for summary in report.summaries]))
    for name, found in report.findings.items():
        for finding in found:
            print(f"{name}: {finding.statement} -> {finding.verdict}: {finding.ours}")
    if progressed.trials:
        print(
            f"{progressed.trials} trials in {duration(progressed.seconds)}: {progressed.trials_per_minute:.1f} per "
            f"minute, {config.workers} worker(s); {100 * report.speed.compute_share:.1f} % of the trials' time was "
            f"forward, backward and step, {100 * report.speed.evaluation_share:.1f} % evaluation"
        )
    print(f"page: {page}")
    return page


if __name__ == "__main__":
    run_command(main)
