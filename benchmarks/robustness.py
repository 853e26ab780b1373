"""Does K-FAC break? A grid of learning rate × damping, everything else default, counted.

    python -m benchmarks.robustness --config configs/robustness/digits_mlp.yaml

For each curvature and inverse interval: how many settings diverged (ended non-finite or above the initial loss), how
many reached the final training loss of a tuned AdamW, how fast the fastest did, the median final loss. Finished runs
are lines of a log; the same command goes on after the last one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm

from benchmarks.common.command import run_command
from benchmarks.common.config import LOCAL, ExperimentConfig, resolved
from benchmarks.common.figures import Figure, finish, subplots
from benchmarks.common.optimizers import default_settings, label, optimizer_factory
from benchmarks.common.report import Report, Table, progress, run_script
from benchmarks.common.results import RunLog, fingerprint
from benchmarks.common.search import OptimizerConfig, SearchConfig
from benchmarks.common.tasks import Task, TaskConfig
from benchmarks.common.train import History, train
from benchmarks.compare_optimizers import search_settings

GRID = ("curvature", "inverse_interval", "lr", "damping", "seed")


@dataclass(frozen=True)
class TargetConfig:
    """The optimizer whose final training loss counts as reached, searched with its own budget."""

    optimizer: str = "adamw"
    settings: OptimizerConfig = field(default_factory=OptimizerConfig)
    search: SearchConfig = field(default_factory=SearchConfig)


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig(ExperimentConfig):
    """The grid.

    Attributes:
        settings: of K-FAC in all runs; empty means its defaults.
        target_loss: in place of ``target``'s search, a number.
    """

    task: TaskConfig
    target: TargetConfig = field(default_factory=TargetConfig)
    target_loss: float | None = None
    lrs: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03, 0.1, 0.3])
    dampings: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2, 1e-1, 1.0])
    curvatures: list[str] = field(default_factory=lambda: ["kronecker", "eigenbasis"])
    inverse_intervals: list[int] = field(default_factory=lambda: [1, 10, 100])
    seeds: list[int] = field(default_factory=lambda: [0])
    settings: dict[str, Any] = field(default_factory=dict)
    out: Path = field(default=Path("out/robustness"), metadata=LOCAL)


def main(arguments: Sequence[str] | None = None) -> Report:
    """Runs what is left of the grid and writes its page."""
    return run_script(RobustnessConfig, run, arguments, "Grid of learning rate x damping for K-FAC.", None)


def run(config: RobustnessConfig) -> Report:
    """The target, the grid, the counts."""
    task = Task(config.task, config.data_root, config.device)
    target = config.target_loss if config.target_loss is not None else find_target(config, task)
    return make_report(config, run_grid(config, task), target)


def find_target(config: RobustnessConfig, task: Task) -> float:
    """Lowest final training loss that the target's optimizer finds in its search."""
    target, storage = config.target, config.folder / "search.sqlite3"
    study = f"{config.name}-{target.optimizer}-{fingerprint([resolved(config.task), resolved(target), config.device])}"
    with progress(target.search.num_trials, f"{config.name}: target") as display:
        on_trial = display.update
        return search_settings(task, target.optimizer, target.settings, target.search, study, storage, on_trial).value


def run_grid(config: RobustnessConfig, task: Task) -> pd.DataFrame:
    """One row per setting; those in the log are not run again."""
    log, rows = RunLog(config.folder / "runs.jsonl"), []
    same = [resolved(config.task), config.settings, config.device, default_settings("kfac")]
    todo = list(itertools.product(config.curvatures, config.inverse_intervals, config.lrs, config.dampings, config.seeds))
    with progress(len(todo), config.name) as display:
        for values in todo:
            cell = dict(zip(GRID, values, strict=True))
            rows.append({**cell, **log.get([same, cell], lambda: run_cell(config, task, cell), cell=cell)})  # noqa: B023
            display.update()
    return pd.DataFrame(rows)


def run_cell(config: RobustnessConfig, task: Task, cell: dict[str, Any]) -> dict[str, Any]:
    """Outcome of one training run: enough for every count, and the curve of the training loss."""
    settings = {**config.settings, **{key: value for key, value in cell.items() if key != "seed"}}
    make = optimizer_factory("kfac", settings, config.task.likelihood)
    history: History = train(task, make, cell["seed"], with_test=False)
    return {
        "diverged": history.diverged,
        "diverged_step": history.diverged_step,
        "message": history.message,
        "num_spikes": history.num_spikes(),
        "initial_loss": history.train_loss[0],
        "final_loss": history.final_loss,
        "seconds": history.seconds[-1],
        "steps": history.steps,
        "train_loss": [float(f"{loss:.4g}") for loss in history.train_loss],
    }


def count(outcomes: pd.DataFrame, target: float) -> pd.DataFrame:
    """One line for each curvature and interval; a run that broke ends at infinity."""
    runs = outcomes.assign(
        final_loss=outcomes["final_loss"].astype(float).fillna(math.inf),
        spiked=outcomes["num_spikes"] > 0,
        reach=[_reach(*pair, target) for pair in zip(outcomes["steps"], outcomes["train_loss"], strict=True)],
    )
    return (
        runs.groupby(["curvature", "inverse_interval"], sort=False)
        .agg(
            num_settings=("seed", "size"),
            num_diverged=("diverged", "sum"),
            num_spiked=("spiked", "sum"),
            num_reached=("reach", "count"),
            fastest_steps=("reach", "min"),
            median_loss=("final_loss", "median"),
            worst_loss=("final_loss", "max"),
        )
        .reset_index()
    )


def _reach(steps: list[int], losses: list[float | None], target: float) -> float:
    reached = (step for step, loss in zip(steps, losses, strict=True) if loss is not None and loss <= target)
    return float(next(reached, math.nan))


def make_report(config: RobustnessConfig, outcomes: pd.DataFrame, target: float) -> Report:
    """The counts as a table, a picture for each."""
    lines = count(outcomes, target).to_dict("records")
    caption = (
        "Diverged: ended non-finite or above the initial loss. Spiked: a mini-batch loss above twice the first one. "
        f"Reached: settings that got to the target, {target:.3g}; fastest: steps of the fastest of them."
    )
    pairs = list(itertools.product(config.curvatures, config.inverse_intervals))
    kept = outcomes[[*GRID, "final_loss"]]
    return Report(
        title=f"Learning rate × damping: {config.name}",
        text=[
            f"{config.task.steps} steps of batch {config.task.batch_size}, everything but learning rate, damping and "
            f"inverse interval default. Target: {label(config.target.optimizer)}'s best final training loss of "
            f"{config.target.search.num_trials} trials."
        ],
        tables=[Table.of(caption, [{key.replace("_", " "): value for key, value in line.items()} for line in lines])],
        figures={f"{c}_{i}": heat_figure(config, outcomes, target, c, i) for c, i in pairs},
        content={"target": target, "counts": lines, "final_losses": kept.to_dict("records")},
    )


def heat_figure(config: RobustnessConfig, outcomes: pd.DataFrame, target: float, curvature: str, interval: int) -> Figure:
    """Median final loss over seeds as colours, learning rate × damping."""
    chosen = outcomes[(outcomes["curvature"] == curvature) & (outcomes["inverse_interval"] == interval)]
    chosen = chosen.assign(final_loss=chosen["final_loss"].astype(float).fillna(math.inf))
    losses = chosen.pivot_table("final_loss", "lr", "damping", "median").loc[config.lrs, config.dampings].to_numpy()
    diverged = chosen.pivot_table("diverged", "lr", "damping", "max").loc[config.lrs, config.dampings].to_numpy()
    figure, axes = subplots(figsize=(5.2, 4.2))
    positive = losses[np.isfinite(losses) & (losses > 0)]
    norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01)) if positive.size else None
    image = axes.imshow(np.ma.masked_invalid(losses), origin="lower", cmap="viridis_r", norm=norm, aspect="auto")
    for (row, column), loss in np.ndenumerate(losses):
        mark = "×" if diverged[row, column] else "•" if loss <= target else ""
        axes.text(column, row, mark, ha="center", va="center", fontsize=8, color="white")
    axes.set(xlabel="damping", ylabel="learning rate", title=f"{curvature}, inverses every {interval} steps")
    axes.set_xticks(range(len(config.dampings)), [f"{damping:g}" for damping in config.dampings])
    axes.set_yticks(range(len(config.lrs)), [f"{lr:g}" for lr in config.lrs])
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="final training loss in nats")
    return finish(figure, f"{curvature}, interval {interval}: • reached the target, × diverged.")


if __name__ == "__main__":
    run_command(main)
