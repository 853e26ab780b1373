"""What a K-FAC step is made of, beside SGD's step in the same run, held against the goals.

    python -m benchmarks.step_parts --config configs/step_parts/cpu.yaml

Every part is timed in turn with an SGD step of the same model (CPU: processor time of the thread, so that other
processes on the machine do not count; CUDA: wall time around a synchronised call). Amortised figures are put together from
the parts: a plain step, ``1 / factor_interval`` of what an estimate adds, ``1 / inverse_interval`` of a refresh of all
layers. ``benchmarks.step_time`` measures whole periods instead and takes as many times longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common.command import run_command
from benchmarks.common.config import LOCAL, ExperimentConfig
from benchmarks.common.memory import peak_bytes
from benchmarks.common.optimizers import build_optimizer, state_bytes
from benchmarks.common.report import Report, Table, run_script, write_report
from benchmarks.common.steps import StepConfig, make_step, run_steps
from benchmarks.common.workloads import Workload, WorkloadConfig
from kfac_opt import KFAC
from kfac_opt._curvature.kronecker import KroneckerBlock
from kfac_opt._kernels.products import times_transposed
from kfac_opt._kernels.workspace import shared_workspace


@dataclass(frozen=True, kw_only=True)
class PartsConfig(ExperimentConfig):
    """What is measured.

    Attributes:
        repetitions: of each part.
        settings: of K-FAC, by the name of the variant; the first one is the exact one.
        goals: by workload and figure.
    """

    workloads: dict[str, WorkloadConfig]
    settings: dict[str, dict[str, Any]]
    repetitions: dict[str, int]
    goals: dict[str, dict[str, float]] = field(default_factory=dict)
    factor_interval: int = 10
    inverse_interval: int = 100
    measure_memory: list[str] = field(default_factory=list)
    only: list[str] = field(default_factory=list)
    out: Path = field(default=Path("out/step_parts"), metadata=LOCAL)


class Clock:
    """Seconds of calls by name: processor time of this thread on a CPU, synchronised wall time on CUDA."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        """Runs ``call`` and notes its time under ``name``."""
        start = self.now()
        result = call()
        self.seconds.setdefault(name, []).append(self.now() - start)
        return result

    def now(self) -> float:
        if not self.cuda:
            return time.thread_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))


def main(arguments: Sequence[str] | None = None) -> Report:
    """Measures all workloads and writes goal and figure."""
    return run_script(PartsConfig, run, arguments, "Parts of a K-FAC step beside SGD's.", None)


def run(config: PartsConfig) -> Report:
    """All workloads; what is there is written after each."""
    results: dict[str, dict[str, float]] = {}
    for name in config.only or config.workloads:
        results[name] = measure(config, name)
        tables = [Table.of(task, _rows(found, config.goals.get(task, {}))) for task, found in results.items()]
        report = Report(f"Parts of a step: {config.name}", tables=tables, content={"results": results, "goals": config.goals})
        write_report(report, config)
    return report


def _rows(figures: dict[str, float], goals: dict[str, float]) -> list[dict[str, str]]:
    """Figure, goal, measured, met or by how much missed."""
    rows = []
    for name, value in figures.items():
        goal = goals.get(name)
        kept = "" if goal is None else "met" if value <= goal else f"missed by {value - goal:.3g}"
        rows.append({"figure": name, "goal": goal, "measured": value, "": kept})
    return rows


def measure(config: PartsConfig, name: str) -> dict[str, float]:
    """All figures of one workload: ratios to the SGD step unless the name says otherwise."""
    workload = Workload(config.workloads[name], config.device, config.seed)
    clock = Clock(config.device)
    plain = {
        "SGD": make_step(StepConfig(optimizer="sgd", settings={"lr": 1e-3, "momentum": 0.9}), workload).run,
        "AdamW": make_step(StepConfig(optimizer="adamw", settings={"lr": 1e-4}), workload).run,
        "forward + backward": make_step(StepConfig(kind="forward_backward"), workload).run,
        "capture": make_step(StepConfig(kind="capture"), workload).run,
    }
    variants = {label: _Variant(workload, settings, clock, label) for label, settings in config.settings.items()}
    for number in range(config.repetitions[name] + 2):
        if number == 2:  # the first two warm up
            clock.seconds.clear()
        for label, step in plain.items():
            clock(label, step)
        for variant in variants.values():
            variant.round()
    sgd, both = clock.median("SGD"), clock.median("forward + backward")
    figures = {
        "SGD step, ms": 1e3 * sgd,
        "AdamW": clock.median("AdamW") / sgd,
        "capture without factors / forward + backward": clock.median("capture") / both,
    }
    parameters = sum(p.numel() * p.element_size() for p in workload.build_model().parameters())
    for label, variant in variants.items():
        step, estimate = clock.median(f"{label}: plain"), clock.median(f"{label}: estimate")
        refresh, factors = clock.median(f"{label}: refresh"), clock.median(f"{label}: factors")
        extra = (estimate - step) / config.factor_interval + refresh / config.inverse_interval
        prefix = "" if label == next(iter(variants)) else f"{label}: "
        figures |= {
            f"{prefix}plain step": step / sgd,
            f"{prefix}amortised step": (step + extra) / sgd,
            f"{prefix}everything every step": (estimate + refresh) / sgd,
            f"{prefix}all factors / forward + backward": factors / both,
            f"{prefix}refresh of all inverses / forward + backward": refresh / both,
            f"{prefix}dearest layer's refresh + plain step / plain step": 1 + variant.dearest / step,
            f"{prefix}state / parameters": state_bytes(variant.optimizer) / parameters,
        }
        seconds = clock.median(f"{label}: precondition")
        figures[f"{prefix}preconditioning"] = seconds / sgd
        figures[f"{prefix}preconditioning, share of the arithmetic limit"] = variant.operations() / (
            _rate(config.device) * seconds
        )
    if name in config.measure_memory:
        figures |= _memory(config, name)
    return figures


def _memory(config: PartsConfig, name: str) -> dict[str, float]:
    """Peak memory of three steps above SGD's, the third an estimate beside the whole state, in a process each."""
    sgd = StepConfig(optimizer="sgd", settings={"lr": 1e-3, "momentum": 0.9})
    base = peak_bytes(run_steps, sgd, config.workloads[name], config.device, 3, device=config.device)
    found = {}
    for label, settings in config.settings.items():
        contestant = StepConfig(optimizer="kfac", settings={"lr": 1e-3, "ramp_steps": 0, "factor_interval": 2, **settings})
        peak = peak_bytes(run_steps, contestant, config.workloads[name], config.device, 3, device=config.device)
        prefix = "" if label == next(iter(config.settings)) else f"{label}: "
        found[f"{prefix}peak memory above SGD's, MB"] = (peak - base) / 1e6
    return found


class _Variant:
    """One K-FAC, whose steps are timed as plain steps, estimates and refreshes."""

    def __init__(self, workload: Workload, settings: dict[str, Any], clock: Clock, label: str) -> None:
        model = workload.build_model()
        never = 10**9
        schedule = {"ramp_steps": 0, "factor_interval": 2, "inverse_interval": never, "refresh": "together"}
        optimizer = build_optimizer("kfac", model, {"lr": 1e-3, **schedule, **settings})
        assert isinstance(optimizer, KFAC)
        self.model, self.optimizer, self.clock, self.label = model, optimizer, clock, label
        self.losses = workload.losses(model)
        self.dearest = 0.0
        self.blocks = {n: t for n, t in optimizer.blocks.items() if isinstance(t.block, KroneckerBlock)}
        self.factor_seconds = 0.0
        for tracked in optimizer.blocks.values():
            for method in ("add_input", "add_output", "update"):
                setattr(tracked.block, method, self._counted(getattr(tracked.block, method)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = self.clock.now()
            result = method(*arguments)
            self.factor_seconds += self.clock.now() - start
            return result

        return call

    def round(self) -> None:
        """An estimate, a plain step, a refresh of every layer, a preconditioning of every layer."""
        self.factor_seconds = 0.0
        self.clock(f"{self.label}: estimate", self._step)
        self.clock.seconds.setdefault(f"{self.label}: factors", []).append(self.factor_seconds)
        self.clock(f"{self.label}: plain", self._step)
        with torch.no_grad():
            self.clock(f"{self.label}: refresh", self._refresh)
            self.clock(f"{self.label}: precondition", self._precondition)

    def _step(self) -> None:
        self.optimizer.zero_grad()
        next(self.losses).backward()
        self.optimizer.step()

    def _refresh(self) -> None:
        self.dearest = 0.0
        with shared_workspace():  # as in a step that refreshes them all
            for tracked in self.blocks.values():
                start = self.clock.now()
                tracked.block.refresh(self._state(tracked.weight), self.optimizer._workings.blocks.damping_of(tracked))
                self.dearest = max(self.dearest, self.clock.now() - start)

    def _precondition(self) -> None:
        for tracked in self.blocks.values():
            gradients = [parameter.grad for parameter in tracked.parameters]
            matrix = tracked.block.layout.to_matrix(*gradients)  # type: ignore[arg-type]
            tracked.block.precondition(self._state(tracked.weight), matrix, self.optimizer._workings.blocks.damping_of(tracked))

    def _state(self, weight: nn.Parameter) -> dict[str, Any]:
        return self.optimizer.state[weight]["curvature"]

    def operations(self) -> float:
        """Multiplications and additions of one preconditioning of all layers."""
        total = 0
        for tracked in self.blocks.values():
            groups, out_dim, in_dim = tracked.block.layout.shape
            sides = tracked.block.sides
            total += 2 * groups * (out_dim * sides["input"].multiplications() + in_dim * sides["output"].multiplications())
        return float(total)


def _rate(device: str) -> float:
    """Operations per second of a large product in single precision: the machine's limit for them."""
    size = 1024
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    clock = Clock(device)
    for _ in range(7):
        clock("product", lambda: times_transposed(left, right))
    return 2 * size**3 / min(clock.seconds["product"])


if __name__ == "__main__":
    run_command(main)
