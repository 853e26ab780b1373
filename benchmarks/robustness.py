"""Does K-FAC break? A grid of learning rate × damping, everything else default, counted.

    python -m benchmarks.robustness --config configs/robustness/digits_mlp.yaml

For each curvature and inverse interval: how many settings diverged (ended non-finite or above the initial loss), how
many reached the final training loss of a tuned AdamW, how fast the fastest did, the median final loss. Finished runs
are lines of a log; the same command goes on after the last one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.command import run_command
from benchmarks.common.config import LOCAL, parse_arguments, resolved
from benchmarks.common.figures import heat_figure
from benchmarks.common.optimizers import build_optimizer, default_settings, label
from benchmarks.common.page import Figure, Section, Table, machine_footer, write_page
from benchmarks.common.progress import progress
from benchmarks.common.results import (
    append_json_line,
    describe_machine,
    describe_versions,
    fingerprint,
    provenance,
    read_json_lines,
    write_json,
)
from benchmarks.common.search import OptimizerConfig, SearchConfig, search
from benchmarks.common.tables import text_table
from benchmarks.common.tasks import Task, TaskConfig
from benchmarks.common.train import History, train

HEADER = ("curvature", "inverse interval", "diverged", "spiked", "reach", "fastest", "median loss", "worst loss")


@dataclass(frozen=True)
class TargetConfig:
    """The optimizer whose final training loss counts as reached, searched with its own budget."""

    optimizer: str = "adamw"
    settings: OptimizerConfig = field(default_factory=OptimizerConfig)
    search: SearchConfig = field(default_factory=SearchConfig)


@dataclass(frozen=True)
class RobustnessConfig:
    """The grid.

    Attributes:
        settings: of K-FAC in all runs; empty means its defaults.
        target_loss: in place of ``target``'s search, a number.
    """

    name: str
    task: TaskConfig
    target: TargetConfig = field(default_factory=TargetConfig)
    target_loss: float | None = None
    lrs: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03, 0.1, 0.3])
    dampings: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2, 1e-1, 1.0])
    curvatures: list[str] = field(default_factory=lambda: ["kronecker", "eigenbasis"])
    inverse_intervals: list[int] = field(default_factory=lambda: [1, 10, 100])
    seeds: list[int] = field(default_factory=lambda: [0])
    settings: dict[str, Any] = field(default_factory=dict)
    threads: int = 1
    device: str = "cpu"
    data_root: Path = field(default=Path("data"), metadata=LOCAL)
    out: Path = field(default=Path("out/robustness"), metadata=LOCAL)
    keep: Path | None = field(default=None, metadata=LOCAL)


@dataclass(frozen=True)
class Cell:
    """One setting of the grid."""

    curvature: str
    inverse_interval: int
    lr: float
    damping: float
    seed: int


@dataclass(frozen=True)
class Count:
    """What the settings of one curvature and interval come to."""

    curvature: str
    inverse_interval: int
    num_settings: int
    num_diverged: int
    num_spiked: int
    num_reached: int
    fastest_steps: int | None
    median_loss: float
    worst_loss: float

    def row(self) -> list[str]:
        """One row under ``HEADER``."""
        return [
            self.curvature,
            str(self.inverse_interval),
            f"{self.num_diverged} of {self.num_settings}",
            str(self.num_spiked),
            f"{self.num_reached} of {self.num_settings}",
            "—" if self.fastest_steps is None else str(self.fastest_steps),
            f"{self.median_loss:.1e}",
            f"{self.worst_loss:.1e}",
        ]


def main(arguments: Sequence[str] | None = None) -> list[Count]:
    """Runs what is left of the grid, prints the table, writes JSON and the page."""
    config = parse_arguments(RobustnessConfig, arguments, description="Grid of learning rate x damping for K-FAC.")
    torch.set_num_threads(config.threads)
    task = Task(config.task, config.data_root, config.device)
    target = config.target_loss if config.target_loss is not None else find_target(config, task)
    outcomes = run_grid(config, task)
    counts = count(config, outcomes, target)
    page = write_report(config, outcomes, counts, target)
    print(text_table(HEADER, [c.row() for c in counts]))
    print(f"target: {target:.4g} ({label(config.target.optimizer)}, {config.task.steps} steps)")
    print(f"page: {page}")
    return counts


def cells(config: RobustnessConfig) -> Iterator[Cell]:
    """All settings in the order in which they run."""
    for values in itertools.product(config.curvatures, config.inverse_intervals, config.lrs, config.dampings, config.seeds):
        yield Cell(*values)


def find_target(config: RobustnessConfig, task: Task) -> float:
    """Lowest final training loss that the target's optimizer finds in its search."""
    target = config.target
    seeds = target.search.training_seeds

    def objective(settings: dict[str, Any]) -> float:
        def build(model: nn.Module) -> torch.optim.Optimizer:
            return build_optimizer(target.optimizer, model, settings, config.task.likelihood)

        return sum(train(task, build, seed, with_test=False).final_loss for seed in seeds) / len(seeds)

    worst = 10.0 * task.evaluate(task.build_model(seeds[0]), "train").loss
    study = f"{config.name}-{target.optimizer}-{fingerprint([resolved(config.task), resolved(target), config.device])}"
    storage = config.out / config.name / "search.sqlite3"
    with progress(target.search.num_trials, f"{config.name}: target") as display:
        found = search(
            study,
            target.settings,
            target.search,
            objective,
            storage=storage,
            worst=worst,
            on_trial=lambda: display.advance(note=label(target.optimizer)),
        )
    return found.value


def run_grid(config: RobustnessConfig, task: Task) -> dict[Cell, dict[str, Any]]:
    """Outcome of every setting; those in the log are not run again."""
    identity = fingerprint([resolved(config.task), config.settings, config.device, default_settings("kfac")])
    log = config.out / config.name / "runs.jsonl"
    finished = {Cell(**line["cell"]): line["outcome"] for line in read_json_lines(log) if line.get("identity") == identity}
    todo = list(cells(config))
    outcomes = {cell: finished[cell] for cell in todo if cell in finished}
    with progress(len(todo), config.name, done=len(outcomes)) as display:
        for cell in todo:
            if cell in outcomes:
                continue
            outcomes[cell] = outcome_of(run_cell(config, task, cell))
            append_json_line(log, {"identity": identity, "cell": asdict(cell), "outcome": outcomes[cell]})
            display.advance(note=f"{cell.curvature}, interval {cell.inverse_interval}, lr {cell.lr:g}")
    return outcomes


def run_cell(config: RobustnessConfig, task: Task, cell: Cell) -> History:
    """One training run with the setting ``cell``."""
    settings = {
        **config.settings,
        "lr": cell.lr,
        "damping": cell.damping,
        "curvature": cell.curvature,
        "inverse_interval": cell.inverse_interval,
    }

    def build(model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer("kfac", model, settings, config.task.likelihood, cell.seed)

    return train(task, build, cell.seed, with_test=False)


def outcome_of(history: History) -> dict[str, Any]:
    """What is kept of a run: enough for every count, and the curve of the training loss."""
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


def count(config: RobustnessConfig, outcomes: dict[Cell, dict[str, Any]], target: float) -> list[Count]:
    """The table: one line for each curvature and interval."""
    counts = []
    for curvature, interval in itertools.product(config.curvatures, config.inverse_intervals):
        chosen = [o for cell, o in outcomes.items() if (cell.curvature, cell.inverse_interval) == (curvature, interval)]
        reached = [step for step in (_reach(outcome, target) for outcome in chosen) if step is not None]
        losses = sorted(_final_loss(outcome) for outcome in chosen)
        counts.append(
            Count(
                curvature,
                interval,
                num_settings=len(chosen),
                num_diverged=sum(outcome["diverged"] for outcome in chosen),
                num_spiked=sum(outcome["num_spikes"] > 0 for outcome in chosen),
                num_reached=len(reached),
                fastest_steps=min(reached, default=None),
                median_loss=losses[len(losses) // 2],
                worst_loss=losses[-1],
            )
        )
    return counts


def write_report(config: RobustnessConfig, outcomes: dict[Cell, dict[str, Any]], counts: list[Count], target: float) -> Path:
    """JSON and page below ``out``, the small summary in ``keep``."""
    folder = config.out / config.name
    content = {**provenance(config, None, config.device), "target": target, "counts": [asdict(c) for c in counts]}
    content["final_losses"] = [{**asdict(cell), "final_loss": o["final_loss"]} for cell, o in outcomes.items()]
    write_json(folder / "results.json", content)
    if config.keep is not None:
        write_json(config.keep / f"{config.name}.json", content)
    table = Table(
        "Diverged: ended non-finite or above the initial loss. Spiked: a mini-batch loss above twice the first one. "
        "Reach: settings that got to the target; fastest: steps of the fastest of them.",
        HEADER,
        [c.row() for c in counts],
    )
    text = [
        f"{config.task.steps} steps of batch {config.task.batch_size}, everything but learning rate, damping and "
        f"inverse interval default. Target: {label(config.target.optimizer)}'s best final training loss of "
        f"{config.target.search.num_trials} trials, {target:.3g}."
    ]
    figures = [_heat(config, outcomes, target, c.curvature, c.inverse_interval) for c in counts]
    footer = machine_footer(describe_machine(config.device), describe_versions())
    section = Section(f"Learning rate × damping: {config.name}", text, [table], figures)
    return write_page(folder / "index.html", f"Robustness: {config.name}", [section], footer=footer)


def _heat(config: RobustnessConfig, outcomes: dict[Cell, dict[str, Any]], target: float, curvature: str, interval: int) -> Figure:
    def middle(lr: float, damping: float) -> tuple[float, str]:
        found = [outcomes[Cell(curvature, interval, lr, damping, seed)] for seed in config.seeds]
        losses = sorted(_final_loss(outcome) for outcome in found)
        mark = "×" if any(o["diverged"] for o in found) else "•" if losses[len(losses) // 2] <= target else ""
        return losses[len(losses) // 2], mark

    table = [[middle(lr, damping) for damping in config.dampings] for lr in config.lrs]
    png = heat_figure(
        [[loss for loss, _ in row] for row in table],
        marks=[[mark for _, mark in row] for row in table],
        x_names=[f"{damping:g}" for damping in config.dampings],
        y_names=[f"{lr:g}" for lr in config.lrs],
        x_label="damping",
        y_label="learning rate",
        title=f"{curvature}, inverses every {interval} steps",
        colour_label="final training loss in nats",
    )
    return Figure(png, f"{curvature}, interval {interval}: • reached the target, × diverged.")


def _final_loss(outcome: dict[str, Any]) -> float:
    return float("inf") if outcome["final_loss"] is None else outcome["final_loss"]


def _reach(outcome: dict[str, Any], target: float) -> int | None:
    pairs = zip(outcome["steps"], outcome["train_loss"], strict=True)
    return next((step for step, loss in pairs if loss is not None and loss <= target), None)


if __name__ == "__main__":
    run_command(main)
