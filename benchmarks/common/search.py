"""Hyper-parameter search with an equal number of trials for everybody, which can be stopped and resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.config import ConfigError

Objective = Callable[[dict[str, Any]], float]


@dataclass(frozen=True)
class SearchRange:
    """What a search may choose for one setting: a range of numbers, or a list of ``choices``."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: list[Any] | None = None

    def __post_init__(self) -> None:
        if self.choices is not None:
            if self.low is not None or self.high is not None:
                raise ValueError("give either choices, or low and high, not both")
        elif self.low is None or self.high is None or not self.low < self.high:
            raise ValueError(f"a search range needs low < high, or choices; got low={self.low}, high={self.high}")
        elif self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range needs low > 0, got {self.low}")


@dataclass(frozen=True)
class SearchConfig:
    """Budget of a search.

    Attributes:
        num_trials: runs for each optimizer, the same for all.
        seed: of the sampler; the same seed gives the same trials, also after an interruption.
        training_seeds: of weights and batches during the search; the value of a trial is the mean over them, so
            that no setting wins by one lucky run.
    """

    num_trials: int = 20
    seed: int = 0
    training_seeds: list[int] = field(default_factory=lambda: [1000])

    def __post_init__(self) -> None:
        if self.num_trials < 1:
            raise ValueError(f"num_trials must be >= 1, got {self.num_trials}")
        if not self.training_seeds:
            raise ValueError("training_seeds must name at least one seed, got none")


@dataclass(frozen=True)
class OptimizerConfig:
    """How one optimizer takes part: ``fixed`` settings, ``search`` ranges, ``start``: the first trial's values."""

    fixed: dict[str, Any] = field(default_factory=dict)
    search: dict[str, SearchRange] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchResult:
    """The best settings found, their value, and all trials in order."""

    settings: dict[str, Any]
    value: float
    trials: list[dict[str, Any]]


def search(
    name: str,
    optimizer: OptimizerConfig,
    config: SearchConfig,
    objective: Objective,
    *,
    storage: str | Path,
    worst: float,
    on_trial: Callable[[], None] = lambda: None,
) -> SearchResult:
    """Minimises ``objective(settings)`` with the tree-structured Parzen estimator of optuna.

    Finished trials in ``storage`` count towards the budget; a trial that was cut off is run again.

    Args:
        name: of the study; one storage holds many.
        objective: takes ``fixed`` and searched settings, returns the value; not finite means diverged.
        storage: a database URL, or the path of an SQLite file.
        worst: recorded in place of a value that is not finite or larger: the sampler needs numbers, and how far a
            broken run got says nothing.
        on_trial: called after each finished trial.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not optimizer.search:
        raise ConfigError(f"optimizers.{name}.search is empty: name at least one setting to search.")
    study = optuna.create_study(study_name=name, storage=_storage_url(storage), load_if_exists=True)
    _retry_unfinished(study)
    while (number := _num_finished(study)) < config.num_trials:
        # A sampler of its own for each trial: an interrupted search continues as it would have gone on.
        study.sampler = optuna.samplers.TPESampler(seed=config.seed + number, n_startup_trials=5, multivariate=True)
        if number == 0 and optimizer.start:
            study.enqueue_trial(optimizer.start, skip_if_exists=True)
        trial = study.ask()
        settings = {**optimizer.fixed, **_suggest(trial, optimizer.search)}
        value = objective(settings)
        trial.set_user_attr("diverged", not math.isfinite(value))
        study.tell(trial, min(value, worst) if math.isfinite(value) else worst)
        on_trial()
    finished = [t for t in study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
    trials = [{"params": t.params, "value": t.value, "diverged": t.user_attrs.get("diverged", False)} for t in finished]
    return SearchResult({**optimizer.fixed, **study.best_params}, study.best_value, trials)


def num_finished_trials(name: str, storage: str | Path) -> int:
    """Finished trials of a study; 0 when there is none."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.load_study(study_name=name, storage=_storage_url(storage))
    except KeyError:
        return 0
    return _num_finished(study)


def _storage_url(storage: str | Path) -> str:
    if "://" in str(storage):
        return str(storage)
    Path(storage).parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{Path(storage).resolve()}"


def _num_finished(study: Any) -> int:
    import optuna

    return sum(1 for t in study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE)


def _retry_unfinished(study: Any) -> None:
    """Trials that a killed process left behind are closed and queued again with the same values."""
    import optuna

    for trial in study.get_trials(deepcopy=False):
        if trial.state == optuna.trial.TrialState.RUNNING:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)


def _suggest(trial: Any, ranges: Mapping[str, SearchRange]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for key, allowed in ranges.items():
        if allowed.choices is not None:
            chosen[key] = trial.suggest_categorical(key, allowed.choices)
        else:
            chosen[key] = trial.suggest_float(key, allowed.low, allowed.high, log=allowed.log)
    return chosen
