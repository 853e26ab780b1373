"""The effect of damping, each value with a fair search of the other hyper-parameters.

    python -m benchmarks.damping_sweep --config configs/damping_sweep/digits.yaml --workers 4

Stopped at any point (also by ``kill -9``) the same command goes on: finished trials are kept, trials that died are run
again. With ``--storage postgresql://user:password@host/database`` any number of machines work on one sweep.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common.config import ConfigError, parse_arguments
from benchmarks.damping.config import SweepConfig
from benchmarks.damping.workers import run_sweep

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "damping_sweep" / "digits.yaml"


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs what is missing of a sweep, writes pictures, table and page, returns the path of the page."""
    config = parse_arguments(SweepConfig, arguments, description=__doc__ or "", default=DEFAULT_CONFIG)
    torch.set_num_threads(config.threads)
    try:
        done = run_sweep(config)
    except ConfigError as error:
        sys.exit(f"damping_sweep: {error}")
    print(done)
    return config.folder


if __name__ == "__main__":
    main()
