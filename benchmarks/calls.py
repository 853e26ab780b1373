"""How much Python a step runs: files, functions and calls inside the package, and all calls, for one step of each kind.

Counts by ``sys.setprofile``; they do not depend on the machine. ``python -m benchmarks.calls``
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_opt
from benchmarks.common.models import build_model
from kfac_opt import KFAC, KFACVI

PACKAGE = str(Path(kfac_opt.__file__).parent)


@dataclass
class Trace:
    """What ran: Python calls inside the package and outside, and calls of C functions from Python."""

    functions: set[tuple[str, str]] = field(default_factory=set)
    inside: int = 0
    everything: int = 0
    crossing: int = 0  # calls from one file of the package into another

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "c_call":
            self.everything += 1
        if event != "call":
            return
        self.everything += 1
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE):
            return
        self.inside += 1
        self.functions.add((name, frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name))
        caller = frame.f_back.f_code.co_filename if frame.f_back is not None else ""
        self.crossing += caller.startswith(PACKAGE) and caller != name

    def row(self) -> list[int]:
        """Files, functions, calls across files, calls inside the package, all calls."""
        return [len({name for name, _ in self.functions}), len(self.functions), self.crossing, self.inside, self.everything]


def traced(call: Callable[[], Any]) -> Trace:
    """Runs ``call`` once under a profile function."""
    trace = Trace()
    sys.setprofile(trace)
    try:
        call()
    finally:
        sys.setprofile(None)
    return trace


def _prepared(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int) -> None:
    """Takes ``steps`` steps and leaves new gradients."""
    for step in range(steps + 1):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if step < steps:
            optimizer.step()


def measure() -> dict[str, list[int]]:
    """Rows of the table by what was traced."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))

    def mlp() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    rare = {"factor_interval": 1000, "inverse_interval": 1000, "ramp_steps": 1}
    found: dict[str, list[int]] = {}
    model = mlp()
    found["MLP: KFAC(model)"] = traced(lambda: KFAC(model)).row()
    model = mlp()
    optimizer = KFAC(model, **rare)
    found["MLP: first pass and step"] = traced(lambda: _prepared(model, optimizer, x, y, 1)).row()
    found["MLP: plain step"] = traced(optimizer.step).row()
    model = mlp()
    sampled = KFACVI(model, num_data=100)

    def two_samples() -> None:
        sampled.zero_grad()
        for _ in sampled.weight_samples(2):
            F.cross_entropy(model(x), y).backward()
        sampled.step()

    two_samples()
    found["MLP: KFACVI, two samples"] = traced(two_samples).row()
    for rule in ("rms", "natural"):
        net = build_model({"name": "resnet18", "width": 8}, 0)
        optimizer = KFAC(net, update_scale=rule, **rare)
        _prepared(net, optimizer, torch.randn(4, 3, 32, 32), torch.randint(10, (4,)), 3)
        found[f"ResNet18, {rule}: plain step"] = traced(optimizer.step).row()
    return found


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = measure()
    print(f"{'':34s}{'files':>7s}{'functions':>11s}{'crossing':>10s}{'calls inside':>14s}{'all calls':>11s}")
    for name, row in rows.items():
        print(f"{name:34s}{row[0]:7d}{row[1]:11d}{row[2]:10d}{row[3]:14d}{row[4]:11d}")


if __name__ == "__main__":
    main()
