"""Runs a sweep with one process or several on this machine, and shows how far it is."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass

import torch

from benchmarks.common.command import WorkerError, exit_with_parent, plain_errors
from benchmarks.common.progress import Progress, progress
from benchmarks.damping.config import Setting, SweepConfig
from benchmarks.damping.study import SettingStudy, open_studies, work
from benchmarks.damping.trial import TrialResult

WATCH_SECONDS = 2.0


@dataclass(frozen=True)
class Progressed:
    """What one command contributed: its own trials (of all its workers) and their time."""

    trials: int
    seconds: float

    @property
    def trials_per_minute(self) -> float:
        """Of this command, all workers together."""
        return 60.0 * self.trials / self.seconds if self.seconds > 0 else 0.0


def run_sweep(config: SweepConfig) -> Progressed:
    """Runs what is missing of a sweep; returns at once when nothing is.

    Raises:
        WorkerError: when a worker ended with an error.
    """
    studies = open_studies(config)
    total = config.num_trials * len(studies)
    before = _finished(studies, config)
    start = time.monotonic()
    with progress(total, config.name, done=before) as display:
        if config.workers == 1:
            work(config, device_of(config, 0), lambda setting, result: _advance(display, setting, result))
        else:
            _run_processes(config, studies, display)
    return Progressed(_finished(studies, config) - before, time.monotonic() - start)


def device_of(config: SweepConfig, worker: int) -> str:
    """``cuda`` means one GPU per worker, in turn, where there are several."""
    if config.device != "cuda":
        return config.device
    return f"cuda:{worker % max(1, torch.cuda.device_count())}"


def _finished(studies: list[SettingStudy], config: SweepConfig) -> int:
    return sum(min(study.counts().finished, config.num_trials) for study in studies)


def _advance(display: Progress, setting: Setting, result: TrialResult) -> None:
    outcome = "diverged" if result.diverged else f"loss {result.final_loss:.4g}"
    display.advance(note=f"{setting.key}: {outcome}")


def _run_processes(config: SweepConfig, studies: list[SettingStudy], display: Progress) -> None:
    """Workers that share nothing but the storage. A worker that is killed is missed by nobody: its trial goes stale."""
    # Threads are pinned before torch is imported: a pool that has started cannot be made smaller.
    saved = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(config.threads)
    try:
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=_work_process, args=(config, device_of(config, number)), name=f"worker {number}")
            for number in range(config.workers)
        ]
        for worker in workers:
            worker.start()
    finally:
        if saved is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = saved
    try:
        while any(worker.is_alive() for worker in workers):
            time.sleep(WATCH_SECONDS)
            display.advance(_finished(studies, config) - display.done, note=f"{config.workers} workers")
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    for worker in workers:
        worker.join()
    failed = [worker.name for worker in workers if worker.exitcode not in (0, None)]
    if failed and _finished(studies, config) < config.num_trials * len(studies):
        raise WorkerError(
            f"{', '.join(failed)} ended with an error (see above). The finished trials are kept; the same command goes on "
            "with the rest."
        )


def _work_process(config: SweepConfig, device: str) -> None:
    """One worker: it ends with its parent, and says in one line what its user can mend."""
    exit_with_parent()
    with plain_errors(multiprocessing.current_process().name):
        work(config, device)
