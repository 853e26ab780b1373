"""Runs what is missing, keeps one line for each run, summarises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.battery.run import SEARCH_SEED, Contestant, Schedule, make_factory, search, train
from benchmarks.battery.tasks import TASKS
from benchmarks.common.config import LOCAL, parse_arguments
from benchmarks.common.optimizers import default_settings
from benchmarks.common.progress import progress
from benchmarks.common.results import append_json_line, fingerprint, read_json_lines


@dataclass(frozen=True)
class BatteryConfig:
    """What is compared.

    Attributes:
        tasks: names of ``tasks.TASKS``, in the order in which they are run.
        contestants: by name; the one called ``adamw`` gives the targets.
        only: contestants that are run now; the report takes what is there.
        seeds: of the runs at the best settings; the search uses another.
    """

    name: str
    tasks: list[str]
    contestants: dict[str, Contestant]
    only: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    schedule: Schedule = field(default_factory=Schedule)
    threads: int = 1
    data_root: Path = field(default=Path("data"), metadata=LOCAL)
    out: Path = field(default=Path("out/battery"), metadata=LOCAL)
    keep: Path | None = field(default=None, metadata=LOCAL)

    def __post_init__(self) -> None:
        for kind, given, known in (("tasks", self.tasks, TASKS), ("only", self.only, self.contestants)):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ValueError(f"{kind} must be among {', '.join(known)}, got {', '.join(unknown)}")


class Runs:
    """The log of finished runs: trains what is not in it."""

    def __init__(self, config: BatteryConfig) -> None:
        self.config = config
        self.path = config.out / config.name / "runs.jsonl"
        self.lines = {line["identity"]: line for line in read_json_lines(self.path)}
        self._data: tuple[str, Any] = ("", None)

    def get(self, task_name: str, name: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
        """The run of these settings, from the log or new."""
        contestant, task = self.config.contestants[name], TASKS[task_name]
        shape = [task_name, task.steps, task.batch_size, self.config.schedule.name, self.config.schedule.warmup_steps]
        made_by = [contestant.optimizer, contestant.tag, default_settings(contestant.optimizer)]
        identity = fingerprint([shape, made_by, settings, seed])
        if identity not in self.lines:
            if self._data[0] != task_name:
                self._data = (task_name, task.data(self.config.data_root))
            factory = make_factory(contestant, task, settings, seed)
            result = train(task, self._data[1], factory, seed, self.config.schedule)
            line = {"identity": identity, "task": task_name, "contestant": name, "settings": settings, "seed": seed, **result}
            append_json_line(self.path, line)
            self.lines[identity] = line
        line = self.lines[identity]
        return {**line, "final_loss": math.inf if line["final_loss"] is None else line["final_loss"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs, then writes the report."""
    config = parse_arguments(BatteryConfig, arguments, description="Fifteen small tasks, equal search budgets, one score.")
    torch.set_num_threads(config.threads)
    run(config)


def run(config: BatteryConfig) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The runs at the best settings by task and contestant, one for each seed."""
    runs = Runs(config)
    names = config.only or list(config.contestants)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {task: {} for task in config.tasks}
    with progress(len(config.tasks) * len(names), config.name) as display:
        for task in config.tasks:
            for name in names:
                contestant = config.contestants[name]
                scale = TASKS[task].sgd_scale if contestant.optimizer == "sgd" else 1.0

                def measure(settings: dict[str, Any], task: str = task, name: str = name) -> float:
                    return float(runs.get(task, name, settings, SEARCH_SEED)["final_loss"])

                best = search(contestant, scale, measure)
                found[task][name] = [runs.get(task, name, best, seed) for seed in config.seeds]
                display.advance(note=f"{task}, {contestant.label}")
    return found
