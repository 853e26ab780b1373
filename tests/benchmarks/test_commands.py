"""What the user of a command can mend is said in one line that names it."""

from __future__ import annotations

import errno
import re
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import damping_sweep, demo
from benchmarks.common.command import WorkerError, plain_errors, run_command
from benchmarks.common.config import ConfigError, check_device, load_config
from benchmarks.common.models import check_model
from benchmarks.common.optimizers import build_optimizer
from benchmarks.common.tasks import TaskConfig
from benchmarks.damping_rules import RulesConfig
from benchmarks.demo import DemoConfig

ROOT = Path(__file__).resolve().parents[2]
SWEEP = ("--config", str(ROOT / "configs/damping_sweep/demo.yaml"), "--num_trials", "1", "--num_kept", "1", "--num_spectra", "0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), r"key 'device' must be a device that torch finds on this machine \(cpu.*got 'tpu'"),
        (("--out", __file__ + "/below"), "key 'out': '.*below' cannot be written .*Give another folder with --out"),
        (("--name", "../x"), "key 'name' must be letters.*got '../x'"),
        (("--task.model.width", "0"), "key 'model.width' must be whole numbers >= 1, got 0"),
        (("--dampings", "[.inf]"), "key 'dampings' must hold finite numbers > 0, got inf"),
    ],
)
def test_a_wrong_value_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
):
    with pytest.raises(SystemExit) as ended:
        damping_sweep.main([*SWEEP, "--out", str(tmp_path), *arguments])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line), line


def test_a_section_of_the_demo_that_is_none_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        demo.main(["--only", "[Cooking]", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert re.search(r"only: unknown sections \['Cooking'\]; allowed: .*'Optimizers compared'", capsys.readouterr().err)


@pytest.mark.multiprocess
def test_a_full_disk_ends_in_one_line_and_what_was_finished_is_kept(tmp_path: Path):
    """A limit on the size of files stands for the full disk."""

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400 * 1024, 400 * 1024))

    command = [sys.executable, "-m", "benchmarks.damping_sweep", *SWEEP, "--out", str(tmp_path)]
    command += ["--num_trials", "40", "--task.steps", "20"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=fill)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    line = ended.stderr.strip().splitlines()[-1]
    assert line.startswith("damping_sweep: the trials could not be stored: ")
    assert line.endswith("then the same command goes on.")
    database = sqlite3.connect(tmp_path / "demo" / "trials.sqlite3")
    assert database.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0] >= 1
    database.close()


def test_errors_of_the_file_system_are_named_with_their_file(monkeypatch: pytest.MonkeyPatch):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out/x.json")

    monkeypatch.setattr(sys, "argv", ["/somewhere/variants.py"])
    with pytest.raises(SystemExit, match=r"^variants: 'out/x.json': No space left on device\. What was finished is kept"):
        run_command(full)


@pytest.mark.parametrize("error", [ConfigError("bad key"), WorkerError("worker 0 ended")])
def test_errors_for_the_user_have_no_traceback(error: Exception):
    with pytest.raises(SystemExit, match=f"^sweep: {error}$"), plain_errors("sweep"):
        raise error


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), plain_errors("sweep"):
        _ = 1 / 0


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99", ""])
def test_devices_that_hold_no_numbers_here_are_refused(device: str):
    with pytest.raises(ConfigError, match="key 'device' must be a device that torch finds"):
        check_device(device)
    check_device("cpu")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "mlp", "sizes": [64, 0, 10]}, r"key 'model.sizes' must be whole numbers >= 1, got \[64, 0, 10\]"),
        ({"name": "small_cnn", "width": 2.5}, "key 'model.width' must be whole numbers >= 1, got 2.5"),
        ({"name": "mlp", "activation": "swish"}, "key 'model.activation' must be one of relu, tanh, .*, got 'swish'"),
        ({"name": "perceptron"}, "key 'model.name' must be one of mlp, .*, got 'perceptron'"),
        ({"name": "mlp", "widths": [3]}, "unknown key 'model.widths'"),
    ],
)
def test_models_that_cannot_be_built_are_refused_with_the_config(model: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(TaskConfig, None, [("data", {"name": "digits"}), ("model", model)])
    check_model({"name": "gpt", "fused_qkv": False})


def test_settings_that_an_optimizer_refuses_are_named_with_it():
    with pytest.raises(ConfigError, match=r"optimizer 'kfac' refuses its settings \{'damping': inf\}: .*damping must be"):
        build_optimizer("kfac", torch.nn.Linear(2, 2), {"damping": float("inf")})


def test_infinite_scales_and_dampings_are_refused():
    with pytest.raises(ConfigError, match="scale must be a finite number > 0, got inf"):
        load_config(DemoConfig, None, [("scale", float("inf"))])
    task = {"data": {"name": "digits"}, "model": {"name": "mlp"}}
    with pytest.raises(ConfigError, match="'dampings' and 'starts' must hold finite numbers > 0"):
        load_config(RulesConfig, None, [("name", "x"), ("task", task), ("starts", [float("inf")])])
