"""Other packages as contestants of the step times."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from benchmarks import step_time
from benchmarks.common import peers
from benchmarks.common.config import ConfigError

PEERS = """
name: tiny
measure_memory: false
workloads:
  mlp: {model: {name: mlp, sizes: [20, 8, 10]}, batch_size: 16, input_shape: [20]}
contestants:
  SGD: {settings: {lr: 1e-3, momentum: 0.9}}
  other: {kind: peer, optimizer: asdl, settings: {lr: 1e-2, damping: 0.5}}
  absent: {kind: peer, optimizer: singd}
"""


class _Maker:
    """What the benchmark calls of asdl: it gets the model, the loss and the settings, and leaves gradients."""

    seen: ClassVar[list[dict]] = []

    def __init__(self, model: nn.Module, config: dict, fisher_type: str) -> None:
        self.model = model
        self.seen.append({**config, "fisher_type": fisher_type})

    def setup_model_call(self, model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        return model(inputs)

    def setup_loss_call(self, loss, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.loss = loss(outputs, targets, reduction="mean")

    def forward_and_backward(self) -> None:
        self.loss.backward()


def test_other_packages_take_part_where_they_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    package = types.ModuleType("asdl")
    package.KfacGradientMaker, package.PreconditioningConfig = _Maker, dict
    package.__spec__ = importlib.machinery.ModuleSpec("asdl", None)
    monkeypatch.setitem(sys.modules, "asdl", package)
    monkeypatch.setitem(sys.modules, "singd", None)
    (tmp_path / "peers.yaml").write_text(PEERS)
    report = step_time.main(["--config", str(tmp_path / "peers.yaml"), "--out", str(tmp_path), "--max-rounds", "3"])
    assert [line["contestant"] for line in report.content["results"]["mlp"]] == ["SGD", "other"]
    assert _Maker.seen == [{"damping": 0.5, "data_size": 16, "fisher_type": "fisher_mc"}]
    assert "'absent' is left out: package 'singd' is not installed" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="must name one of asdl, singd as optimizer, got 'adam'"):
        peers.is_installed("adam")
