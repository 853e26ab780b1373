"""Hyper-parameter search with an equal number of trials for everybody, which can be stopped and resumed."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.config import ConfigError

Objective = Callable[[dict[str, Any]], float]
OWNER = "owner"  # user attribute of a trial: the process that runs it


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
        elif self.low is None or self.high is None or not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"a search range needs finite low < high, or choices; got low={self.low}, high={self.high}")
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

    Finished trials in ``storage`` count towards the budget; a trial that was cut off is run again. Several processes of one
    machine may share a search: each trial carries a mark of its process, and only the trials of dead ones are run again. At
    the end a process waits for the trials that others still run. (Trials of other machines are neither awaited nor repeated.)

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
    study = optuna.create_study(study_name=name, storage=_url(storage), load_if_exists=True)
    owner = owner_mark()
    while (finished := _num_finished(study)) < config.num_trials:
        number = finished + _num_running(study)  # of others: this process runs none here
        if number >= config.num_trials:
            time.sleep(1.0)
            continue
        # A sampler of its own for each trial: an interrupted search continues as it would have gone on.
        study.sampler = optuna.samplers.TPESampler(seed=config.seed + number, n_startup_trials=5, multivariate=True)
        if number == 0 and optimizer.start:
            study.enqueue_trial(optimizer.start, skip_if_exists=True)
        trial = study.ask()
        trial.set_user_attr(OWNER, owner)
        settings = {**optimizer.fixed, **_suggest(trial, optimizer.search)}
        try:
            value = objective(settings)
        except BaseException:
            _retry(study, trial.number, trial.params)
            raise
        trial.set_user_attr("diverged", not math.isfinite(value))
        study.tell(trial, min(value, worst) if math.isfinite(value) else worst)
        on_trial()
    complete = [t for t in study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
    trials = [{"params": t.params, "value": t.value, "diverged": t.user_attrs.get("diverged", False)} for t in complete]
    return SearchResult({**optimizer.fixed, **study.best_params}, study.best_value, trials)


def num_finished_trials(name: str, storage: str | Path) -> int:
    """Finished trials of a study; 0 when there is none."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.load_study(study_name=name, storage=_url(storage))
    except KeyError:
        return 0
    return _num_finished(study)


def _url(storage: str | Path) -> str:
    from benchmarks.common.storage import database_url

    return database_url(str(storage)).render_as_string(hide_password=False)


def _num_finished(study: Any) -> int:
    import optuna

    return sum(1 for t in study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE)


def owner_mark(pid: int | None = None) -> str:
    """The mark of a process of this machine (None: this one), with its start: numbers are used again."""
    import psutil

    return f"{socket.gethostname()} {pid or os.getpid()} {psutil.Process(pid).create_time():.2f}"


def _lives(owner: str) -> bool:
    """Whether a process of this machine is still there."""
    import psutil

    _, pid, started = owner.rsplit(" ", 2)
    try:
        process = psutil.Process(int(pid))
        return f"{process.create_time():.2f}" == started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _num_running(study: Any) -> int:
    """Trials that live processes of this machine run; those that dead ones left behind are queued again."""
    import optuna

    running = 0
    for trial in study.get_trials(deepcopy=False):
        owner = trial.user_attrs.get(OWNER, "")
        if trial.state != optuna.trial.TrialState.RUNNING or not owner.startswith(f"{socket.gethostname()} "):
            continue
        if _lives(owner):
            running += 1
        else:
            _retry(study, trial.number, trial.params)
    return running


def _retry(study: Any, number: int, params: Mapping[str, Any]) -> None:
    """Closes a trial and queues its values again."""
    import optuna

    try:
        study.tell(number, state=optuna.trial.TrialState.FAIL)
    except ValueError:
        return  # another process was faster
    study.enqueue_trial(dict(params))


def _suggest(trial: Any, ranges: Mapping[str, SearchRange]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for key, allowed in ranges.items():
        if allowed.choices is not None:
            chosen[key] = trial.suggest_categorical(key, allowed.choices)
        else:
            chosen[key] = trial.suggest_float(key, allowed.low, allowed.high, log=allowed.log)
    return chosen
