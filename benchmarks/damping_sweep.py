"""The effect of damping, each value with a fair search of the other hyper-parameters.

    python -m benchmarks.damping_sweep --config configs/damping_sweep/digits.yaml --workers 4

Stopped at any point (also by ``kill -9``) the same command goes on: finished trials are kept, trials that died are run
again. With ``--storage postgresql://user:password@host/database`` any number of machines work on one sweep.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.command import run_command
from benchmarks.common.report import Report, run_script
from benchmarks.damping.config import SweepConfig
from benchmarks.damping.report import make_report
from benchmarks.damping.sweep import run_sweep


def main(arguments: Sequence[str] | None = None) -> Report:
    """Runs what is missing of a sweep and writes pictures, tables and page."""
    return run_script(SweepConfig, run, arguments, __doc__ or "", "damping_sweep/digits.yaml")


def run(config: SweepConfig) -> Report:
    """The sweep, and what it came to."""
    run_sweep(config)
    return make_report(config)


if __name__ == "__main__":
    run_command(main)
