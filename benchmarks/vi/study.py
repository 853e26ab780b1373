"""All methods and seeds of an experiment; finished searches and runs are kept, the same command goes on."""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import asdict
from typing import Any

from benchmarks.common.data import Dataset
from benchmarks.common.progress import progress
from benchmarks.common.results import fingerprint, read_json, write_json
from benchmarks.common.search import OptimizerConfig, search
from benchmarks.vi.config import MethodConfig, VIConfig
from benchmarks.vi.data import load_for_search, load_sets
from benchmarks.vi.evaluation import ensemble_nll, evaluate
from benchmarks.vi.members import MemberStore
from benchmarks.vi.methods import Training, is_installed, train_method

METRICS = ("accuracy", "nll", "brier", "ece")
NOTHING_LEARNT = 3.0
"""Likelihood loss recorded for a trial that diverged."""


def run_study(config: VIConfig) -> dict[str, dict[str, Any]]:
    """``{method: {"label", "settings", "runs": [one evaluation per seed], "summary"}}``."""
    methods: dict[str, MethodConfig] = {}
    for name, method in config.taking_part().items():
        if is_installed(method):
            methods[name] = method
        else:
            print(f"'{name}' is left out: its package is not installed (pip install ivon-opt)", file=sys.stderr)
    data = load_sets(config)
    results: dict[str, dict[str, Any]] = {}
    with progress(len(methods) * config.num_seeds, config.name) as bar:
        for name, method in methods.items():
            settings = _settings(name, method, config)
            runs = []
            for seed in range(config.seed, config.seed + config.num_seeds):
                runs.append(_run(name, method, settings, data, config, seed))
                bar.advance(note=name)
            results[name] = {"settings": settings, "runs": runs, "summary": summarize_runs(runs)}
    return results


def training_of(config: VIConfig, data: Dataset) -> Training:
    """Steps and schedule of the experiment for this training set."""
    epoch_steps = max(1, len(data.train_inputs) // config.batch_size)
    return Training(
        model=config.model,
        num_steps=max(1, round(config.epochs * epoch_steps)),
        epoch_steps=epoch_steps,
        batch_size=config.batch_size,
        schedule=config.schedule,
        evaluations=config.evaluations,
        eval_examples=config.eval_examples,
        device=config.device,
    )


def _settings(name: str, method: MethodConfig, config: VIConfig) -> dict[str, Any]:
    """The method's settings, those with ranges as the search found them."""
    if config.search is None or not method.search:
        return dict(method.settings)
    data = load_for_search(config)
    training = training_of(config, data)

    def objective(settings: dict[str, Any]) -> float:
        trained = train_method(method, settings, data, training, config.search.seed if config.search else 0)
        return ensemble_nll(trained, data, config.predict_samples, 0)

    plan = OptimizerConfig(fixed=method.settings, search=method.search, start=method.start)
    identity = fingerprint([asdict(method), config.model, config.epochs, config.batch_size, asdict(config.data)])
    storage = config.out / config.name / "search.db"
    with progress(config.search.num_trials, f"search {name}") as bar:
        found = search(
            f"{name}-{identity}",
            plan,
            config.search,
            objective,
            storage=storage,
            worst=NOTHING_LEARNT,
            on_trial=bar.advance,
        )
    return found.settings


def _run(name: str, method: MethodConfig, settings: dict[str, Any], data: Dataset, config: VIConfig, seed: int) -> dict[str, Any]:
    shared = {key: value for key, value in asdict(config).items() if key not in _NOT_PART_OF_A_RUN}
    identity = fingerprint([asdict(method), settings, shared, seed])
    path = config.out / config.name / "runs" / f"{name}-{seed}-{identity}.json"
    if path.is_file():
        return dict(read_json(path))
    training = training_of(config, data)
    store = MemberStore(config.out / config.name / "members", {"data": asdict(config.data), **asdict(training)})
    trained = train_method(method, settings, data, training, seed, store)
    result = evaluate(trained, data, config, seed)
    write_json(path, result)
    return dict(read_json(path))


_NOT_PART_OF_A_RUN = ("methods", "num_seeds", "seed", "search", "num_validation", "data_root", "out", "keep", "only")


def summarize_runs(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds that have weights, of every metric, at the mean and over samples."""
    summary: dict[str, Any] = {"diverged": sum(run["diverged"] for run in runs), "cost": runs[0]["cost"]}
    summary["seconds"] = statistics.fmean(run["seconds"] for run in runs)
    for part in ("mean", "samples"):
        kept = [run[part] for run in runs if run[part] is not None]
        if not kept:
            summary[part] = None
            continue
        summary[part] = {metric: _spread([values[metric] for values in kept]) for metric in METRICS}
        summary[part]["detection"] = {
            shift: {score: _spread([values["detection"][shift][score] for values in kept]) for score in scores}
            for shift, scores in kept[0]["detection"].items()
        }
    return summary


def _spread(values: list[float | None]) -> dict[str, float]:
    numbers = [math.nan if value is None else value for value in values]
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return {"mean": statistics.fmean(numbers), "std": deviation, "error": deviation / len(numbers) ** 0.5}
