"""SGD, AdamW, Muon, KFAC and EKFAC on one task, with equal search budgets and several seeds.

    python -m benchmarks.compare_optimizers --config configs/compare_optimizers/mnist_mlp.yaml --data-root ~/data

Stopped at any point, the same command goes on: trials are kept by optuna, finished runs are lines of a log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.command import run_command
from benchmarks.common.config import LOCAL, ConfigError, ExperimentConfig, resolved
from benchmarks.common.figures import OPTIMIZER_COLOURS, Figure, line_figure, spread
from benchmarks.common.optimizers import OPTIMIZERS, default_settings, label, muon_applies, optimizer_factory
from benchmarks.common.report import Report, Table, progress, run_script
from benchmarks.common.results import RunLog, fingerprint
from benchmarks.common.search import OptimizerConfig, SearchConfig, SearchResult, search
from benchmarks.common.statistics import median, text
from benchmarks.common.tasks import Task, TaskConfig
from benchmarks.common.train import History, train

MAX_KEPT_POINTS = 60


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(ExperimentConfig):
    """One comparison.

    Attributes:
        optimizers: who takes part, with ranges to search; each gets ``search.num_trials`` trials. Without ranges nothing is
            searched.
        defaults: optimizers that run once more with their default hyper-parameters, nothing searched.
        shortened: optimizers that take part once more, searched for and trained with this share of the steps: a
            schedule that ends at zero shows what a loss costs only to runs that were planned for it.
        reference: its final training loss is the target for all.
        num_seeds: runs at the best setting, with seeds ``seed, seed + 1, …``.
        storage: database URL of the search; None: an SQLite file below ``out``.
    """

    task: TaskConfig
    optimizers: dict[str, OptimizerConfig]
    search: SearchConfig = field(default_factory=SearchConfig)
    defaults: list[str] = field(default_factory=lambda: ["kfac", "ekfac"])
    shortened: dict[str, float] = field(default_factory=dict)
    reference: str = "adamw"
    num_seeds: int = 3
    tensorboard: bool = True
    out: Path = field(default=Path("out/compare_optimizers"), metadata=LOCAL)
    storage: str | None = field(default=None, metadata=LOCAL)

    def __post_init__(self) -> None:
        for name in [*(own.kind or name for name, own in self.optimizers.items()), *self.defaults]:
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
        label: how it is called in tables and figures.
        search: None where nothing was searched.
    """

    name: str
    optimizer: str
    label: str
    settings: dict[str, Any]
    runs: list[History]
    search: SearchResult | None = None


def main(arguments: Sequence[str] | None = None) -> Report:
    """Runs the comparison of a config and writes its page."""
    return run_script(ComparisonConfig, run, arguments, "Compare optimizers on one task with equal search budgets.", None)


def run(config: ComparisonConfig) -> Report:
    """Searches, trains, and reports the contestants in the order of the config, those with defaults last."""
    task = Task(config.task, config.data_root, config.device)
    log, storage = RunLog(config.folder / "runs.jsonl"), config.storage or str(config.folder / "search.sqlite3")
    kinds = {name: own.kind or name for name, own in config.optimizers.items()}
    names = [name for name, kind in kinds.items() if kind != "muon" or muon_applies(task.build_model(config.seed))]
    entries = [(name, 1.0) for name in names] + [(name, config.shortened[name]) for name in names if name in config.shortened]
    searched = sum(1 for name, _ in entries if config.optimizers[name].search)
    total = searched * config.search.num_trials + (len(entries) + len(config.defaults)) * config.num_seeds
    contestants = []
    with progress(total, config.name) as display:
        for name, share in entries:
            own, kind, found, settings = config.optimizers[name], kinds[name], None, config.optimizers[name].fixed
            identity = [resolved(config.task), resolved(own), config.search.seed, config.search.training_seeds, config.device]
            if own.search:
                study = f"{config.name}-{name}-{fingerprint([*identity, default_settings(kind), share])}"
                found = search_settings(task, kind, own, config.search, study, storage, display.update, share)
                settings = found.settings
            runs = _run_seeds(config, task, log, kind, settings, share, display.update)
            suffix, remark = ("", "") if share == 1 else (f"-{share:g}", f" ({share:g} of the steps)")
            contestants.append(Contestant(name + suffix, kind, label(name) + remark, settings, runs, found))
        for kind in config.defaults:
            runs = _run_seeds(config, task, log, kind, {}, 1.0, display.update)
            contestants.append(Contestant(f"{kind}-defaults", kind, f"{label(kind)} (defaults)", {}, runs))
    return make_report(config, task, contestants)


def search_settings(
    task: Task,
    kind: str,
    optimizer: OptimizerConfig,
    config: SearchConfig,
    study: str,
    storage: str | Path,
    on_trial: Callable[[], object],
    share: float = 1.0,
) -> SearchResult:
    """The settings with the lowest mean final training loss over the search's training seeds."""
    seeds, steps = config.training_seeds, max(1, round(share * task.config.steps))
    worst = 10.0 * task.evaluate(task.build_model(seeds[0]), "train").loss

    def objective(settings: dict[str, Any]) -> float:
        make = optimizer_factory(kind, settings, task.config.likelihood)
        return sum(train(task, make, seed, steps=steps, with_test=False).final_loss for seed in seeds) / len(seeds)

    return search(study, optimizer, config, objective, storage=storage, worst=worst, on_trial=on_trial)


def _run_seeds(
    config: ComparisonConfig,
    task: Task,
    log: RunLog,
    optimizer: str,
    settings: dict[str, Any],
    share: float,
    on_run: Callable[[], object],
) -> list[History]:
    steps, make = max(1, round(share * config.task.steps)), optimizer_factory(optimizer, settings, config.task.likelihood)
    runs = []
    for seed in range(config.seed, config.seed + config.num_seeds):
        identity = [resolved(config.task), optimizer, default_settings(optimizer), settings, seed, share, config.device]
        content = log.get(identity, lambda: train(task, make, seed, steps=steps).to_dict(), optimizer=optimizer, seed=seed)  # noqa: B023
        runs.append(History.from_dict(content))
        on_run()
    return runs


def make_report(config: ComparisonConfig, task: Task, contestants: list[Contestant]) -> Report:
    """The table, loss against steps and seconds, test error; targets are those that the reference's runs set."""
    finals = sorted(next([run.final_loss for run in c.runs] for c in contestants if c.name == config.reference))
    targets = (float(np.median(finals)), finals[0])
    summaries = [summarize(contestant, targets) for contestant in contestants]
    reference = label(config.reference)
    caption = (
        "Medians over seeds (lowest to highest); test error: mean ± standard error over seeds. Target: the reference's "
        f"median final training loss, {targets[0]:.3g}, in brackets its lowest, {targets[1]:.3g}; — missed by half of the seeds "
        "or more."
    )
    series = {
        "loss_steps": ("Training loss against steps.", "steps", "train_loss", "step", "training loss in nats"),
        "loss_seconds": ("Training loss against training time.", "seconds", "train_loss", "seconds", "training loss in nats"),
        "test_error": (f"Test {task.error_name} against steps.", "steps", "test_error", "step", f"test {task.error_name}"),
    }
    return Report(
        title=f"Optimizers compared: {config.name}",
        text=[
            f"Each optimizer with ranges got {config.search.num_trials} trials of hyper-parameter search for the lowest final "
            f"training loss, then {config.num_seeds} seeds at its best setting; {config.task.steps} steps of batch "
            f"{config.task.batch_size}. Lines are medians over the seeds, bands go from the lowest to the highest. The target "
            f"is set by {reference}. Seconds are training time alone, without evaluations.",
        ],
        tables=[Table.of(caption, [_row(summary, task.error_name) for summary in summaries])],
        figures={
            stem: _figure(contestants, *what, (targets[0], f"{reference}'s final loss") if stem != "test_error" else None)
            for stem, what in series.items()
        },
        content={
            "reference": config.reference,
            "median_target": targets[0],
            "best_target": targets[1],
            "summaries": summaries,
            "curves": {c.name: [_thin(run) for run in c.runs] for c in contestants},
        },
        full={"trials": {c.name: c.search and c.search.trials for c in contestants}},
        scalars=_scalars(config, contestants) if config.tensorboard else {},
    )


def summarize(contestant: Contestant, targets: tuple[float, float]) -> dict[str, Any]:
    """What the runs come to; lists have one entry per seed, None where a target was missed."""
    runs, trials = contestant.runs, contestant.search.trials if contestant.search is not None else []
    reached = {key: [run.reach(target) for run in runs] for key, target in zip(("reach", "reach_best"), targets, strict=True)}
    return {
        "name": contestant.name,
        "label": contestant.label,
        "settings": contestant.settings,
        "num_trials": len(trials),
        "num_diverged_trials": sum(trial["diverged"] for trial in trials),
        "num_diverged": sum(run.diverged for run in runs),
        "final_loss": [run.final_loss for run in runs],
        "test_error": [run.test_error[-1] for run in runs],
        **{f"{key}_steps": [at and at[0] for at in found] for key, found in reached.items()},
        **{f"{key}_seconds": [at and at[1] for at in found] for key, found in reached.items()},
        "seconds": [run.seconds[-1] for run in runs],
        "milliseconds_per_step": [1000 * run.seconds[-1] / max(1, run.steps[-1]) for run in runs],
    }


def _row(summary: dict[str, Any], error_name: str) -> dict[str, Any]:
    finals = sorted(summary["final_loss"])
    percent = 100.0 if error_name == "error" else 1.0
    reached = {key: text(median(values)) for key, values in summary.items() if key.startswith("reach")}
    return {
        "optimizer": summary["label"],
        "settings": ", ".join(f"{key} {text(value)}" for key, value in summary["settings"].items()) or "defaults",
        "final training loss": f"{text(median(finals))} ({text(finals[0])} to {text(finals[-1])})",
        f"test {error_name}" + (" %" if percent > 1 else ""): [percent * error for error in summary["test_error"]],
        "steps to target (to lowest)": f"{reached['reach_steps']} ({reached['reach_best_steps']})",
        "seconds to target (to lowest)": f"{reached['reach_seconds']} ({reached['reach_best_seconds']})",
        "ms / step": median(summary["milliseconds_per_step"]),
        "diverged": f"{summary['num_diverged']} of {len(finals)}",
    }


def _figure(
    contestants: list[Contestant],
    caption: str,
    x: str,
    y: str,
    x_label: str,
    y_label: str,
    level: tuple[float, str] | None,
) -> Figure:
    curves = []
    for contestant in contestants:
        runs = [run for run in contestant.runs if run.diverged_step is None]
        if runs:
            style = "--" if contestant.name.endswith("-defaults") else "-"
            look = {"colour": OPTIMIZER_COLOURS.get(contestant.name.split("-")[0]), "style": style}
            curves.append(spread(contestant.label, [getattr(r, x) for r in runs], [getattr(r, y) for r in runs], **look))
    return line_figure(caption, curves, x_label=x_label, y_label=y_label, level=level)


def _scalars(config: ComparisonConfig, contestants: list[Contestant]) -> dict[str, list[tuple[int, float]]]:
    scalars = {}
    for contestant in contestants:
        for seed, run in enumerate(contestant.runs, config.seed):
            for key in ("train_loss", "test_loss", "test_error", "seconds"):
                scalars[f"{contestant.name}-seed{seed}/{key}"] = list(zip(run.steps, getattr(run, key), strict=True))
            scalars[f"{contestant.name}-seed{seed}/batch_loss"] = list(enumerate(run.batch_loss))
    return scalars


def _thin(run: History) -> dict[str, Any]:
    """A run without its mini-batch losses and with at most ``MAX_KEPT_POINTS`` evaluations, the last one among them."""
    kept = np.unique(np.linspace(0, len(run.steps) - 1, min(len(run.steps), MAX_KEPT_POINTS)).round().astype(int))
    series = {key: value for key, value in asdict(run).items() if isinstance(value, list) and key != "batch_loss"}
    points = {key: [value[i] if key == "steps" else float(f"{value[i]:.4g}") for i in kept] for key, value in series.items()}
    return {**points, "diverged_step": run.diverged_step}


if __name__ == "__main__":
    run_command(main)
