"""Weight samples during training, ensembles at test time: KFACVI against its rivals.

    python -m benchmarks.kfac_vi --config configs/kfac_vi/digits.yaml
    python -m benchmarks.kfac_vi --config configs/kfac_vi/lenet5_cifar10.yaml --data-root ~/data --only '[kfac, kfac_vi_1]'

Stopped at any point, the same command goes on. ``--only`` runs some of the methods; the page shows what it ran.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.common.command import run_command
from benchmarks.common.config import resolved
from benchmarks.common.data import Dataset
from benchmarks.common.figures import COLOURS, Curve, Figure, finish, line_figure, spread, subplots
from benchmarks.common.report import Report, Table, progress, run_script
from benchmarks.common.results import RunLog, fingerprint
from benchmarks.common.search import OptimizerConfig, search
from benchmarks.vi.config import MethodConfig, VIConfig
from benchmarks.vi.data import load_for_search, load_sets
from benchmarks.vi.evaluation import ensemble_nll, evaluate
from benchmarks.vi.methods import is_installed, train_method

METRICS = ("accuracy", "nll", "brier", "ece")
NOTHING_LEARNT = 3.0
"""Likelihood loss recorded for a trial that diverged."""
Results = dict[str, dict[str, Any]]
"""``{method: {"settings", "runs": [one evaluation per seed], "summary"}}``."""


def main(arguments: Sequence[str] | None = None) -> Report:
    """Runs the experiment of a config and writes its page."""
    return run_script(VIConfig, run, arguments, "Weight uncertainty: accuracy, calibration, novelty.", None)


def run(config: VIConfig) -> Report:
    """All methods and seeds; finished searches and runs are kept."""
    methods = {name: method for name, method in config.taking_part().items() if is_installed(method)}
    for name in set(config.taking_part()) - set(methods):
        print(f"'{name}' is left out: its package is not installed (pip install ivon-opt)", file=sys.stderr)
    data, log, results = load_sets(config), RunLog(config.folder / "runs.jsonl"), {}
    with progress(len(methods) * config.num_seeds, config.name) as display:
        for name, method in methods.items():
            settings = _settings(name, method, config)
            runs = []
            for seed in range(config.seed, config.seed + config.num_seeds):
                runs.append(_run(log, name, method, settings, data, config, seed))
                display.update()
            results[name] = {"settings": settings, "runs": runs, "summary": summarize(runs)}
    return make_report(config, results)


def _settings(name: str, method: MethodConfig, config: VIConfig) -> dict[str, Any]:
    """The method's settings, those with ranges as the search found them."""
    if config.search is None or not method.search:
        return dict(method.settings)
    data, seed = load_for_search(config), config.search.seed

    def objective(settings: dict[str, Any]) -> float:
        return ensemble_nll(train_method(method, settings, data, config, seed), data, config.predict_samples, 0)

    plan = OptimizerConfig(fixed=method.settings, search=method.search, start=method.start)
    study = f"{name}-{fingerprint([asdict(method), config.model, config.epochs, config.batch_size, asdict(config.data)])}"
    storage = config.folder / "search.db"
    with progress(config.search.num_trials, f"search {name}") as display:
        on_trial, worst = display.update, NOTHING_LEARNT
        return search(study, plan, config.search, objective, storage=storage, worst=worst, on_trial=on_trial).settings


def _run(
    log: RunLog, name: str, method: MethodConfig, settings: dict[str, Any], data: Dataset, config: VIConfig, seed: int
) -> dict[str, Any]:
    left_out = ("methods", "num_seeds", "seed", "search", "num_validation", "threads")
    shared = {key: value for key, value in resolved(config).items() if key not in left_out}

    def make() -> dict[str, Any]:
        return evaluate(train_method(method, settings, data, config, seed, config.folder / "members"), data, config, seed)

    return dict(log.get([asdict(method), settings, shared, seed], make, method=name, seed=seed))


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds that have weights, of every metric, at the mean and over samples."""
    summary: dict[str, Any] = {"diverged": sum(run["diverged"] for run in runs), "cost": runs[0]["cost"]}
    summary["seconds"] = float(np.mean([run["seconds"] for run in runs]))
    for part in ("mean", "samples"):
        kept = pd.json_normalize([run[part] for run in runs if run[part] is not None])
        summary[part] = None
        if len(kept):
            names = [name for name in kept if name in METRICS or str(name).startswith("detection.")]
            summary[part] = {str(name).removeprefix("detection."): _spread(kept[name]) for name in names}
    return summary


def _spread(values: pd.Series) -> dict[str, float]:
    values = values.astype(float)
    deviation = float(values.std()) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "std": deviation, "error": deviation / math.sqrt(len(values))}


def make_report(config: VIConfig, results: Results) -> Report:
    """One table, three pictures."""
    caption = "Mean ± standard deviation over seeds; the ensemble of a single net is drawn from its posterior."
    content = {name: {"settings": r["settings"], "summary": r["summary"]} for name, r in results.items()}
    return Report(
        title=f"Weight uncertainty: {config.name}",
        text=[f"{config.num_seeds} seeds, {config.epochs:g} epochs, batch {config.batch_size}."],
        tables=[Table.of(caption, rows(results))],
        figures={
            "accuracy": _curves_figure(results),
            "reliability": _reliability_figure(results),
            "rotation": _rotation_figure(results),
        },
        content={"results": content},
        full={"runs": {name: result["runs"] for name, result in results.items()}},
    )


def rows(results: Results) -> list[dict[str, Any]]:
    """One row per method and way to predict."""
    table = []
    for name, result in results.items():
        summary = result["summary"]
        note = f" ({summary['diverged']} diverged)" if summary["diverged"] else ""
        for part in [part for part in ("mean", "samples") if summary[part] is not None] or ["mean"]:
            table.append({"method": name + note, "at": part, **_cells(summary[part] or {}, summary)})
    return table


def _cells(values: dict[str, Any], summary: dict[str, Any]) -> dict[str, str]:
    def spread_of(key: str, scale: float, digits: int) -> str:
        return f"{scale * values[key]['mean']:.{digits}f} ± {scale * values[key]['std']:.{digits}f}" if values else "—"

    shown = {"accuracy %": ("accuracy", 100, 2), "NLL": ("nll", 1, 4), "ECE %": ("ece", 100, 2), "Brier": ("brier", 1, 4)}
    shifts = {f"AUROC {shift}": (f"{shift}.auroc_entropy", 1, 3) for shift in ("shuffled", "rotated")}
    cells = {column: spread_of(*what) for column, what in {**shown, **shifts}.items()}
    return {**cells, "gradients": str(summary["cost"]), "time": tqdm.format_interval(summary["seconds"])}


def _curves_figure(results: Results) -> Figure:
    """Accuracy over the training: solid on the test set, dashed on the training set."""
    curves = []
    for index, (name, result) in enumerate(results.items()):
        colour, found = COLOURS[index % len(COLOURS)], [run["curve"] for run in result["runs"]]
        epochs = [curve["epochs"] for curve in found]
        curves.append(spread(name, epochs, [curve["test_accuracy"] for curve in found], colour=colour))
        training = spread("", epochs, [curve["train_accuracy"] for curve in found])
        curves.append(Curve("_training", training.x, training.middle, colour=colour, style="--"))
    caption = "Accuracy at the mean of the weights: test (solid) and training (dashed)."
    return line_figure(caption, curves, x_label="epoch", y_label="accuracy", log_y=False, beside=True)


def _reliability_figure(results: Results) -> Figure:
    """Accuracy against confidence: on the diagonal a method is as sure as it is right."""
    figure, axes = subplots(figsize=(5.2, 4.6))
    axes.plot([0, 1], [0, 1], ":", color="#777777", linewidth=1.0)
    for index, (name, result) in enumerate(results.items()):
        confidence, accuracy = _joined_diagram([part["reliability"] for part in _best_parts(result)])
        axes.plot(confidence, accuracy, "o-", markersize=3, color=COLOURS[index % len(COLOURS)], label=name)
    axes.set(xlabel="confidence", ylabel="accuracy")
    axes.legend()
    return finish(figure, "Reliability on the test set: of the ensemble where there is one, else of the single net.")


def _joined_diagram(diagrams: list[dict[str, list[Any]]]) -> tuple[list[float], list[float]]:
    """Bins of all seeds together; bins with fewer than ten examples are noise and left out."""
    if not diagrams:
        return [], []
    counts, confidence, accuracy = (
        np.array([d[key] for d in diagrams], dtype=float) for key in ("counts", "confidence", "accuracy")
    )
    total = counts.sum(0)
    means = [np.nansum(counts * values, 0)[total >= 10] / total[total >= 10] for values in (confidence, accuracy)]
    return means[0].tolist(), means[1].tolist()


def _best_parts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The ensemble's values of every run that has some, or else those of the single net."""
    parts = [run["samples"] or run["mean"] for run in result["runs"]]
    return [part for part in parts if part is not None]


def _rotation_figure(results: Results) -> Figure:
    """Mean entropy of the prediction while the test images turn."""
    curves = []
    for index, (name, result) in enumerate(results.items()):
        parts = _best_parts(result)
        if parts:
            angles, entropy = ([[point[key] for point in part["angles"]] for part in parts] for key in ("angle", "entropy"))
            curves.append(spread(name, angles, entropy, colour=COLOURS[index % len(COLOURS)]))
    caption = "Uncertainty away from the training data, of the ensemble where there is one, else of the single net."
    return line_figure(caption, curves, x_label="rotation of the test images (degrees)", y_label="entropy (nats)", log_y=False)


if __name__ == "__main__":
    run_command(main)
