"""What do cheaper settings of K-FAC cost in convergence? Every variant trains the same task from the same seeds.

    python -m benchmarks.variants --config configs/variants/lenet5.yaml

Final training loss and steps to the first variant's median final loss, mean ± standard error over seeds. Finished runs are
lines of a log; the same command goes on after the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.command import run_command
from benchmarks.common.config import LOCAL, ExperimentConfig, resolved
from benchmarks.common.optimizers import default_settings, optimizer_factory
from benchmarks.common.report import Report, Table, progress, run_script
from benchmarks.common.results import RunLog
from benchmarks.common.statistics import median
from benchmarks.common.tasks import Task, TaskConfig
from benchmarks.common.train import History, train


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
    """All runs by variant; those in the log are not run again."""
    task, log = Task(config.task, config.data_root, config.device), RunLog(config.folder / "runs.jsonl")
    runs: dict[str, list[History]] = {name: [] for name in config.variants}
    with progress(len(config.variants) * config.num_seeds, config.name) as display:
        for name, own in config.variants.items():
            settings = {**config.shared, **own}
            optimizer = settings.pop("optimizer", "kfac")
            make = optimizer_factory(optimizer, settings, config.task.likelihood)
            for seed in range(config.seed, config.seed + config.num_seeds):
                identity = [resolved(config.task), optimizer, default_settings(optimizer), settings, seed, config.device]
                content = log.get(identity, lambda: train(task, make, seed).to_dict(), variant=name, seed=seed)  # noqa: B023
                runs[name].append(History.from_dict(content))
                display.update()
    finals = sorted(history.final_loss for history in next(iter(runs.values())))
    target = finals[len(finals) // 2]  # a value that the first variant reaches
    results = {name: summarize(histories, target) for name, histories in runs.items()}
    caption = f"Mean ± standard error over {config.num_seeds} seeds; target: the first variant's median final training loss."
    rows = [
        {
            "variant": name,
            "final training loss": figures["final_loss"],
            "test error %": [100 * value for value in figures["test_error"]],
            "steps to target": median(figures["reach_steps"]),
            "diverged": figures["num_diverged"],
        }
        for name, figures in results.items()
    ]
    return Report(
        title=f"Variants: {config.name}",
        text=[f"{config.task.steps} steps of batch {config.task.batch_size} on {config.task.data.name}."],
        tables=[Table.of(caption, rows)],
        content={"results": results},
    )


def summarize(histories: list[History], target: float) -> dict[str, Any]:
    """Figures of one variant; lists have one entry per seed."""
    reached = [history.reach(target) for history in histories]
    return {
        "final_loss": [history.final_loss for history in histories],
        "test_error": [history.test_error[-1] for history in histories],
        "reach_steps": [at and at[0] for at in reached],
        "num_diverged": sum(history.diverged for history in histories),
    }


if __name__ == "__main__":
    run_command(main)
