"""Runs a sweep with one process or several: each setting is a search of its own, all share one storage."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable

import optuna
import torch

from benchmarks.common.command import WorkerError, exit_with_parent, plain_errors
from benchmarks.common.report import progress
from benchmarks.common.search import NumberedSampler, Search, place_of, suggest, work
from benchmarks.common.storage import open_database
from benchmarks.common.tasks import Task
from benchmarks.damping.config import Setting, SweepConfig
from benchmarks.damping.trial import train_trial

RESULT = "result"  # user attribute with everything a trial came to
WATCH_SECONDS = 2.0


def open_searches(config: SweepConfig) -> dict[Setting, Search]:
    """The searches of all settings, created where they do not exist."""
    place = str(config.storage) if config.storage is not None else str(config.folder / "trials.sqlite3")
    storage = open_database(place, config.heartbeat_seconds, config.grace_seconds)
    found = {}
    for setting in config.settings():
        sampler = NumberedSampler(config.seed, n_startup_trials=config.num_startup, constant_liar=config.workers > 1)
        found[setting] = Search(config.study_name(setting), storage, sampler, config.num_trials, config.grace_seconds)
    return found


def run_sweep(config: SweepConfig) -> int:
    """Runs what is missing of a sweep and returns how many trials that were; returns at once when nothing is missing.

    Raises:
        WorkerError: when a worker ended with an error.
    """
    searches = open_searches(config)
    before = _finished(searches)
    with progress(config.num_trials * len(searches), config.name, before) as display:
        if config.workers == 1:
            work_on(config, device_of(config, 0), display.update)
        else:
            _run_processes(config, searches, display.update)
    return _finished(searches) - before


def device_of(config: SweepConfig, worker: int) -> str:
    """``cuda`` means one GPU per worker, in turn, where there are several."""
    return f"cuda:{worker % max(1, torch.cuda.device_count())}" if config.device == "cuda" else config.device


def _finished(searches: dict[Setting, Search]) -> int:
    return sum(len(search.finished()) for search in searches.values())


def work_on(config: SweepConfig, device: str, on_trial: Callable[[], object] = lambda: None) -> None:
    """Runs trials until the budget of every setting is spent."""
    torch.set_num_threads(config.threads)
    searches = open_searches(config)
    settings = list(searches)
    task: list[Task] = []  # made for the first trial: a finished sweep needs no data

    def run_one(number: int) -> None:
        if not task:
            task.append(Task(config.task, config.data_root, device))
        setting = settings[number]
        if searches[setting].run_one(lambda trial: _objective(config, task[0], setting, trial)):
            on_trial()

    work(list(searches.values()), run_one, alone=config.workers == 1)


def _objective(config: SweepConfig, task: Task, setting: Setting, trial: optuna.Trial) -> float:
    values = suggest(trial, config.ranges(setting))
    seed = config.training_seed + place_of(trial.study, trial.number)
    result = train_trial(config, task, setting, values, seed)
    trial.set_user_attr(RESULT, {**result.to_dict(), "training_seed": seed})
    worst = config.divergence_factor * result.initial_loss
    return min(result.final_loss, worst) if math.isfinite(result.final_loss) else worst


def _run_processes(config: SweepConfig, searches: dict[Setting, Search], on_trial: Callable[[int], object]) -> None:
    """Workers that share nothing but the storage. A worker that is killed is missed by nobody: its trial goes stale."""
    # Threads are pinned before torch is imported: a pool that has started cannot be made smaller.
    saved = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(config.threads)
    context, workers = multiprocessing.get_context("spawn"), []
    try:
        for number in range(config.workers):
            arguments = (config, device_of(config, number))
            workers.append(context.Process(target=_work_process, args=arguments, name=f"worker {number}"))
            workers[-1].start()
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        os.environ.update({} if saved is None else {"OMP_NUM_THREADS": saved})
    try:
        done = _finished(searches)
        while any(worker.is_alive() for worker in workers):
            time.sleep(WATCH_SECONDS)
            on_trial((now := _finished(searches)) - done)
            done = now
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    failed = [worker.name for worker in workers if worker.exitcode not in (0, None)]
    if failed and _finished(searches) < config.num_trials * len(searches):
        raise WorkerError(
            f"{', '.join(failed)} ended with an error (see above). The finished trials are kept; the same command goes on "
            "with the rest."
        )


def _work_process(config: SweepConfig, device: str) -> None:
    """One worker: it ends with its parent, and says in one line what its user can mend."""
    exit_with_parent()
    with plain_errors(multiprocessing.current_process().name):
        work_on(config, device)
