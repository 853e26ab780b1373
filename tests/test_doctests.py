"""Every example in a docstring, and the README's, runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kfac_opt

MODULES = ["kfac_opt", *sorted(module.name for module in pkgutil.walk_packages(kfac_opt.__path__, "kfac_opt."))]
README = Path(__file__).parent.parent / "README.md"


def usual_names() -> dict[str, object]:
    """What the examples take for granted: a model, a loader and the optimizer class."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(64, 4)
    loader = [(x, x[:, :3].argmax(-1))] * 3
    return {"torch": torch, "nn": nn, "F": F, "model": model, "loader": loader, "KFAC": kfac_opt.KFAC}


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings_run(name):
    module = importlib.import_module(name)
    # A module's own names win: an example may build a model of its own.
    found = doctest.DocTestFinder(exclude_empty=True).find(module, globs={**usual_names(), **vars(module)})
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in found:
        runner.run(test)
    assert runner.failures == 0


def test_public_classes_open_with_an_example():
    for name in ("KFAC", "KFACVI", "Posterior"):
        assert ">>> " in (getattr(kfac_opt, name).__doc__ or ""), name


def test_the_ten_lines_of_the_readme_train():
    code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[0]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(64, 4)
    loader = [(x, x[:, :3].argmax(-1))] * 30
    before = F.cross_entropy(model(x), loader[0][1])
    exec(code, {"model": model, "loader": loader})
    assert F.cross_entropy(model(x), loader[0][1]) < 0.5 * before
