"""What do cheaper settings of K-FAC cost in convergence? Every variant trains the same task from the same seeds.

    python -m benchmarks.variants --config configs/variants/lenet5.yaml

A comparison of optimizers without a search. Finished runs are lines of a log; the same command goes on after the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import compare_optimizers
from benchmarks.common.command import run_command
from benchmarks.common.config import LOCAL, ExperimentConfig
from benchmarks.common.report import Report, run_script
from benchmarks.common.search import OptimizerConfig
from benchmarks.common.tasks import TaskConfig


@dataclass(frozen=True, kw_only=True)
class VariantsConfig(ExperimentConfig):
    """What is compared.

    Attributes:
        variants: settings by name, ``optimizer`` among them if it is not ``kfac``; the first is the reference.
        shared: settings of all of them.
        num_seeds: runs of each, from ``seed`` on.
    """

    task: TaskConfig
    variants: dict[str, dict[str, Any]]
    shared: dict[str, Any] = field(default_factory=dict)
    num_seeds: int = 3
    out: Path = field(default=Path("out/variants"), metadata=LOCAL)

    def __post_init__(self) -> None:
        if not self.variants or self.num_seeds < 1:
            raise ValueError(f"variants must not be empty and num_seeds >= 1, got {len(self.variants)} and {self.num_seeds}")


def main(arguments: Sequence[str] | None = None) -> Report:
    """Trains all variants and writes their table."""
    return run_script(VariantsConfig, run, arguments, "What settings of K-FAC cost in convergence.", None)


def run(config: VariantsConfig) -> Report:
    """All variants beside the first."""
    chosen = {name: {"optimizer": "kfac", **config.shared, **own} for name, own in config.variants.items()}
    optimizers = {name: OptimizerConfig(kind=settings.pop("optimizer"), fixed=settings) for name, settings in chosen.items()}
    same = {key: getattr(config, key) for key in ("name", "task", "num_seeds", "seed", "threads", "device", "data_root", "out")}
    comparison = compare_optimizers.ComparisonConfig(
        **same, optimizers=optimizers, defaults=[], reference=next(iter(optimizers)), tensorboard=False
    )
    return compare_optimizers.run(comparison)


if __name__ == "__main__":
    run_command(main)
