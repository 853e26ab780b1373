"""The kinds of steps whose time is measured: forward and backward, a whole optimizer step, the capture alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.common.optimizers import build_optimizer, state_bytes
from benchmarks.common.peers import peer_step
from benchmarks.common.workloads import Workload, WorkloadConfig

StepKind = Literal["optimizer", "forward_backward", "capture", "peer"]


@dataclass(frozen=True)
class StepConfig:
    """One contestant.

    Attributes:
        kind: ``optimizer``: forward, backward, step; ``forward_backward``: no step; ``capture``: forward and backward
            with K-FAC's hooks collecting layer inputs and sampled output gradients, but no factor computed of them.
        optimizer, settings: for ``optimizer``; for ``peer``, which is another package (``benchmarks/common/peers.py``), its
            name and the settings that it understands.
        stride: timed in every so many rounds.
        period: steps of the longest interval, over which the mean is taken.
    """

    kind: StepKind = "optimizer"
    optimizer: str = "sgd"
    settings: dict[str, Any] = field(default_factory=dict)
    stride: int = 1
    period: int = 1

    def __post_init__(self) -> None:
        if self.stride < 1 or self.period < 1:
            raise ValueError(f"stride and period must be >= 1, got {self.stride} and {self.period}")


@dataclass(frozen=True)
class Step:
    """A step ready to run, with the bytes that its optimizer keeps."""

    run: Callable[[], None]
    state_bytes: Callable[[], int]


def make_step(config: StepConfig, workload: Workload) -> Step:
    """The step of ``config`` on its own model."""
    model = workload.build_model()
    if config.kind == "forward_backward":
        return Step(_forward_backward(model, workload), lambda: 0)
    if config.kind == "capture":
        return Step(_capture(model, workload), lambda: 0)
    if config.kind == "peer":
        return Step(peer_step(config.optimizer, config.settings, model, workload), lambda: 0)
    optimizer = build_optimizer(config.optimizer, model, config.settings)
    losses = workload.losses(model)

    def run() -> None:
        optimizer.zero_grad()
        next(losses).backward()
        optimizer.step()

    return Step(run, lambda: state_bytes(optimizer))


def run_steps(config: StepConfig, workload: WorkloadConfig, device: str, number: int) -> None:
    """``number`` steps from scratch; what the memory of a contestant is measured on."""
    step = make_step(config, Workload(workload, device))
    for _ in range(number):
        step.run()


def _forward_backward(model: nn.Module, workload: Workload) -> Callable[[], None]:
    losses = workload.losses(model)

    def run() -> None:
        model.zero_grad()
        next(losses).backward()

    return run


@dataclass
class _IdleBlock:
    """Stands where a curvature block would be and computes nothing from what it is shown."""

    adapter: Any
    sharing: str = "expand"
    needs_input: bool = True

    @property
    def layout(self) -> Any:
        """That of the layer: the collector holds outputs against it."""
        return self.adapter.layout

    def add_input(self, statistics: Any, call: Any) -> None:
        """Takes note of nothing."""

    def add_output(self, statistics: Any, calls: Any, gradients: Any, state: Any) -> None:
        """Takes note of nothing."""


@dataclass
class _IdleLayer:
    name: str
    block: Any
    weight: nn.Parameter
    bias: nn.Parameter | None
    module: nn.Module
    part: str | None = None


def _capture(model: nn.Module, workload: Workload) -> Callable[[], None]:
    """The package's own collector on all layers that have an adapter, with blocks that do no factor work."""
    from kfac_opt._capture.collector import Collector
    from kfac_opt.layers import find_adapter
    from kfac_opt.likelihoods import Categorical

    def make_generator(index: int, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(index)

    collector = Collector(model, Categorical(), "mc", 1, None, "mean", make_generator)
    layers = {}
    for name, module in model.named_modules():
        adapter = find_adapter(module)
        if adapter is not None:
            bias = getattr(module, "bias", None)
            block = _IdleBlock(adapter(module, bias is not None))
            layers[name] = _IdleLayer(name, block, module.weight, bias, module)
    collector.attach(layers, {})  # type: ignore[arg-type]
    plain = _forward_backward(model, workload)

    def run() -> None:
        plain()
        collector.take()

    return run
