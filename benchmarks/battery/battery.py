"""Runs what is missing, keeps one line for each run, summarises."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.battery import report
from benchmarks.battery.run import SEARCH_SEED, Contestant, Schedule, make_factory, search, train
from benchmarks.battery.tasks import ALL_TASKS
from benchmarks.common.config import LOCAL, parse_arguments
from benchmarks.common.optimizers import default_settings
from benchmarks.common.report import progress
from benchmarks.common.results import append_json_line, fingerprint, provenance, read_json_lines, write_json


@dataclass(frozen=True)
class BatteryConfig:
    """What is compared.

    Attributes:
        tasks: names of ``tasks.ALL_TASKS``, in the order in which they are run.
        contestants: by name; the one called ``adamw`` gives the targets.
        only: contestants that are run now (default: all); the others are reported as far as they have been run.
        seeds: of the runs at the best settings; the search uses another one.
    """

    name: str
    tasks: list[str]
    contestants: dict[str, Contestant]
    only: list[str] | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    schedule: Schedule = field(default_factory=Schedule)
    threads: int = 1
    data_root: Path = field(default=Path("data"), metadata=LOCAL)
    out: Path = field(default=Path("out/battery"), metadata=LOCAL)
    keep: Path | None = field(default=None, metadata=LOCAL)

    def __post_init__(self) -> None:
        for kind, given, known in (("tasks", self.tasks, ALL_TASKS), ("only", self.only or [], self.contestants)):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ValueError(f"{kind} must be among {', '.join(known)}, got {', '.join(unknown)}")


class NotThere(Exception):
    """A run that is not in the log and is not to be made now."""


class Runs:
    """The log of finished runs: trains what is not in it."""

    def __init__(self, config: BatteryConfig) -> None:
        self.config = config
        self.path = config.out / config.name / "runs.jsonl"
        self.lines = {line["identity"]: line for line in read_json_lines(self.path)}
        self._data: tuple[str, Any] = ("", None)

    def get(self, task_name: str, name: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
        """The run of these settings, from the log or new."""
        contestant, task = self.config.contestants[name], ALL_TASKS[task_name]
        task = dataclasses.replace(task, steps=contestant.num_steps(task))
        shape = [task_name, task.steps, task.batch_size, self.config.schedule.name, self.config.schedule.warmup_steps]
        made_by = [contestant.optimizer, contestant.tag, default_settings(contestant.optimizer)]
        identity = fingerprint([shape, made_by, settings, seed])
        if identity not in self.lines:
            if self.config.only is not None and name not in self.config.only:
                raise NotThere(f"{task_name}, {name}, {settings}, seed {seed}")
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
    """Runs what is missing, then keeps the summary and writes tables and figure beside it."""
    config = parse_arguments(BatteryConfig, arguments, description="Fifteen small tasks, equal search budgets, one score.")
    torch.set_num_threads(config.threads)
    found = run(config)
    content = {**provenance(config, SEARCH_SEED), **report.summarize(found, {k: c.label for k, c in config.contestants.items()})}
    report.write(write_json((config.keep or config.out / config.name) / f"{config.name}.json", content))


def run(config: BatteryConfig) -> report.Found:
    """Best settings, runs (one for each seed) and least seconds of a step, by task and contestant."""
    runs = Runs(config)
    found: report.Found = {task: {} for task in config.tasks}
    with progress(len(config.tasks) * len(config.contestants), config.name) as display:
        for task in config.tasks:
            for name, contestant in config.contestants.items():
                scale = ALL_TASKS[task].sgd_scale if contestant.optimizer == "sgd" else 1.0
                made: list[dict[str, Any]] = []

                def get(settings: dict[str, Any], seed: int, *at: str, made: list[dict[str, Any]] = made) -> dict[str, Any]:
                    made.append(runs.get(at[0], at[1], settings, seed))
                    return made[-1]

                try:
                    best = search(contestant, scale, lambda s, at=(task, name), get=get: get(s, SEARCH_SEED, *at)["final_loss"])
                    last = [get(best, seed, task, name) for seed in config.seeds]
                except NotThere:
                    continue
                steps = contestant.num_steps(ALL_TASKS[task])
                whole = [line["seconds"] / steps for line in made if len(line["losses"]) == steps]
                least = min(whole, default=math.nan)
                found[task][name] = {"settings": best, "runs": last, "num_steps": steps, "seconds_per_step": least}
                display.update()
    return {task: by_name for task, by_name in found.items() if by_name}
