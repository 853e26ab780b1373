"""Every script of the gallery runs, draws a figure, and says no more than it means to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("plot_*.py"))
RUN = """
import runpy, sys
import matplotlib.pyplot as plt
from tests.quiet import beyond_announcements, own_warnings
plt.switch_backend("agg")
with own_warnings() as said:
    runpy.run_path(sys.argv[1], run_name="__main__")
assert not beyond_announcements(said), said
figures = [plt.figure(number) for number in plt.get_fignums()]
assert figures and all(figure.axes for figure in figures), "no figure was drawn"
"""


def _marks(path: Path) -> list[pytest.MarkDecorator]:
    return [] if path.stem in ("plot_01_drop_in", "plot_14_own_layer") else [pytest.mark.slow]


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem, marks=_marks(path)) for path in EXAMPLES])
def test_the_example_runs_and_draws_a_figure(path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path)], cwd=path.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_there_are_at_least_twelve_examples():
    assert len(EXAMPLES) >= 12
