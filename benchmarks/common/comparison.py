"""Several optimizers on one task: equal search budgets, then several seeds at each one's best setting.

Finished trials and runs are kept on disk; the same command goes on where it was stopped.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.config import LOCAL, ConfigError, resolved
from benchmarks.common.optimizers import OPTIMIZERS, build_optimizer, default_settings, label, muon_applies
from benchmarks.common.progress import Progress, progress
from benchmarks.common.results import fingerprint, read_json, tensorboard_writer, write_json
from benchmarks.common.search import OptimizerConfig, SearchConfig, SearchResult, num_finished_trials, search
from benchmarks.common.tasks import Task, TaskConfig
from benchmarks.common.train import History, OptimizerFactory, train


@dataclass(frozen=True)
class ComparisonConfig:
    """One comparison.

    Attributes:
        optimizers: who takes part, with ranges to search; each gets ``search.num_trials`` trials.
        defaults: optimizers that run once more with their default hyper-parameters, nothing searched.
        shortened: optimizers that take part once more, searched for and trained with this share of the steps: a
            schedule that ends at zero shows what a loss costs only to runs that were planned for it.
        reference: its final training loss is the target for all.
        num_seeds: runs at the best setting, with seeds ``seed, seed + 1, …``.
        out: folder of everything; ``keep``: folder for the small summary (None: only below ``out``).
        storage: database URL of the search; None: an SQLite file below ``out``.
    """

    name: str
    task: TaskConfig
    optimizers: dict[str, OptimizerConfig]
    search: SearchConfig = field(default_factory=SearchConfig)
    defaults: list[str] = field(default_factory=lambda: ["kfac", "ekfac"])
    shortened: dict[str, float] = field(default_factory=dict)
    reference: str = "adamw"
    num_seeds: int = 3
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    tensorboard: bool = True
    data_root: Path = field(default=Path("data"), metadata=LOCAL)
    out: Path = field(default=Path("out/compare_optimizers"), metadata=LOCAL)
    keep: Path | None = field(default=None, metadata=LOCAL)
    storage: str | None = field(default=None, metadata=LOCAL)

    def __post_init__(self) -> None:
        for name in [*self.optimizers, *self.defaults]:
            if name not in OPTIMIZERS:
                raise ConfigError(f"optimizers: unknown optimizer '{name}'; allowed: {', '.join(OPTIMIZERS)}.")
        if self.reference not in self.optimizers:
            raise ConfigError(
                f"key 'reference' must be one of the optimizers ({', '.join(self.optimizers)}), got '{self.reference}'."
            )
        for name, share in self.shortened.items():
            if name not in self.optimizers:
                raise ConfigError(f"shortened: '{name}' is none of the optimizers ({', '.join(self.optimizers)}).")
            if not 0 < share < 1:
                raise ValueError(f"shortened: the share of the steps must be in (0, 1), got {share} for {name}")
        if self.num_seeds < 1:
            raise ValueError(f"num_seeds must be >= 1, got {self.num_seeds}")


@dataclass(frozen=True)
class Contestant:
    """One optimizer with its settings and its runs, one per seed.

    Attributes:
        search: None for default settings.
        share: of the task's steps.
    """

    name: str
    optimizer: str
    settings: dict[str, Any]
    runs: list[History]
    search: SearchResult | None
    share: float = 1.0

    @property
    def label(self) -> str:
        """How it is called in tables and figures."""
        remark = "" if self.share == 1 else f" ({self.share:g} of the steps)"
        return label(self.optimizer) + (remark if self.search is not None else " (defaults)")


def run_comparison(config: ComparisonConfig) -> list[Contestant]:
    """Searches, trains, and returns the contestants in the order of the config, those with defaults last."""
    torch.set_num_threads(config.threads)
    task = Task(config.task, config.data_root, config.device)
    folder = config.out / config.name
    storage = config.storage or str(folder / "search.sqlite3")
    names = _applicable(config, task)
    entries = [(name, 1.0) for name in names] + [(name, config.shortened[name]) for name in names if name in config.shortened]
    if config.storage is None:
        folder.mkdir(parents=True, exist_ok=True)
    studies = [_study_name(config, name, share) for name, share in entries]
    done = sum(min(num_finished_trials(study, storage), config.search.num_trials) for study in studies)
    total = len(entries) * (config.search.num_trials + config.num_seeds) + len(config.defaults) * config.num_seeds
    contestants = []
    with progress(total, config.name, done=done) as display:
        for (optimizer, share), study in zip(entries, studies, strict=True):
            name = optimizer if share == 1 else f"{optimizer}-{share:g}"
            found = _search(config, task, optimizer, share, study, storage, display)
            runs = _run_seeds(config, task, name, optimizer, found.settings, folder, display, share)
            contestants.append(Contestant(name, optimizer, found.settings, runs, found, share))
        for name in config.defaults:
            runs = _run_seeds(config, task, f"{name}-defaults", name, {}, folder, display)
            contestants.append(Contestant(f"{name}-defaults", name, {}, runs, None))
    return contestants


def _applicable(config: ComparisonConfig, task: Task) -> list[str]:
    return [name for name in config.optimizers if name != "muon" or muon_applies(task.build_model(config.seed))]


def _study_name(config: ComparisonConfig, name: str, share: float = 1.0) -> str:
    """Another task, range or seed is another study: old trials must not be taken for new ones."""
    identity = [resolved(config.task), resolved(config.optimizers[name]), config.search.seed, config.device]
    identity += [config.search.training_seeds, default_settings(name), *([] if share == 1 else [share])]
    return f"{config.name}-{name}-{fingerprint(identity)}"


def _factory(config: ComparisonConfig, optimizer: str, settings: dict[str, Any], seed: int) -> OptimizerFactory:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(optimizer, model, settings, config.task.likelihood, seed)

    return build


def _num_steps(config: ComparisonConfig, share: float) -> int:
    return max(1, round(share * config.task.steps))


def _search(
    config: ComparisonConfig, task: Task, name: str, share: float, study: str, storage: str, display: Progress
) -> SearchResult:
    seeds, steps = config.search.training_seeds, _num_steps(config, share)
    initial_loss = task.evaluate(task.build_model(seeds[0]), "train").loss

    def objective(settings: dict[str, Any]) -> float:
        runs = (train(task, _factory(config, name, settings, seed), seed, steps=steps, with_test=False) for seed in seeds)
        return sum(run.final_loss for run in runs) / len(seeds)

    return search(
        study,
        config.optimizers[name],
        config.search,
        objective,
        storage=storage,
        worst=10.0 * initial_loss,
        on_trial=lambda: display.advance(note=f"{label(name)}: search"),
    )


def _run_seeds(
    config: ComparisonConfig,
    task: Task,
    name: str,
    optimizer: str,
    settings: dict[str, Any],
    folder: Path,
    display: Progress,
    share: float = 1.0,
) -> list[History]:
    runs = []
    for seed in range(config.seed, config.seed + config.num_seeds):
        path = folder / "runs" / f"{name}-seed{seed}.json"
        described = [resolved(config.task), default_settings(optimizer), settings, seed, config.device, config.threads]
        identity = fingerprint([*described, *([] if share == 1 else [share])])
        if path.is_file() and read_json(path)["identity"] == identity:
            history = History.from_dict(read_json(path)["history"])
        else:
            history = train(task, _factory(config, optimizer, settings, seed), seed, steps=_num_steps(config, share))
            content = {"identity": identity, "optimizer": optimizer, "settings": settings, "seed": seed}
            write_json(path, {**content, "history": history.to_dict()})
            if config.tensorboard:
                _write_tensorboard(folder / "tensorboard" / f"{name}-seed{seed}", settings, history)
        runs.append(history)
        display.advance(note=f"{name}, seed {seed}")
    return runs


def _write_tensorboard(folder: Path, settings: dict[str, Any], history: History) -> None:
    writer = tensorboard_writer(folder)
    for index, step in enumerate(history.steps):
        for key in ("train_loss", "test_loss", "test_error"):
            writer.add_scalar(key, getattr(history, key)[index], step)
        writer.add_scalar("seconds", history.seconds[index], step)
    for step, loss in enumerate(history.batch_loss):
        writer.add_scalar("batch_loss", loss, step)
    writer.add_text("settings", str(settings))
    writer.close()


@dataclass(frozen=True)
class Summary:
    """What the runs of one contestant come to; lists have one entry per seed, None where a target was missed.

    Attributes:
        final_loss, test_error: at the end of each run.
        reach_steps, reach_seconds: first evaluation at or below the reference's **median** final training loss.
        reach_best_steps, reach_best_seconds: the same for the reference's **lowest** final training loss.
        milliseconds_per_step: mean over the run, evaluations excluded.
        num_trials, num_diverged_trials: of the search.
    """

    name: str
    label: str
    settings: dict[str, Any]
    num_trials: int
    num_diverged_trials: int
    num_diverged: int
    final_loss: list[float]
    test_error: list[float]
    reach_steps: list[int | None]
    reach_seconds: list[float | None]
    reach_best_steps: list[int | None]
    reach_best_seconds: list[float | None]
    seconds: list[float]
    milliseconds_per_step: list[float]


@dataclass(frozen=True)
class Comparison:
    """All summaries with the two targets that the reference sets."""

    reference: str
    median_target: float
    best_target: float
    summaries: list[Summary]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def summarize(config: ComparisonConfig, contestants: list[Contestant]) -> Comparison:
    """Targets from the reference's runs, and every contestant measured against them."""
    reference = next(c for c in contestants if c.name == config.reference)
    finals = sorted(run.final_loss for run in reference.runs)
    median_target, best_target = _median(finals), finals[0]
    summaries = [_summarize_one(contestant, median_target, best_target) for contestant in contestants]
    return Comparison(config.reference, median_target, best_target, summaries)


def _summarize_one(contestant: Contestant, median_target: float, best_target: float) -> Summary:
    runs = contestant.runs
    median_reach = [run.reach(median_target) for run in runs]
    best_reach = [run.reach(best_target) for run in runs]
    trials = contestant.search.trials if contestant.search is not None else []
    return Summary(
        name=contestant.name,
        label=contestant.label,
        settings=contestant.settings,
        num_trials=len(trials),
        num_diverged_trials=sum(1 for trial in trials if trial["diverged"]),
        num_diverged=sum(1 for run in runs if run.diverged),
        final_loss=[run.final_loss for run in runs],
        test_error=[run.test_error[-1] for run in runs],
        reach_steps=[reach and reach[0] for reach in median_reach],
        reach_seconds=[reach and reach[1] for reach in median_reach],
        reach_best_steps=[reach and reach[0] for reach in best_reach],
        reach_best_seconds=[reach and reach[1] for reach in best_reach],
        seconds=[run.seconds[-1] for run in runs],
        milliseconds_per_step=[1000 * run.seconds[-1] / max(1, run.steps[-1]) for run in runs],
    )


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else 0.5 * (ordered[middle - 1] + ordered[middle])


def median_reach(values: list[int | None] | list[float | None]) -> float | None:
    """Median over seeds, a miss counting as never; None when half of the seeds or more missed."""
    result = _median([math.inf if value is None else float(value) for value in values])
    return result if math.isfinite(result) else None


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds (nan for one seed)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
