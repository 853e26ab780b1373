"""Hyper-parameter search with an equal number of trials for everybody, which can be stopped, resumed and shared.

A search is an optuna study in a storage that workers on one or on many machines have in common. Who has died is known by
optuna's heartbeat alone; the trials of the dead are run again, and a search that was cut off goes on as it would have gone on.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text

from benchmarks.common.config import LOCAL, ConfigError
from benchmarks.common.storage import open_database, retry_callback

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)

POLL_SECONDS = 0.5
NEVER_HEARD_OF = text(
    "SELECT number FROM trials WHERE state = 'RUNNING'"
    " AND study_id = (SELECT study_id FROM studies WHERE study_name = :study)"
    " AND trial_id NOT IN (SELECT trial_id FROM trial_heartbeats)"
)


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
        heartbeat_seconds, grace_seconds: of optuna's heartbeat; a trial that is silent for longer is run again.
    """

    num_trials: int = 20
    seed: int = 0
    training_seeds: list[int] = field(default_factory=lambda: [1000])
    heartbeat_seconds: int = field(default=5, metadata=LOCAL)
    grace_seconds: int = field(default=20, metadata=LOCAL)

    def __post_init__(self) -> None:
        if self.num_trials < 1:
            raise ValueError(f"num_trials must be >= 1, got {self.num_trials}")
        if not self.training_seeds:
            raise ValueError("training_seeds must name at least one seed, got none")
        check_heartbeat(self.heartbeat_seconds, self.grace_seconds)


def check_heartbeat(heartbeat_seconds: int, grace_seconds: int) -> None:
    """Raises ValueError for times that declare living workers dead."""
    if not 1 <= heartbeat_seconds < grace_seconds:
        raise ValueError(
            f"grace_seconds must be above heartbeat_seconds, and that at least 1, got {grace_seconds} and {heartbeat_seconds}"
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """How one optimizer takes part.

    Attributes:
        fixed: settings that are the same in every trial.
        search: ranges of the others. ``start``: the first trial's values.
        kind: the optimizer to build, where its key is a name of its own: so variants can stand side by side.
    """

    fixed: dict[str, Any] = field(default_factory=dict)
    search: dict[str, SearchRange] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    kind: str | None = None


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
    objective: Callable[[dict[str, Any]], float],
    *,
    storage: str | Path,
    worst: float,
    on_trial: Callable[[], object] = lambda: None,
) -> SearchResult:
    """Minimises ``objective(settings)`` with the tree-structured Parzen estimator of optuna.

    Finished trials in ``storage`` count towards the budget. Several processes may share a search; at the end each waits for
    the trials that others still run.

    Args:
        name: of the study; one storage holds many.
        objective: takes ``fixed`` and searched settings, returns the value; not finite means diverged.
        storage: a database URL, or the path of an SQLite file.
        worst: recorded in place of a value that is not finite or larger: the sampler needs numbers, and how far a
            broken run got says nothing.
        on_trial: called after each finished trial.
    """
    if not optimizer.search:
        raise ConfigError(f"the search ranges of '{name}' are empty: name at least one setting to search.")
    place = open_database(str(storage), config.heartbeat_seconds, config.grace_seconds)
    sampler = NumberedSampler(config.seed, n_startup_trials=5, multivariate=True)
    study = Search(name, place, sampler, config.num_trials, config.grace_seconds)
    if optimizer.start:
        study.study.enqueue_trial(optimizer.start, skip_if_exists=True)

    def run(trial: optuna.Trial) -> float:
        value = objective({**optimizer.fixed, **suggest(trial, optimizer.search)})
        trial.set_user_attr("diverged", not math.isfinite(value))
        return min(value, worst) if math.isfinite(value) else worst

    work([study], lambda _: (study.run_one(run), on_trial()), alone=True)
    trials = [
        {"params": t.params, "value": t.value, "diverged": t.user_attrs.get("diverged", False)} for t in study.finished()
    ]
    best = min(study.finished(), key=lambda trial: (trial.value, trial.number))
    return SearchResult({**optimizer.fixed, **best.params}, float(best.value or 0.0), trials)


class NumberedSampler(TPESampler):
    """A tree-structured Parzen estimator whose random numbers depend on the seed and the trial's place alone.

    A search that was cut off goes on as it would have gone on, and two workers never draw the same numbers.
    """

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(seed=seed, **options)
        self._seed, self._options = seed, options

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """A fresh estimator for each trial."""
        seed, options = self._seed, self._options
        TPESampler.__init__(self, seed=seed + place_of(study, trial.number), **options)
        super().before_trial(study, trial)


def place_of(study: optuna.Study, number: int) -> int:
    """Which trial of the search number ``number`` is, counted without repetitions.

    A repetition of a dead trial has the place of its original.
    """
    trials = study.get_trials(deepcopy=False)
    history = _history(trials[number])
    original = history[0] if history else number
    return sum(1 for other in trials[:original] if not _history(other))


def _history(trial: FrozenTrial) -> list[int]:
    """Numbers of the dead trials that this one repeats, the original first."""
    return list(trial.system_attrs.get("retry_history", []))


class SurplusTrial(Exception):
    """Another worker has taken this trial, or the last one of the budget."""


class Search:
    """One study with a budget.

    Attributes:
        num_trials: its budget.
        grace_seconds: silence after which a trial is taken for dead.
    """

    def __init__(self, name: str, storage: BaseStorage, sampler: NumberedSampler, num_trials: int, grace_seconds: float) -> None:
        self.storage, self.num_trials, self.grace_seconds = storage, num_trials, grace_seconds
        self.study = optuna.create_study(study_name=name, storage=storage, sampler=sampler, load_if_exists=True)

    def trials(self, state: TrialState | None = None) -> list[FrozenTrial]:
        """All trials, or those of one state, in order."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if state in (None, trial.state)]

    def finished(self) -> list[FrozenTrial]:
        """Finished trials, in order, as many as the budget allows."""
        return self.trials(TrialState.COMPLETE)[: self.num_trials]

    def running(self) -> list[FrozenTrial]:
        """Trials that may still finish."""
        patience = self._patience()
        return [trial for trial in self.trials(TrialState.RUNNING) if _age(trial) < patience]

    def _patience(self) -> float:
        """Seconds after which a trial that cannot be heard of counts as dead."""
        longest = [t.duration.total_seconds() for t in self.trials(TrialState.COMPLETE)[-20:] if t.duration is not None]
        return max(2.0 * self.grace_seconds, 20.0 * max(longest, default=math.inf))

    def fail_dead(self) -> None:
        """Queues the trials of dead workers again, also those that optuna keeps as running for ever.

        Optuna sees a worker's death by its heartbeat. One that died before its first heartbeat, or whose storage has
        none (a journal), is known by its age.
        """
        optuna.storages.fail_stale_trials(self.study)
        silent, patience = self._never_heard_of(), self._patience()
        for trial in self.trials(TrialState.RUNNING):
            if silent is not None and trial.number not in silent:
                continue
            if _age(trial) >= (patience if silent is None else self.grace_seconds):
                self._repeat(trial)

    def _repeat(self, trial: FrozenTrial) -> None:
        with contextlib.suppress(ValueError, UpdateFinishedTrialError):  # another worker was faster
            self.study.tell(trial.number, state=TrialState.FAIL)
            retry_callback()[0](self.study, trial)

    def _never_heard_of(self) -> set[int] | None:
        """Numbers of running trials without a heartbeat; None where the storage knows no heartbeats."""
        if not isinstance(self.storage, RDBStorage):
            return None
        with self.storage.engine.connect() as connection:
            return {number for (number,) in connection.execute(NEVER_HEARD_OF, {"study": self.study.study_name})}

    def run_one(self, objective: Callable[[optuna.Trial], float]) -> bool:
        """Asks for one trial, runs it and records it; False for one beyond the budget, which is given back unrun.

        A process that was stopped for longer than the grace period has lost its trial: another one repeats it. A trial that
        is interrupted, or that fails by a bug, is queued again.
        """
        finished = lost = False
        taken: list[int] = []

        def run(trial: optuna.Trial) -> float:
            nonlocal finished, lost
            busy = [*self.running(), *self.trials(TrialState.COMPLETE)]
            if sum(1 for other in busy if other.number < trial.number) >= self.num_trials:
                raise SurplusTrial(f"trial {trial.number} is beyond the budget of {self.num_trials}")
            taken.append(trial.number)
            try:
                value = objective(trial)
            except UpdateFinishedTrialError as error:
                lost = True
                raise SurplusTrial(f"trial {trial.number} was given to another worker") from error
            finished = True
            return value

        # optimize, not ask and tell: it sends the heartbeat, and queues dead trials again.
        try:
            self.study.optimize(run, n_trials=1, catch=(SurplusTrial,))
        except BaseException as error:
            if lost and isinstance(error, ValueError):  # optuna's, at telling the outcome of a trial that is closed
                return False
            if taken:
                retry_callback()[0](self.study, self.study.get_trials()[taken[0]])
            raise
        return finished


def work(searches: list[Search], run_one: Callable[[int], object], *, alone: bool) -> None:
    """Runs trials until the budget of every search is spent: always of the one with the fewest trials.

    All searches advance together, so that a study that is looked at early shows all of them.

    Args:
        run_one: runs one trial of the search with this number.
        alone: no other worker is expected: what an earlier run left behind is awaited and repeated first, so that the search
            goes on exactly as it would have gone on.
    """
    if alone:
        _await_dead(searches)
    while True:
        finished = [len(search.finished()) for search in searches]
        busy = [count + len(search.running()) for count, search in zip(finished, searches, strict=True)]
        lacking = [number for number, search in enumerate(searches) if busy[number] < search.num_trials]
        if lacking:
            run_one(min(lacking, key=lambda number: (busy[number], number)))
        elif any(count < search.num_trials for count, search in zip(finished, searches, strict=True)):
            time.sleep(POLL_SECONDS)  # others are at the last trials; if they die, one of us takes over
            for search in searches:
                search.fail_dead()
        else:
            _await_dead(searches)  # no trial is left as running
            return


def _await_dead(searches: list[Search]) -> None:
    """Waits until trials that are running have come to an end or count as dead."""
    deadline = time.monotonic() + max(search.grace_seconds for search in searches) + 2 * POLL_SECONDS
    while True:
        for search in searches:
            search.fail_dead()
        if not any(search.running() for search in searches) or time.monotonic() > deadline:
            return
        time.sleep(POLL_SECONDS)


def suggest(trial: optuna.Trial, ranges: Mapping[str, SearchRange]) -> dict[str, Any]:
    """The values of a trial."""
    return {
        key: trial.suggest_categorical(key, allowed.choices)
        if allowed.choices is not None
        else trial.suggest_float(key, allowed.low or 0.0, allowed.high or 0.0, log=allowed.log)
        for key, allowed in ranges.items()
    }


def _age(trial: FrozenTrial) -> float:
    return (datetime.now() - trial.datetime_start).total_seconds() if trial.datetime_start else 0.0
