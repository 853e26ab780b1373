"""Studies, their storage and the workers' loop: who runs which trial, and what happens to trials that died.

Each setting (an optimizer at one damping) is an optuna study; all studies of a sweep share one storage, which is
all that workers on one or on many machines have in common.
"""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event

from benchmarks.common.config import ConfigError
from benchmarks.common.search import SearchRange
from benchmarks.common.tasks import Task
from benchmarks.damping.config import Setting, SweepConfig
from benchmarks.damping.trial import TrialResult, train_trial

RESULT = "result"  # user attribute with everything a trial came to
MAX_RETRIES = 5
POLL_SECONDS = 0.5
OPEN_ATTEMPTS = 5


def open_storage(config: SweepConfig) -> BaseStorage:
    """The storage of a sweep: a database with optuna's heartbeat, or a journal file.

    Raises:
        ConfigError: if the database cannot be reached; the message has the address without the password.
    """
    place = str(config.storage) if config.storage is not None else str(config.folder / "trials.sqlite3")
    if place.endswith((".journal", ".log")):
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        Path(place).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(place))
    if "://" not in place:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        place = f"sqlite:///{Path(place).resolve()}"
    options: dict[str, Any] = {"heartbeat_interval": config.heartbeat_seconds, "grace_period": config.grace_seconds}
    retry, keyword = _retry_callback()
    options[keyword] = retry
    # Several processes write to one SQLite file: let them wait for each other instead of giving up.
    engine = {"connect_args": {"timeout": 120}} if place.startswith("sqlite") else {"pool_pre_ping": True}
    for attempt in range(1, OPEN_ATTEMPTS + 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return _without_waiting_for_the_disk(RDBStorage(place, engine_kwargs=engine, **options))
        except Exception as error:  # drivers raise their own kinds
            if attempt == OPEN_ATTEMPTS:
                raise ConfigError(
                    f"key 'storage': the database '{_without_password(place)}' cannot be used "
                    f"({type(error).__name__}: {str(error).splitlines()[0]}). Give a URL like "
                    "postgresql://user:password@host/database (its driver installed), or the path of a file."
                ) from error
            time.sleep(0.2 * attempt)  # two workers that start together both try to make the tables: one is told off
    raise AssertionError("the last attempt returns or raises")


def _without_waiting_for_the_disk(storage: RDBStorage) -> RDBStorage:
    """SQLite with a write-ahead log: a trial makes some fifteen commits, each of which else waits for the disk.

    What was committed survives the death of any process; a power failure may cost the last trials, never the file.
    """
    if storage.engine.dialect.name == "sqlite":

        def prepare(connection: Any, _: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")

        event.listen(storage.engine, "connect", prepare)
        storage.engine.dispose()  # connections that are open already were not prepared
    return storage


def _retry_callback() -> tuple[Callable[..., None], str]:
    """Optuna's callback that queues dead trials again, and the name of its argument (renamed in optuna 4.9)."""
    current = "heartbeat_stale_trial_callback"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if current in inspect.signature(RDBStorage).parameters:
            return optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES), current
        return optuna.storages.RetryFailedTrialCallback(max_retry=MAX_RETRIES), "failed_trial_callback"


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    credentials, at, place = rest.rpartition("@")
    return f"{scheme}://{credentials.split(':')[0]}{at}{place}"


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
        self.config, self.setting = config, setting
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
        """Trials that may still finish: a worker that died before its first heartbeat never counts as dead for optuna."""
        finished = [t for t in trials if t.state == TrialState.COMPLETE]
        longest = max((t.duration.total_seconds() for t in finished[-20:] if t.duration is not None), default=math.inf)
        patience = max(2.0 * self.config.grace_seconds, 20.0 * longest)
        return [t for t in trials if t.state == TrialState.RUNNING and _age(t) < patience]

    def run_one(self, task: Task, on_trial: Callable[[Setting, TrialResult], None]) -> None:
        """Asks for one trial, runs it and records it. Trials beyond the budget are given back unrun."""

        def objective(trial: optuna.Trial) -> float:
            trials = self.study.get_trials(deepcopy=False)
            busy = [*self._running(trials), *(t for t in trials if t.state == TrialState.COMPLETE)]
            if sum(1 for t in busy if t.number < trial.number) >= self.config.num_trials:
                raise SurplusTrial(f"trial {trial.number} is beyond the budget of {self.config.num_trials}")
            values = suggest(trial, self.config.ranges(self.setting))
            seed = self.config.training_seed + place_of(self.study, trial.number)
            result = train_trial(self.config, task, self.setting, values, seed)
            trial.set_user_attr(RESULT, {**result.to_dict(), "training_seed": seed})
            on_trial(self.setting, result)
            worst = self.config.divergence_factor * result.initial_loss
            return min(result.final_loss, worst) if math.isfinite(result.final_loss) else worst

        # optimize, not ask and tell: it sends the heartbeat, and queues dead trials again.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.optimize(objective, n_trials=1, catch=(SurplusTrial,))


class SurplusTrial(Exception):
    """Another worker has taken the last trial of the budget."""


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
                _fail_stale(study.study)
        else:
            return


def _await_dead(config: SweepConfig, studies: list[SettingStudy]) -> None:
    """Waits until trials that an earlier run left behind count as dead, so that they are repeated first.

    With one worker the search then goes on exactly as it would have gone on.
    """
    if not any(c.running for c in (study.counts() for study in studies)):
        return
    deadline = time.monotonic() + config.grace_seconds + 2 * POLL_SECONDS
    while time.monotonic() < deadline:
        for study in studies:
            _fail_stale(study.study)
        if not any(study.counts().running for study in studies):
            return
        time.sleep(POLL_SECONDS)


def _fail_stale(study: optuna.Study) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
