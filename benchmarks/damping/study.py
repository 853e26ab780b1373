"""Studies, their storage and the workers' loop: who runs which trial, and what happens to trials that died.

Each setting (an optimizer at one damping) is an optuna study; all studies of a sweep share one storage, which is
all that workers on one or on many machines have in common.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text

from benchmarks.common.search import SearchRange
from benchmarks.common.storage import open_database, retry_callback
from benchmarks.common.tasks import Task
from benchmarks.damping.config import Setting, SweepConfig
from benchmarks.damping.trial import TrialResult, train_trial

RESULT = "result"  # user attribute with everything a trial came to
POLL_SECONDS = 0.5
NEVER_HEARD_OF = text(
    "SELECT number FROM trials WHERE state = 'RUNNING'"
    " AND study_id = (SELECT study_id FROM studies WHERE study_name = :study)"
    " AND trial_id NOT IN (SELECT trial_id FROM trial_heartbeats)"
)


def open_storage(config: SweepConfig) -> BaseStorage:
    """The storage of a sweep: a database, below its folder where the config names none."""
    place = str(config.storage) if config.storage is not None else str(config.folder / "trials.sqlite3")
    return open_database(place, config.heartbeat_seconds, config.grace_seconds)


class NumberedSampler(BaseSampler):
    """A tree-structured Parzen estimator whose random numbers depend on the seed and the trial's place alone.

    A search that was cut off goes on as it would have gone on, and two workers never draw the same numbers.
    """

    def __init__(self, seed: int, num_startup: int, *, parallel: bool) -> None:
        self.seed, self.num_startup, self.parallel = seed, num_startup, parallel
        self._current = self._make(0)

    def _make(self, place: int) -> TPESampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return TPESampler(seed=self.seed + place, n_startup_trials=self.num_startup, constant_liar=self.parallel)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """A fresh estimator for each trial."""
        self._current = self._make(place_of(study, trial.number))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        """As the estimator does."""
        return self._current.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        """As the estimator does."""
        return self._current.sample_relative(study, trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: Any) -> Any:
        """As the estimator does."""
        return self._current.sample_independent(study, trial, name, distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """As the estimator does."""
        self._current.after_trial(study, trial, state, values)


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


@dataclass(frozen=True)
class Counts:
    """Trials of one study. ``running`` counts those that may still finish."""

    finished: int
    running: int
    waiting: int


class SettingStudy:
    """The study of one setting."""

    def __init__(self, config: SweepConfig, setting: Setting, storage: BaseStorage) -> None:
        self.config, self.setting, self.storage = config, setting, storage
        sampler = NumberedSampler(config.seed, config.num_startup, parallel=config.workers > 1)
        self.study = optuna.create_study(
            study_name=config.study_name(setting), storage=storage, sampler=sampler, load_if_exists=True
        )

    def finished(self) -> list[FrozenTrial]:
        """Finished trials, in order, as many as the budget allows."""
        trials = [t for t in self.study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
        return trials[: self.config.num_trials]

    def counts(self) -> Counts:
        """How far the search is."""
        trials = self.study.get_trials(deepcopy=False)
        finished = sum(1 for t in trials if t.state == TrialState.COMPLETE)
        waiting = sum(1 for t in trials if t.state == TrialState.WAITING)
        return Counts(finished, len(self._running(trials)), waiting)

    def _running(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Trials that may still finish."""
        patience = self._patience(trials)
        return [t for t in trials if t.state == TrialState.RUNNING and _age(t) < patience]

    def _patience(self, trials: list[FrozenTrial]) -> float:
        """Seconds after which a trial that cannot be heard of counts as dead."""
        finished = [t for t in trials if t.state == TrialState.COMPLETE]
        longest = max((t.duration.total_seconds() for t in finished[-20:] if t.duration is not None), default=math.inf)
        return max(2.0 * self.config.grace_seconds, 20.0 * longest)

    def fail_dead(self) -> None:
        """Queues the trials of dead workers again, also those that optuna keeps as running for ever.

        Optuna sees a worker's death by its heartbeat. One that died before its first heartbeat, or whose storage has
        none (a journal), is known by its age.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)
        trials = self.study.get_trials(deepcopy=False)
        silent, patience = self._never_heard_of(), self._patience(trials)
        for trial in trials:
            if trial.state != TrialState.RUNNING or (silent is not None and trial.number not in silent):
                continue
            if _age(trial) >= (patience if silent is None else self.config.grace_seconds):
                with contextlib.suppress(ValueError, UpdateFinishedTrialError):  # another worker was faster
                    self.study.tell(trial.number, state=TrialState.FAIL)
                    retry_callback()[0](self.study, trial)

    def _never_heard_of(self) -> set[int] | None:
        """Numbers of running trials without a heartbeat; None where the storage knows no heartbeats."""
        if not isinstance(self.storage, RDBStorage):
            return None
        with self.storage.engine.connect() as connection:
            return {number for (number,) in connection.execute(NEVER_HEARD_OF, {"study": self.study.study_name})}

    def run_one(self, task: Task, on_trial: Callable[[Setting, TrialResult], None]) -> None:
        """Asks for one trial, runs it and records it. Trials beyond the budget are given back unrun.

        A process that was stopped for longer than the grace period has lost its trial: another one repeats it.
        """
        lost = False

        def objective(trial: optuna.Trial) -> float:
            nonlocal lost
            trials = self.study.get_trials(deepcopy=False)
            busy = [*self._running(trials), *(t for t in trials if t.state == TrialState.COMPLETE)]
            if sum(1 for t in busy if t.number < trial.number) >= self.config.num_trials:
                raise SurplusTrial(f"trial {trial.number} is beyond the budget of {self.config.num_trials}")
            values = suggest(trial, self.config.ranges(self.setting))
            seed = self.config.training_seed + place_of(self.study, trial.number)
            result = train_trial(self.config, task, self.setting, values, seed)
            try:
                trial.set_user_attr(RESULT, {**result.to_dict(), "training_seed": seed})
            except UpdateFinishedTrialError as error:
                lost = True
                raise SurplusTrial(f"trial {trial.number} was given to another worker") from error
            on_trial(self.setting, result)
            worst = self.config.divergence_factor * result.initial_loss
            return min(result.final_loss, worst) if math.isfinite(result.final_loss) else worst

        # optimize, not ask and tell: it sends the heartbeat, and queues dead trials again.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            try:
                self.study.optimize(objective, n_trials=1, catch=(SurplusTrial,))
            except ValueError:  # optuna's, at telling the outcome of a trial that is closed
                if not lost:
                    raise


class SurplusTrial(Exception):
    """Another worker has taken this trial, or the last one of the budget."""


def suggest(trial: optuna.Trial, ranges: dict[str, SearchRange]) -> dict[str, float]:
    """The values of a trial."""
    chosen: dict[str, float] = {}
    for name, allowed in ranges.items():
        if allowed.choices is not None:
            chosen[name] = trial.suggest_categorical(name, allowed.choices)
        else:
            assert allowed.low is not None
            assert allowed.high is not None
            chosen[name] = trial.suggest_float(name, allowed.low, allowed.high, log=allowed.log)
    return chosen


def _age(trial: FrozenTrial) -> float:
    return (datetime.now() - trial.datetime_start).total_seconds() if trial.datetime_start else 0.0


def open_studies(config: SweepConfig) -> list[SettingStudy]:
    """The studies of all settings, created where they do not exist."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = open_storage(config)
    return [SettingStudy(config, setting, storage) for setting in config.settings()]


def work(
    config: SweepConfig,
    device: str,
    on_trial: Callable[[Setting, TrialResult], None] = lambda setting, result: None,
) -> None:
    """Runs trials until the budget of every setting is spent: always for the setting with the fewest trials.

    All settings advance together, so that a sweep that is looked at early shows the whole grid.
    """
    torch.set_num_threads(config.threads)
    studies = open_studies(config)
    if config.workers == 1:
        _await_dead(config, studies)
    task: Task | None = None
    while True:
        counts = [study.counts() for study in studies]
        lacking = [n for n, c in enumerate(counts) if c.finished + c.running < config.num_trials]
        if lacking:
            if task is None:
                task = Task(config.task, config.data_root, device)
            chosen = min(lacking, key=lambda n: (counts[n].finished + counts[n].running, n))
            studies[chosen].run_one(task, on_trial)
        elif any(c.finished < config.num_trials for c in counts):
            time.sleep(POLL_SECONDS)  # others are at the last trials; if they die, one of us takes over
            for study in studies:
                study.fail_dead()
        else:
            _await_dead(config, studies)  # no trial is left as running
            return


def _await_dead(config: SweepConfig, studies: list[SettingStudy]) -> None:
    """Waits until trials that an earlier run left behind count as dead.

    At the start of a lone worker: they are repeated first, and the search goes on exactly as it would have gone on.
    """
    deadline = time.monotonic() + config.grace_seconds + 2 * POLL_SECONDS
    while True:
        for study in studies:
            study.fail_dead()
        if not any(study.counts().running for study in studies) or time.monotonic() > deadline:
            return
        time.sleep(POLL_SECONDS)
