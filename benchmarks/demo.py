"""The main job in a few minutes, without a download: ``make demo``, or ``python -m benchmarks.demo``.

Every section trains on the digits that scikit-learn ships; all end on one HTML page, whose path is printed.
"""

from __future__ import annotations

import importlib
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.common.command import run_command
from benchmarks.common.config import LOCAL, ConfigError, parse_arguments
from benchmarks.common.page import Section, machine_footer, write_page
from benchmarks.common.progress import duration
from benchmarks.common.results import describe_machine, describe_versions
from benchmarks.common.sections import DemoContext, registered_sections

SECTION_MODULES = (
    "benchmarks.demo_optimizers",
    "benchmarks.demo_damping",
    "benchmarks.demo_fisher",
    "benchmarks.demo_kfac_vi",
)
"""Importing these registers the sections of the page (``benchmarks.common.sections.demo_section``)."""


@dataclass(frozen=True)
class DemoConfig:
    """What the demo does.

    Attributes:
        scale: factor on all budgets; 1 is the demo, tests use less.
        only: titles of the sections to run; empty means all.
    """

    scale: float = 1.0
    only: list[str] = field(default_factory=list)
    threads: int = 1
    device: str = "cpu"
    seed: int = 0
    out: Path = field(default=Path("out/demo"), metadata=LOCAL)

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be a finite number > 0, got {self.scale}")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs all sections, writes the page, prints and returns its path."""
    config = parse_arguments(DemoConfig, arguments, description="KFAC against SGD and AdamW on real digits.")
    torch.set_num_threads(config.threads)
    for module in SECTION_MODULES:
        importlib.import_module(module)
    start = time.monotonic()
    sections = _run_sections(config)
    page = write_page(
        config.out / "index.html",
        "kfac_opt on real data",
        sections,
        intro=[
            f"Made by make demo in {duration(time.monotonic() - start)} on the 8 × 8 digits that scikit-learn ships "
            "(1437 images to train on, 360 to test)."
        ],
        footer=machine_footer(describe_machine(config.device), describe_versions()),
    )
    print(page)
    return page


def _run_sections(config: DemoConfig) -> list[Section]:
    sections = registered_sections()
    unknown = set(config.only) - {section.title for section in sections}
    if unknown:
        raise ConfigError(f"only: unknown sections {sorted(unknown)}; allowed: {[s.title for s in sections]}.")
    chosen = [section for section in sections if not config.only or section.title in config.only]
    pages = []
    for number, section in enumerate(chosen, start=1):
        folder = config.out / section.title.lower().replace(" ", "_")
        shutil.rmtree(folder, ignore_errors=True)  # the demo shows what this code does now, not earlier trials
        folder.mkdir(parents=True)
        print(f"[{number}/{len(chosen)}] {section.title}", file=sys.stderr, flush=True)
        pages.append(section.function(DemoContext(folder, config.device, config.scale, config.seed)))
    return pages


if __name__ == "__main__":
    run_command(main)
