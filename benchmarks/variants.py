"""What do cheaper settings of K-FAC cost in convergence? Every variant trains the same task from the same seeds.

    python -m benchmarks.variants --config configs/variants/lenet5.yaml

Prints the final training loss and the steps to the first variant's median final loss, mean ± standard error over seeds.
Finished runs are lines of a log; the same command goes on after the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.command import run_command
from benchmarks.common.comparison import mean_and_error, median_reach
from benchmarks.common.config import LOCAL, parse_arguments, resolved
from benchmarks.common.optimizers import build_optimizer, default_settings
from benchmarks.common.progress import progress
from benchmarks.common.results import append_json_line, fingerprint, provenance, read_json_lines, write_json
from benchmarks.common.tables import text_table
from benchmarks.common.tasks import Task, TaskConfig
from benchmarks.common.train import History, train

HEADER = ("variant", "final training loss", "test error %", "steps to the first one's", "diverged")


@dataclass(frozen=True)
class VariantsConfig:
    """What is compared.

    Attributes:
        variants: settings by name, ``optimizer`` among them if it is not ``kfac``; the first is the reference.
        shared: settings of all of them.
        num_seeds: runs of each, from ``seed`` on.
    """

    name: str
    task: TaskConfig
    variants: dict[str, dict[str, Any]]
    shared: dict[str, Any] = field(default_factory=dict)
    num_seeds: int = 3
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    data_root: Path = field(default=Path("data"), metadata=LOCAL)
    out: Path = field(default=Path("out/variants"), metadata=LOCAL)
    keep: Path | None = field(default=None, metadata=LOCAL)

    def __post_init__(self) -> None:
        if not self.variants or self.num_seeds < 1:
            raise ValueError(f"variants must not be empty and num_seeds >= 1, got {len(self.variants)} and {self.num_seeds}")


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Trains all variants, prints the table, writes JSON; returns what stands in the table."""
    config = parse_arguments(VariantsConfig, arguments, description="What settings of K-FAC cost in convergence.")
    torch.set_num_threads(config.threads)
    results = summarize(run(config))
    content = {**provenance(config, config.seed, config.device), "results": results}
    for folder in (config.out / config.name, config.keep):
        if folder is not None:
            write_json(folder / f"{config.name}.json", content)
    print(text_table(HEADER, rows(results)))
    return results


def run(config: VariantsConfig) -> dict[str, list[History]]:
    """All runs by variant; those in the log are not run again."""
    task = Task(config.task, config.data_root, config.device)
    log = config.out / config.name / "runs.jsonl"
    known = {line["identity"]: line["history"] for line in read_json_lines(log)}
    found: dict[str, list[History]] = {name: [] for name in config.variants}
    with progress(len(config.variants) * config.num_seeds, config.name) as display:
        for name, own in config.variants.items():
            settings = {**config.shared, **own}
            optimizer = settings.pop("optimizer", "kfac")
            for seed in range(config.seed, config.seed + config.num_seeds):
                described = [resolved(config.task), optimizer, default_settings(optimizer), settings, seed, config.device]
                identity = fingerprint([*described, config.threads])
                if identity not in known:
                    known[identity] = _train(task, optimizer, settings, seed).to_dict()
                    append_json_line(log, {"identity": identity, "variant": name, "seed": seed, "history": known[identity]})
                found[name].append(History.from_dict(known[identity]))
                display.advance(note=f"{name}, seed {seed}")
    return found


def _train(task: Task, optimizer: str, settings: dict[str, Any], seed: int) -> History:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(optimizer, model, settings, task.config.likelihood, seed)

    return train(task, build, seed)


def summarize(runs: dict[str, list[History]]) -> dict[str, dict[str, Any]]:
    """Figures of each variant; lists have one entry per seed."""
    finals = sorted(history.final_loss for history in next(iter(runs.values())))
    target = finals[len(finals) // 2]
    return {
        name: {
            "final_loss": [history.final_loss for history in histories],
            "test_error": [history.test_error[-1] for history in histories],
            "reach_steps": [reached and reached[0] for reached in (history.reach(target) for history in histories)],
            "num_diverged": sum(history.diverged for history in histories),
        }
        for name, histories in runs.items()
    }


def rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Lines of the table."""
    table = []
    for name, figures in results.items():
        loss, loss_error = mean_and_error(figures["final_loss"])
        test, test_error = mean_and_error([100 * value for value in figures["test_error"]])
        steps = median_reach(figures["reach_steps"])
        reached = "-" if steps is None else f"{steps:g}"
        line = [name, f"{loss:.3g} ± {loss_error:.1g}", f"{test:.1f} ± {test_error:.1f}", reached]
        table.append([*line, f"{figures['num_diverged']} of {len(figures['final_loss'])}"])
    return table


if __name__ == "__main__":
    run_command(main)
