"""The comparison of adaptive with fixed damping: every run is there, is measured, and is not repeated."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import damping_rules
from benchmarks.common.config import ConfigError, load_config
from benchmarks.damping_rules import RulesConfig, lines, run_lines

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "name": "tiny",
    "task": {
        "data": {"name": "digits", "num_train": 128, "num_test": 64, "flatten": True},
        "model": {"name": "deep_linear", "in_dim": 64, "out_dim": 10, "width": 8, "num_layers": 2},
        "steps": 24,
        "batch_size": 32,
    },
    "kfac": {"update_scale": "natural", "damping_scale": "absolute", "lr": 0.1, "inverse_interval": 5},
    "dampings": [1e-2, 1.0],
    "starts": [10.0],
    "rules": {
        "cheap": {"kind": "trust_region"},
        "lm": {"kind": "levenberg_marquardt", "options": {"interval": 4}},
        "falling": {"kind": "exponential", "options": {"decay": 0.8}},
        "straight": {"kind": "linear", "options": {"final_factor": 0.1, "total_steps": 24}},
    },
    "tuned": {"by hand": {"damping": 0.1, "lr": 0.05, "lr_decay": 0.5, "kl_clip": None}},
    "num_seeds": 2,
    "read_interval": 6,
}


def tiny(tmp_path: Path, **changes) -> RulesConfig:
    return load_config(RulesConfig, None, [*TINY.items(), ("out", tmp_path), *changes.items()])


def test_every_line_runs_with_every_seed_and_the_page_names_them(tmp_path: Path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    damping_rules.main(["--config", str(path), "--out", str(tmp_path), "--keep", str(tmp_path / "kept")])
    text, summary = (tmp_path / "tiny" / "index.html").read_text(), json.loads((tmp_path / "kept" / "tiny.json").read_text())
    names = [line.name for line in lines(tiny(tmp_path))]
    assert names[:3] == ["fixed 1e-02", "fixed 1e+00", "by hand"]
    assert len(names) == 3 + 4
    for name in names:
        assert name in text
        assert len(summary["lines"][name]["final_loss"]) == 2
    assert summary["best_fixed"] in names[:2]
    assert summary["lines"][summary["best_fixed"]]["relative_final_loss"] == pytest.approx(1.0)
    assert summary["lines"]["lm from 1e+01"]["extra_time"] > 0


def test_rules_move_the_damping_from_their_start_and_fixed_runs_keep_theirs(tmp_path: Path):
    runs = run_lines(tiny(tmp_path))
    assert runs["fixed 1e-02"][0].dampings == [0.01] * 4
    assert runs["falling from 1e+01"][0].dampings == pytest.approx([10 * 0.8**step for step in (6, 12, 18, 24)])
    assert runs["straight from 1e+01"][0].dampings[-1] == pytest.approx(1.0)
    assert runs["cheap from 1e+01"][0].dampings[-1] < 1.0
    assert runs["lm from 1e+01"][0].dampings[-1] < 10.0
    assert all(len(run.curve) == 4 and math.isfinite(run.final_loss) for line in runs.values() for run in line)


def test_a_second_command_reads_the_runs_of_the_first_and_adds_only_new_ones(tmp_path: Path):
    config = tiny(tmp_path, rules={})
    first = run_lines(config)
    log = config.folder / "runs.jsonl"
    before = log.read_text()
    assert run_lines(config).keys() == first.keys()
    assert log.read_text() == before
    run_lines(tiny(tmp_path, rules={}, num_seeds=3))
    assert log.read_text().startswith(before)
    assert len(log.read_text().splitlines()) == 3 * 3


def test_a_run_that_diverges_is_counted_not_raised(tmp_path: Path):
    free = {"kl_clip": None, "max_relative_update": None, "damping_scale": "absolute"}
    wild = {"kfac": {"update_scale": "natural", "lr": 1e12, **free}}
    config = tiny(tmp_path, rules={}, tuned={}, num_seeds=1, dampings=[1e-2, 1.0], **wild)
    runs = run_lines(config)
    assert all(math.isinf(run.final_loss) for line in runs.values() for run in line)
    again = run_lines(config)
    assert all(math.isinf(run.area) for line in again.values() for run in line)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "damping_rules").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid(path: Path):
    config = load_config(RulesConfig, path)
    assert config.num_seeds == 5
    assert config.starts == [1e-3, 1e1]
    assert {rule.kind for rule in config.rules.values()} >= {"levenberg_marquardt", "trust_region"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rules", {"x": {"kind": "magic"}}, "key 'rules.x.kind': Invalid value 'magic', expected one of .*trust_region"),
        ("rules", {"x": {"kind": "trust_region", "options": {"gian": 1}}}, "unknown key 'rules.x.options.gian'.*'gain'"),
        ("kfac", {"damping": 1.0}, "key 'kfac.damping' is not allowed"),
        ("starts", [-1.0], "must hold finite numbers > 0"),
        ("dampings", [], "must hold finite numbers > 0"),
        ("num_seeds", 0, "num_seeds and read_interval must be >= 1"),
        ("lr_decay", 2.0, r"lr_decay must be in \[0, 1\], got 2"),
    ],
)
def test_a_bad_config_names_the_key_and_what_is_allowed(tmp_path: Path, key: str, value, message: str):
    with pytest.raises(ConfigError, match=message):
        tiny(tmp_path, **{key: value})
