"""The script that says what skipped refreshes save and cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import refresh_tolerance

TINY = """
name: tiny
task:
  data: {name: digits, flatten: true, num_train: 200, num_test: 50}
  model: {name: mlp, sizes: [64, 12, 10]}
  steps: 12
  batch_size: 32
  eval_interval: 6
tolerances: [0.0, 1.0e+9]
intervals: [2]
settings: {ramp_steps: 0}
num_seeds: 2
"""


def test_every_tolerance_is_trained_from_the_same_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), "--keep", str(tmp_path / "kept")]
    exact, never = refresh_tolerance.main(arguments)
    assert exact["skipped"] == [0.0, 0.0]
    assert never["skipped"] == [5 / 6, 5 / 6]  # all six turns but the first
    assert len(set(exact["final_loss"])) == 2
    assert exact["final_loss"] != never["final_loss"]
    assert exact["final_loss"] == refresh_tolerance.main(arguments)[0]["final_loss"]
    assert all(0.0 < part <= whole for part, whole in zip(exact["refresh_seconds"], exact["seconds"]))
    assert "83" in capsys.readouterr().out
    kept = json.loads((tmp_path / "kept" / "tiny.json").read_text())
    assert {"versions", "machine", "config", "results"} <= kept.keys()
