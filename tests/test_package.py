"""What is uploaded is what was written: one version, and a wheel that trains where nothing of the checkout is."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kfac_opt

ROOT = Path(kfac_opt.__file__).parents[1]

TRAIN = """
import sys, torch, kfac_opt
from kfac_opt import KFAC
assert kfac_opt.__file__.startswith(sys.argv[1]), kfac_opt.__file__
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
optimizer, x = KFAC(model), torch.randn(64, 4)
y = x[:, :3].argmax(1)
losses = []
for _ in range(30):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(float(loss))
assert losses[-1] < 0.5 * losses[0], losses
print("trained", losses[-1])
"""


def test_the_citation_names_the_version_of_the_package():
    found = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert found is not None
    assert found[1] == kfac_opt.__version__


def test_the_changelog_has_an_entry_for_this_version_or_an_unreleased_one():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text if "dev" in kfac_opt.__version__ else f"## [{kfac_opt.__version__}]" in text


@pytest.mark.slow
def test_the_wheel_trains_away_from_the_checkout(tmp_path):
    pytest.importorskip("build")
    run = {"check": True, "capture_output": True, "text": True}
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], **run)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "kfac_opt/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in names)
    target = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)], **run)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(target)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "trained" in done.stdout
