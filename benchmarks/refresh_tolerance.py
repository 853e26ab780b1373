"""What skipping refreshes of factors that have hardly moved saves, and what it costs.

    python -m benchmarks.refresh_tolerance --config configs/refresh_tolerance/digits.yaml

Every tolerance trains the same task from the same seeds. Seconds are processor time of the thread, of the refreshes alone
and of the whole training; tolerances take turns within each seed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.comparison import mean_and_error
from benchmarks.common.config import LOCAL, parse_arguments
from benchmarks.common.optimizers import build_optimizer
from benchmarks.common.results import provenance, write_json
from benchmarks.common.tables import text_table
from benchmarks.common.tasks import Task, TaskConfig
from benchmarks.common.train import train
from kfac_opt.optim.base import CurvatureOptimizer

HEADER = ("interval", "tolerance", "final training loss", "test error %", "skipped %", "refreshes, s", "training, s")


@dataclass(frozen=True)
class ToleranceConfig:
    """What is compared.

    Attributes:
        tolerances: the first is the reference; 0 never skips.
        intervals: inverse intervals at which all of them run.
        settings: of K-FAC.
        num_seeds: runs of each, from ``seed`` on.
    """

    name: str
    task: TaskConfig
    tolerances: list[float]
    intervals: list[int]
    settings: dict[str, Any] = field(default_factory=dict)
    num_seeds: int = 3
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    data_root: Path = field(default=Path("data"), metadata=LOCAL)
    out: Path = field(default=Path("out/refresh_tolerance"), metadata=LOCAL)
    keep: Path | None = field(default=None, metadata=LOCAL)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Trains, prints the table, writes JSON; returns one record for each interval and tolerance."""
    config = parse_arguments(ToleranceConfig, arguments, description="What skipped refreshes save and cost.")
    torch.set_num_threads(config.threads)
    task = Task(config.task, config.data_root, config.device)
    records = []
    for interval in config.intervals:
        runs: dict[float, list[dict[str, float]]] = {tolerance: [] for tolerance in config.tolerances}
        for seed in range(config.seed, config.seed + config.num_seeds):
            for tolerance, found in runs.items():
                settings = {**config.settings, "inverse_interval": interval, "refresh_tolerance": tolerance}
                found.append(run(task, settings, seed))
        for tolerance, found in runs.items():
            figures = {name: [one[name] for one in found] for name in found[0]}
            records.append({"interval": interval, "tolerance": tolerance, **figures})
    content = {**provenance(config, config.seed, config.device), "results": records}
    for folder in (config.out / config.name, config.keep):
        if folder is not None:
            write_json(folder / f"{config.name}.json", content)
    print(text_table(HEADER, [row(record) for record in records]))
    return records


def run(task: Task, settings: dict[str, Any], seed: int) -> dict[str, float]:
    """One training run."""
    built: list[CurvatureOptimizer] = []
    seconds = [0.0]

    def build(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = build_optimizer("kfac", model, settings, task.config.likelihood, seed)
        assert isinstance(optimizer, CurvatureOptimizer)
        estimation = optimizer._estimation
        refresh = estimation._refresh

        def timed(*arguments: Any) -> None:
            start = time.thread_time()
            refresh(*arguments)
            seconds[0] += time.thread_time() - start

        estimation._refresh = timed  # type: ignore[method-assign]
        built.append(optimizer)
        return optimizer

    start = time.thread_time()
    history = train(task, build, seed)
    states = [state["curvature"] for state in built[-1].state.values() if "curvature" in state]
    done = sum(int(state["refreshes"]) for state in states if "refreshes" in state)
    skipped = built[-1].skipped_refreshes
    return {
        "final_loss": history.final_loss,
        "test_error": history.test_error[-1],
        "skipped": skipped / (skipped + done),
        "refresh_seconds": seconds[0],
        "seconds": time.thread_time() - start,
    }


def row(record: dict[str, Any]) -> list[str]:
    """A line of the table: means over seeds, with standard errors where they matter."""
    loss, loss_error = mean_and_error(record["final_loss"])
    test, test_error = mean_and_error([100 * value for value in record["test_error"]])
    skipped, refreshes, seconds = (mean_and_error(record[name])[0] for name in ("skipped", "refresh_seconds", "seconds"))
    figures = [f"{loss:.3g} ± {loss_error:.1g}", f"{test:.1f} ± {test_error:.1f}", f"{100 * skipped:.0f}"]
    return [f"{record['interval']}", f"{record['tolerance']:g}", *figures, f"{refreshes:.2f}", f"{seconds:.2f}"]


if __name__ == "__main__":
    main()
