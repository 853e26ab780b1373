"""The study of learning rates over the width of a net."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.battery import width
from benchmarks.battery.tasks import TASKS
from benchmarks.common.models import mlp

CONFIG = Path(__file__).parents[2] / "configs" / "battery" / "width.yaml"


def test_best_rate_is_the_bottom_of_a_parabola_over_the_logarithm():
    losses = {str(rate): math.exp(math.log(rate / 3e-3) ** 2) for rate in (1e-3, 2e-3, 4e-3, 8e-3)}
    assert width.best_rate(losses) == pytest.approx(3e-3)


def test_best_rate_at_the_edge_is_the_edge_and_broken_runs_do_not_count():
    assert width.best_rate({"0.001": 1.0, "0.002": 0.5, "0.004": None}) == pytest.approx(0.002)


def test_study_runs_once_keeps_the_losses_and_draws(tmp_path, monkeypatch, capsys):
    task = replace(TASKS["digits_mlp"], steps=10)
    monkeypatch.setattr(width, "NETS", {"mlp": ("digits", lambda size: mlp((64, size, 10)), task)})
    arguments = ["--config", str(CONFIG), "--nets", "[mlp]", "--widths", "[4, 8]", "--out", str(tmp_path)]
    width.main(arguments)
    content = json.loads((tmp_path / "width" / "width.json").read_text())
    assert set(content["losses"]["mlp"]["adamw"]) == {"4", "8"}
    assert (tmp_path / "width" / "width.png").read_bytes().startswith(b"\x89PNG")
    assert "mlp, adamw: width 4: " in capsys.readouterr().out
    monkeypatch.setattr(width, "train", lambda *arguments: pytest.fail("trained again"))
    width.main(arguments)
