"""The damping sweep: trials are results whatever happens, and no finished one is lost or run twice."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import optuna
import psutil
import pytest
import torch
from optuna.trial import TrialState

from benchmarks import damping_sweep
from benchmarks.common import search as search_module
from benchmarks.common import storage
from benchmarks.common.command import WorkerError
from benchmarks.common.config import ConfigError, load_config
from benchmarks.common.search import OptimizerConfig, SearchRange, place_of
from benchmarks.common.storage import retry_callback
from benchmarks.common.tasks import Task
from benchmarks.damping import sweep as sweep_module
from benchmarks.damping.config import HistogramConfig, Setting, SweepConfig
from benchmarks.damping.report import COLUMNS, keep_best, load_trials, make_report, summarize
from benchmarks.damping.spectra import factored_extremes
from benchmarks.damping.sweep import RESULT, open_searches, run_sweep, work_on
from benchmarks.damping.trial import squared_gradient_histogram, train_trial

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "name": "tiny",
    "task": {
        "data": {"name": "digits", "num_train": 128, "num_test": 64, "flatten": True},
        "model": {"name": "deep_linear", "in_dim": 64, "out_dim": 10, "width": 8, "num_layers": 2},
        "steps": 12,
        "batch_size": 32,
        "eval_interval": 6,
    },
    "dampings": [1e-2, 1.0],
    "optimizers": {"sgd": {}, "kfac": {"fixed": {"damping_scale": "absolute", "inverse_interval": 10}}},
    "search": {
        "lr": {"low": 1e-3, "high": 1.0, "log": True},
        "lr_decay": {"low": 0.0, "high": 1.0},
        "momentum": {"low": 0.0, "high": 0.9},
    },
    "num_trials": 4,
    "num_kept": 2,
    "num_startup": 2,
    "num_spectra": 1,
    "read_interval": 3,
    "histogram": {"interval": 6, "dampings": [1e-2, 1.0]},
    "heartbeat_seconds": 1,
    "grace_seconds": 2,
}


def tiny(tmp_path: Path, **changes) -> SweepConfig:
    return load_config(SweepConfig, None, [*TINY.items(), ("out", tmp_path), *changes.items()])


def trials_of(config: SweepConfig) -> dict[str, list[optuna.trial.FrozenTrial]]:
    return {setting.key: search.trials() for setting, search in open_searches(config).items()}


def outcome(config: SweepConfig) -> dict[str, list[tuple]]:
    """Values, parameters and training seeds of the finished trials, in the order of the search."""
    return {
        setting.key: sorted(
            (place_of(search.study, t.number), t.value, sorted(t.params.items()), t.user_attrs[RESULT]["training_seed"])
            for t in search.finished()
        )
        for setting, search in open_searches(config).items()
    }


# -- the whole sweep --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepConfig, Path]:
    folder = tmp_path_factory.mktemp("sweep")
    path = folder / "tiny.json"  # JSON is YAML
    path.write_text(json.dumps(TINY))
    damping_sweep.main(["--config", str(path), "--out", str(folder), "--keep", str(folder / "kept")])
    return tiny(folder), folder / "tiny" / "index.html"


def test_a_sweep_writes_page_pictures_table_summary_and_tensorboard(finished):
    config, page = finished
    folder = config.folder
    for stem in ("learning_curves", "final_loss", "best_values", "gradients", "eigenvalues"):
        assert (folder / f"{stem}.png").read_bytes().startswith(b"\x89PNG"), stem
    assert page.read_text().count("<img") == 5
    assert {path.name for path in (folder / "tensorboard").iterdir()} == {"sgd", "kfac-1e-02", "kfac-1e+00"}
    with (folder / "trials.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 3 * 4
    assert tuple(table[0]) == COLUMNS
    summary = json.loads((folder.parent / "kept" / "tiny.json").read_text())
    assert summary["config"]["num_trials"] == 4
    assert "torch" in summary["versions"]
    assert str(folder) not in json.dumps(summary), "paths of the machine were stored with the results"


def test_a_finished_sweep_runs_nothing_again(finished):
    config, _ = finished
    before = {key: [t.number for t in trials] for key, trials in trials_of(config).items()}
    assert run_sweep(config) == 0
    assert {key: [t.number for t in trials] for key, trials in trials_of(config).items()} == before
    assert all(len(numbers) == 4 for numbers in before.values())


def test_the_summary_averages_the_kept_trials(finished):
    config, _ = finished
    trials = load_trials(config)
    for summary in summarize(config, trials):
        mine = trials[trials["setting"] == summary["setting"]["key"]]
        kept = keep_best(config, mine)
        assert summary["num_kept"] == len(kept) == 2
        assert summary["final_losses"] == sorted(mine["final_loss"][~mine["diverged"]])[:2]
        assert summary["curve"][0] == pytest.approx(sum(curve[0] for curve in kept["curve"]) / 2)
        counts = summary["histograms"]["6"]["1"]
        assert sum(counts) == 2 * (64 * 8 + 8)  # entries of the first layer in two trials


def test_the_table_is_that_of_the_trials(finished):
    config, page = finished
    losses = {s["label"]: f"{s['mean_final_loss']:.4f}" for s in summarize(config, load_trials(config))}
    text = page.read_text()
    assert all(f"<td>{label}</td>" in text and f"<td>{loss} ±" in text for label, loss in losses.items())


def test_a_larger_budget_goes_on_where_the_smaller_one_ended(finished, tmp_path: Path):
    config, _ = finished
    shutil.copytree(config.folder, tmp_path / "tiny")
    before = outcome(config)
    larger = dataclasses.replace(config, out=tmp_path, num_trials=5)
    assert run_sweep(larger) == 3
    assert {key: trials[:4] for key, trials in outcome(larger).items()} == before


def test_the_same_seed_gives_the_same_trials_and_another_seed_others(finished, tmp_path: Path):
    config, _ = finished
    again = dataclasses.replace(config, out=tmp_path / "again")
    run_sweep(again)
    assert outcome(again) == outcome(config)
    other = dataclasses.replace(config, out=tmp_path / "other", seed=7)
    run_sweep(other)
    assert outcome(other) != outcome(config)


def test_trial_k_has_the_same_weights_and_random_values_at_every_damping(finished):
    trials = outcome(finished[0])
    startup = [[(params, seed) for _, _, params, seed in group[:2]] for group in trials.values()]
    assert startup[0] == startup[1] == startup[2]


# -- a trial ----------------------------------------------------------------------------------------------------


def test_a_trial_that_diverges_is_a_result_with_its_step(tmp_path: Path):
    config = tiny(tmp_path)
    values = {"lr": 1e6, "lr_decay": 0.0, "momentum": 0.0}
    result = train_trial(config, Task(config.task), Setting("sgd"), values, 0)
    assert result.diverged
    assert result.diverged_step is not None
    assert result.diverged_step <= config.task.steps
    assert result.final_loss == math.inf
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["final_loss"] is None


def test_diverged_trials_are_counted_and_kept_out_of_the_mean(tmp_path: Path):
    config = tiny(tmp_path, search={**TINY["search"], "lr": {"low": 1e5, "high": 1e6}}, dampings=[1.0], num_spectra=0)
    config = dataclasses.replace(config, optimizers={"sgd": OptimizerConfig()})
    run_sweep(config)
    (summary,) = summarize(config, load_trials(config))
    assert summary["num_finished"] == summary["num_diverged"] == 4
    assert summary["num_kept"] == 0
    assert summary["curve"] == []
    assert math.isnan(summary["mean_final_loss"])
    (row,) = make_report(config).tables[0].frame.to_dict("records")
    assert (row["diverged"], row["best"]) == ("4 (100%)", "—")


@pytest.mark.parametrize("dampings", [[1.0], [1e-2, 1.0, 1e2]])
def test_a_sweep_of_one_trial_that_diverges_has_a_page(tmp_path: Path, dampings: list[float]):
    fixed = {"damping_scale": "absolute", "kl_clip": None, "max_relative_update": None}
    content = {**TINY, "num_trials": 1, "num_kept": 1, "dampings": dampings, "task": {**TINY["task"], "steps": 4}}
    content["search"] = {**TINY["search"], "lr": {"low": 1e5, "high": 1e6}}
    path = tmp_path / "one.json"
    path.write_text(json.dumps({**content, "optimizers": {"sgd": {}, "kfac": {"fixed": fixed}}}))
    damping_sweep.main(["--config", str(path), "--out", str(tmp_path)])
    assert (tmp_path / "tiny" / "index.html").read_text().count("1 (100%)") == 1 + len(dampings)


def test_a_bug_in_training_is_no_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_):
        raise RuntimeError("a bug")

    config = tiny(tmp_path)
    monkeypatch.setattr(torch.optim.SGD, "step", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train_trial(config, Task(config.task), Setting("sgd"), {"lr": 0.1, "lr_decay": 0.0, "momentum": 0.0}, 0)


def test_the_learning_rate_decays_linearly_by_the_share_that_was_searched(tmp_path: Path, monkeypatch):
    config, rates = tiny(tmp_path), []
    original = torch.optim.SGD.step

    def spy(self, closure=None):
        rates.append(self.param_groups[0]["lr"])
        return original(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    train_trial(config, Task(config.task), Setting("sgd"), {"lr": 0.4, "lr_decay": 0.5, "momentum": 0.0}, 0)
    assert rates == pytest.approx([0.4 * (1 - 0.5 * step / 12) for step in range(12)])


def test_the_histogram_of_squared_gradients_has_fixed_bins_and_a_bin_of_exact_zeros():
    config = HistogramConfig(low=-4.0, high=2.0, width=1.0)
    # squares 1e-60 (below), 1e-3.5, 1e-0.5 twice, 1e4 (above): bins 0, 0, 3, 3, 5
    gradients = [torch.tensor([0.0, 1e-30, 10**-1.75]), torch.tensor([[10**-0.25, -(10**-0.25)], [1e2, 0.0]])]
    assert squared_gradient_histogram(gradients, config) == [0, 2, 2, 0, 0, 2, 0, 1]
    assert squared_gradient_histogram([torch.zeros(3)], config) == [0, 3]


def test_extreme_eigenvalues_are_those_of_the_dense_damped_block():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    g = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    inputs, outputs, damping = a @ a.T, g @ g.T, 0.3
    pi = ((inputs.trace() / 4) / (outputs.trace() / 3)).sqrt()
    left = inputs + pi * damping**0.5 * torch.eye(4, dtype=torch.float64)
    right = outputs + damping**0.5 / pi * torch.eye(3, dtype=torch.float64)
    values = torch.linalg.eigvalsh(torch.kron(left, right))
    found = factored_extremes(inputs, outputs, damping)
    assert found.smallest == pytest.approx(float(values[0]), rel=1e-10)
    assert found.condition == pytest.approx(float(values[-1] / values[0]), rel=1e-10)
    assert found.undamped_smallest == pytest.approx(0.0, abs=1e-12)  # the input factor has rank 3 of 4


# -- killed and resumed -----------------------------------------------------------------------------------------

SLOW = ("--task.steps", "400", "--num_trials", "4", "--num_kept", "2", "--dampings", "[1.0]", "--num_spectra", "0")


def command(folder: Path, *more: str) -> list[str]:
    path = folder / "tiny.json"
    path.write_text(json.dumps(TINY))
    return [sys.executable, "-m", "benchmarks.damping_sweep", "--config", str(path), "--out", str(folder), *SLOW, *more]


def slow(folder: Path, **changes) -> SweepConfig:
    config = tiny(folder, num_trials=4, num_kept=2, dampings=[1.0], num_spectra=0, **changes)
    return dataclasses.replace(config, task=dataclasses.replace(config.task, steps=400))


def start(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)


def test_a_trial_whose_worker_died_before_its_first_heartbeat_takes_no_place_in_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny(tmp_path, dampings=[1.0], num_spectra=0)
    abandoned = [search.study.ask().number for search in open_searches(config).values()]  # running for ever, unheard of
    monkeypatch.setattr(search_module, "_age", lambda trial: math.inf if trial.number in abandoned else 0.0)
    monkeypatch.setattr(search_module, "_await_dead", lambda *_: None)
    asked = []
    run_one = search_module.Search.run_one

    def counted(self, *arguments):
        asked.append(1)
        assert len(asked) <= 2 * config.num_trials, "trials beyond the budget are asked for again and again"
        return run_one(self, *arguments)

    monkeypatch.setattr(search_module.Search, "run_one", counted)
    run_sweep(config)
    assert all(len(search.finished()) == config.num_trials for search in open_searches(config).values())


@pytest.mark.parametrize("storage", [None, "sweep.journal"], ids=["database", "journal"])
def test_no_trial_of_a_dead_worker_is_left_as_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str | None):
    """Not even one beyond the budget, of a worker that died before its first heartbeat."""
    config = tiny(tmp_path, dampings=[1.0], num_spectra=0, storage=storage and str(tmp_path / storage))
    run_sweep(config)
    abandoned = {setting.key: search.study.ask().number for setting, search in open_searches(config).items()}
    monkeypatch.setattr(search_module, "_age", lambda trial: math.inf)
    assert run_sweep(config) == 0
    for key, trials in trials_of(config).items():
        assert trials[abandoned[key]].state == TrialState.FAIL
        assert [t.state for t in trials].count(TrialState.RUNNING) == 0
        assert [t.system_attrs.get("failed_trial") for t in trials if t.state == TrialState.WAITING] == [abandoned[key]]


def test_a_worker_that_was_stopped_too_long_loses_its_trial_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tiny(tmp_path, dampings=[1.0], num_spectra=0, optimizers={"sgd": {}})
    real, calls = sweep_module.train_trial, []

    def stopped_once(*arguments):
        calls.append(1)
        if len(calls) == 2:  # meanwhile another worker has declared this trial dead and queued it again
            (search,) = open_searches(config).values()
            (running,) = search.trials(TrialState.RUNNING)
            search.study.tell(running.number, state=TrialState.FAIL)
            retry_callback()[0](search.study, running)
        return real(*arguments)

    monkeypatch.setattr(sweep_module, "train_trial", stopped_once)
    assert run_sweep(config) == 4
    assert len(calls) == 5
    monkeypatch.undo()
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    run_sweep(whole)
    assert outcome(config) == outcome(whole)


def freeze_in_a_trial(config: SweepConfig, number: int, process: subprocess.Popen) -> None:
    """Stops the process when ``number`` trials have finished and another one is running."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        os.killpg(process.pid, signal.SIGSTOP)
        states = peek(config.folder / "trials.sqlite3")
        if states.count("COMPLETE") >= number and "RUNNING" in states:  # and it has been heard of once
            return
        os.killpg(process.pid, signal.SIGCONT)
        time.sleep(0.2)
    raise AssertionError("the sweep did not get to the middle")


HEARD_OF = "select state from trials where state != 'RUNNING' or trial_id in (select trial_id from trial_heartbeats)"


def peek(database: Path) -> list[str]:
    """States of all trials; empty when the file is not there yet or a stopped process is just writing to it."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=0.1)) as connection:
            return [state for (state,) in connection.execute(HEARD_OF)]
    except sqlite3.OperationalError:
        return []


@pytest.mark.multiprocess
def test_a_sweep_killed_in_the_middle_resumes_without_losing_or_repeating_a_trial(tmp_path: Path):
    config = slow(tmp_path)
    process = start(command(tmp_path))
    freeze_in_a_trial(config, 3, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = outcome(config)
    assert 3 <= sum(map(len, before.values())) < 8
    assert subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, check=False).returncode == 0
    after = outcome(config)
    assert all(len(trials) == 4 for trials in after.values())
    assert all(trial in after[key] for key, trials in before.items() for trial in trials), "a finished trial was lost"
    dead = [t for group in trials_of(config).values() for t in group if t.state == TrialState.FAIL]
    assert dead, "the trial that was killed is not marked as failed"
    # With one worker the killed sweep goes on as it would have gone on.
    whole = slow(tmp_path / "whole")
    run_sweep(whole)
    assert outcome(whole) == after


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_workers_share_a_study_and_survive_the_death_of_one(tmp_path: Path):
    config = slow(tmp_path)
    first, second = start(command(tmp_path)), None
    try:
        second = start(command(tmp_path))
        freeze_in_a_trial(config, 2, first)
        os.killpg(first.pid, signal.SIGKILL)
        assert second.wait(timeout=240) == 0
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    for key, trials in trials_of(config).items():
        complete = [t for t in trials if t.state == TrialState.COMPLETE]
        assert len(complete) == 4, key
        drawn = [tuple(sorted(t.params.items())) for t in complete]
        assert len(set(drawn)) == 4, "two workers ran the same trial"


@pytest.mark.multiprocess
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_workers_end_when_their_parent_alone_is_killed(tmp_path: Path):
    parent = start(command(tmp_path, "--workers", "2", "--task.steps", "100000"))
    workers: list[psutil.Process] = []
    try:
        freeze_in_a_trial(slow(tmp_path), 0, parent)
        os.killpg(parent.pid, signal.SIGCONT)
        workers = [p for p in psutil.Process(parent.pid).children() if "spawn_main" in " ".join(p.cmdline())]
        assert len(workers) == 2
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive
    finally:
        for process in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_an_error_of_a_worker_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweep_module, "exit_with_parent", lambda: None)
    config = tiny(tmp_path)
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, batch_size=5000))
    with pytest.raises(SystemExit, match=r"MainProcess: key 'task.batch_size' must be at most .* examples 128, got 5000\."):
        sweep_module._work_process(config, "cpu")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_sweep_whose_workers_all_ended_with_an_error_says_so(tmp_path: Path):
    config = tiny(tmp_path, workers=2)
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, batch_size=5000))
    with pytest.raises(WorkerError, match=r"worker 0, worker 1 ended with an error \(see above\)\. The finished trials are kept"):
        run_sweep(config)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_several_workers_of_one_command_spend_the_budget_exactly(tmp_path: Path):
    config = tiny(tmp_path, workers=2)
    assert run_sweep(config) == 12
    assert all(len(trials) == 4 for trials in outcome(config).values())


def test_a_journal_file_works_as_storage(tmp_path: Path):
    config = tiny(tmp_path, storage=str(tmp_path / "sweep.journal"), dampings=[1.0])
    run_sweep(config)
    assert (tmp_path / "sweep.journal").stat().st_size > 0
    assert all(len(trials) == 4 for trials in outcome(config).values())


# -- PostgreSQL -------------------------------------------------------------------------------------------------


@pytest.fixture
def postgres_url(tmp_path: Path):
    """A PostgreSQL server of its own; its programs may lie outside PATH."""
    candidates = [shutil.which("initdb"), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    found = next((path for path in candidates if path), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed (no initdb)")
    programs, folder = Path(found).resolve().parent, tmp_path / "postgres"
    user: dict = {}
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # the server refuses to run as root
        import pwd

        owner = pwd.getpwnam("postgres") if "postgres" in {entry.pw_name for entry in pwd.getpwall()} else None
        if owner is None:
            pytest.skip("PostgreSQL does not run as root and there is no user 'postgres'")
        user = {"user": owner.pw_uid, "group": owner.pw_gid}
        folder = Path("/tmp") / f"kfac-opt-postgres-{os.getpid()}"
        folder.mkdir()
        os.chown(folder, owner.pw_uid, owner.pw_gid)
    else:
        folder.mkdir()
    data, port = folder / "data", 20000 + os.getpid() % 20000
    run = {"cwd": folder, "check": True, "capture_output": True, **user}
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    subprocess.run([programs / "initdb", "-D", data, "-A", "trust", "-U", "tester"], **run)
    control = [programs / "pg_ctl", "-D", data, "-w"]
    subprocess.run([*control, "-l", folder / "log", "-o", options, "start"], **{**run, "capture_output": False})
    try:
        yield f"postgresql://tester:secret@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **run)
        if user:
            shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_sweep_runs_in_postgresql_and_goes_on_after_a_worker_was_killed(tmp_path: Path, postgres_url: str):
    config = slow(tmp_path, storage=postgres_url)
    open_searches(config)
    context = multiprocessing.get_context("spawn")
    worker = context.Process(target=work_on, args=(config, "cpu"))
    worker.start()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and sum(map(len, outcome(config).values())) < 2:
        time.sleep(0.1)
    worker.kill()
    worker.join()
    before = outcome(config)
    assert 2 <= sum(map(len, before.values())) < 8
    run_sweep(config)
    after = outcome(config)
    assert all(len(trials) == 4 for trials in after.values())
    assert all(trial in after[key] for key, trials in before.items() for trial in trials)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:secret@127.0.0.1:1/none",
        "postgresql://127.0.0.1:1/none?user=me&password=secret",
        "postgresql://127.0.0.1:1/none?password=secret&secret=1",  # the driver repeats a parameter that it does not know
        "nosuchdriver://me:secret@127.0.0.1:1/none",
    ],
)
def test_a_database_that_cannot_be_reached_is_named_without_its_password(tmp_path: Path, monkeypatch, url: str):
    monkeypatch.setattr(storage, "OPEN_ATTEMPTS", 1)
    with pytest.raises(ConfigError, match=r"key 'storage': the database '.*127.0.0.1:1/none' cannot be used") as caught:
        open_searches(tiny(tmp_path, storage=url))
    shown = "".join(traceback.format_exception(caught.value))
    assert "secret" not in shown.replace("secret=1", "")


def test_a_url_that_cannot_be_read_is_not_repeated(tmp_path: Path):
    url = "postgresql://me:secret@host:port/none"
    with pytest.raises(ConfigError, match=r"the URL 'postgresql://…' cannot be read.*%40") as caught:
        open_searches(tiny(tmp_path, storage=url))
    assert "secret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("installed", "driver"), [(("psycopg", "psycopg2"), "psycopg"), (("psycopg2",), "psycopg2"), ((), "psycopg")]
)
def test_a_postgresql_url_takes_the_driver_that_is_installed(monkeypatch, installed: tuple[str, ...], driver: str):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert storage.database_url("postgresql://me@host/trials").drivername == f"postgresql+{driver}"
    assert storage.database_url("postgresql+pg8000://me@host/trials").drivername == "postgresql+pg8000"


# -- configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "damping_sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid_and_holds_the_search_the_study_asks_for(path: Path):
    config = load_config(SweepConfig, path)
    assert set(config.search) == {"lr", "lr_decay", "momentum"}
    if path.stem in ("digits", "mnist"):
        assert config.settings()[0] == Setting("sgd")
        assert (config.num_trials, config.num_kept) == (300, 100)
        assert sorted(config.dampings) == pytest.approx([10.0**power for power in range(-5, 3)])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_trails", 3, "key 'num_trails': Key 'num_trails' not in 'SweepConfig'.*Allowed: .*num_trials"),
        ("dampings", [0.0], "key 'dampings' must hold finite numbers > 0, got 0"),
        ("dampings", [math.inf], "key 'dampings' must hold finite numbers > 0, got inf"),
        ("dampings", [1.0, 1.0], "different numbers"),
        ("num_kept", 5, r"num_kept must be at most num_trials \(4\), got 5"),
        ("num_trials", 0, "num_trials must be >= 1, got 0"),
        ("grace_seconds", 1, "grace_seconds must be above heartbeat_seconds, and that at least 1, got 1 and 1"),
        ("divergence_factor", 1.0, "divergence_factor must be a finite number > 1, got 1.0"),
        ("optimizers", {"sgd": {}, "kfak": {}}, "unknown optimizer 'kfak'; allowed: .*kfac"),
        ("optimizers", {}, "key 'optimizers' must name at least one"),
        ("without_damping", [], "key 'without_damping' must name 'sgd', which has no damping"),
        ("without_damping", ["sgd", "adam"], "key 'without_damping' names 'adam'"),
        ("search", {"lr": {"low": 0.1, "high": 1.0}}, "key 'search.lr_decay' is missing"),
        ("search", {**TINY["search"], "beta": {"low": 0.1, "high": 1.0}}, "unknown key 'search.beta'"),
        ("histogram", {"interval": 0}, "histogram: interval must be >= 1, got 0"),
        ("name", "../elsewhere", r"key 'name' must be letters.*it names a folder below 'out', got '\.\./elsewhere'"),
        ("name", "/tmp/elsewhere", "key 'name' must be letters.*got '/tmp/elsewhere'"),
        ("name", "..", r"key 'name' must be letters.*got '\.\.'"),
        ("name", "", "key 'name' must be letters.*got ''"),
        ("task", {**TINY["task"], "model": {"name": "deep_linear", "width": 0}}, "key 'model.width' must be .* >= 1, got 0"),
        ("search", {**TINY["search"], "lr": {"low": 0.1, "high": math.inf}}, "a search range needs finite low < high"),
        ("histogram", {"low": 3.0, "high": 2.0}, "need low < high"),
    ],
)
def test_a_bad_config_names_the_key_and_what_is_allowed(tmp_path: Path, key: str, value, message: str):
    with pytest.raises(ConfigError, match=message):
        tiny(tmp_path, **{key: value})


def test_another_range_is_another_study_and_a_larger_budget_is_not(tmp_path: Path):
    config, setting = tiny(tmp_path), Setting("kfac", 1.0)
    wider = dataclasses.replace(config, search={**config.search, "lr": SearchRange(1e-4, 1.0, log=True)})
    assert wider.study_name(setting) != config.study_name(setting)
    assert dataclasses.replace(config, num_trials=100).study_name(setting) == config.study_name(setting)
    assert dataclasses.replace(config, workers=3).study_name(setting) == config.study_name(setting)


def test_variants_of_one_optimizer_stand_side_by_side(tmp_path: Path):
    variants = {"kfac": {}, "relative": {"kind": "kfac", "fixed": {"damping_scale": "relative"}}}
    config = tiny(tmp_path, optimizers=variants, without_damping=[])
    keys = [setting.key for setting in config.settings()]
    assert keys == ["kfac-1e-02", "kfac-1e+00", "relative-1e-02", "relative-1e+00"]
    assert len({config.study_name(setting) for setting in config.settings()}) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = train_trial(config, Task(config.task), config.settings()[2], {"lr": 0.1, "lr_decay": 0.0, "momentum": 0.5}, 0)
    assert not result.diverged
