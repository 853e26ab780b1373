"""Step time as a ratio to plain SGD's in the same run, state and peak memory.

    python -m benchmarks.step_time --config configs/step_time/cpu.yaml

All contestants of a workload take turns, one step each; a K-FAC step is averaged over whole periods of its longest
interval, so that the rare expensive steps count with their share. The early ramp is left out (``ramp_steps: 0`` in the
config): the figures are those of the long run. On a CPU with one thread a step's time is the processor time of the thread
that takes it: other processes on the machine do not count.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.common.command import run_command
from benchmarks.common.config import LOCAL, ConfigError, ExperimentConfig
from benchmarks.common.figures import COLOURS, Figure, finish, subplots
from benchmarks.common.memory import peak_bytes
from benchmarks.common.peers import is_installed
from benchmarks.common.report import Report, Table, progress, run_script, write_report
from benchmarks.common.steps import Step, StepConfig, make_step, run_steps
from benchmarks.common.timing import Timed, cycle_ratio, interleave, percentile
from benchmarks.common.workloads import Workload, WorkloadConfig

MEMORY_STEPS = 3
Measured = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class StepTimeConfig(ExperimentConfig):
    """What is measured.

    Attributes:
        reference: the contestant that all others are divided by.
        ratios: further ratios of two contestants' median steps, by name, e.g.
            ``{capture: [capture without factors, forward + backward]}``.
        max_rounds: upper limit of the rounds of a workload (tests).
        measure_memory: also run each contestant in a process of its own for its peak memory.
    """

    workloads: dict[str, WorkloadConfig]
    contestants: dict[str, StepConfig]
    reference: str = "SGD"
    ratios: dict[str, list[str]] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)
    max_rounds: int | None = None
    measure_memory: bool = True
    out: Path = field(default=Path("out/step_time"), metadata=LOCAL)

    def __post_init__(self) -> None:
        if self.reference not in self.contestants:
            raise ConfigError(f"reference must be one of {', '.join(self.contestants)}, got '{self.reference}'.")
        if self.contestants[self.reference].stride != 1:
            raise ConfigError(f"contestants.{self.reference}.stride must be 1: it is the reference of every round.")
        for name, pair in self.ratios.items():
            if len(pair) != 2 or not set(pair) <= set(self.contestants):
                raise ConfigError(f"ratios.{name} must name two of {', '.join(self.contestants)}, got {pair}.")
        unknown = set(self.only) - set(self.workloads)
        if unknown:
            raise ConfigError(f"only: unknown workloads {sorted(unknown)}; allowed: {', '.join(self.workloads)}.")


def main(arguments: Sequence[str] | None = None) -> Report:
    """Measures all workloads and writes the page."""
    return run_script(StepTimeConfig, run, arguments, "Step time beside SGD's in the same run.", None)


def run(config: StepTimeConfig) -> Report:
    """All workloads; what is there is written after each, for some take hours."""
    missing = [label for label, step in config.contestants.items() if step.kind == "peer" and not is_installed(step.optimizer)]
    for label in missing:
        print(f"'{label}' is left out: package '{config.contestants[label].optimizer}' is not installed", file=sys.stderr)
    config = replace(config, contestants={k: step for k, step in config.contestants.items() if k not in missing})
    results: dict[str, list[Measured]] = {}
    for name in config.only or config.workloads:
        results[name] = measure(config, name)
        report = make_report(config, results)
        write_report(report, config)
    return report


def measure(config: StepTimeConfig, name: str) -> list[Measured]:
    """All contestants on one workload."""
    workload_config = config.workloads[name]
    workload = Workload(workload_config, config.device, config.seed)
    steps = {label: make_step(step, workload) for label, step in config.contestants.items()}
    rounds = workload_config.cycles * max(step.period for step in config.contestants.values())
    rounds = min(rounds, config.max_rounds or rounds)
    timed = {label: Timed(steps[label].run, config.contestants[label].stride) for label in steps}
    with progress(rounds, name) as display:
        alone = config.threads == 1 and config.device == "cpu"
        clock = time.thread_time if alone else time.perf_counter
        seconds = interleave(timed, rounds, device=config.device, on_round=display.update, clock=clock)
    peaks = {
        label: peak_bytes(run_steps, step, workload_config, config.device, MEMORY_STEPS, device=config.device)
        for label, step in config.contestants.items()
        if config.measure_memory
    }
    num_bytes = sum(p.numel() * p.element_size() for p in workload.build_model().parameters())
    return [_evaluate(config, label, step, seconds, peaks, num_bytes) for label, step in steps.items()]


def _evaluate(
    config: StepTimeConfig, label: str, step: Step, seconds: dict[str, list[float]], peaks: dict[str, int], num_bytes: int
) -> Measured:
    """``mean_ratio``: over whole periods, to the reference's mean in the same rounds; ``median_ratio``: of median steps."""
    contestant, own, every = config.contestants[label], seconds[label], seconds[config.reference]
    middle = percentile(own, 50)
    period = max(1, contestant.period // contestant.stride) if contestant.period > 1 else len(own)
    return {
        "contestant": label,
        "num_steps": len(own),
        "median_seconds": middle,
        "mean_ratio": cycle_ratio(own, every[:: contestant.stride], period),
        "median_ratio": middle / percentile(every, 50),
        "p99_over_p50": percentile(own, 99) / middle,
        "max_over_p50": max(own) / middle,
        "state_bytes": step.state_bytes(),
        "state_over_parameters": step.state_bytes() / num_bytes,
        "peak_bytes_above_reference": peaks[label] - peaks[config.reference] if peaks else None,
    }


def further_ratios(config: StepTimeConfig, found: list[Measured]) -> dict[str, float]:
    """Ratios of two contestants' median steps."""
    medians = {result["contestant"]: result["median_seconds"] for result in found}
    pairs = {name: pair for name, pair in config.ratios.items() if set(pair) <= set(medians)}
    return {name: medians[above] / medians[below] for name, (above, below) in pairs.items()}


def make_report(config: StepTimeConfig, results: dict[str, list[Measured]]) -> Report:
    """A table and bars for each workload."""
    ratios = {name: further_ratios(config, found) for name, found in results.items()}
    caption = (
        f"mean / {config.reference}: over whole periods of the intervals, in the same rounds. "
        "Peak memory in a process of its own."
    )
    tables = []
    for name, found in results.items():
        workload = config.workloads[name]
        title = f"{name}: {workload.model['name']}, batch {workload.batch_size}, input {workload.input_shape}. {caption}"
        tables.append(Table.of(title, [_row(config, result) for result in found]))
    return Report(
        title=f"Step time: {config.name}",
        tables=tables,
        figures={name: _bars(config, name, found) for name, found in results.items()},
        notes=[f"{name}: {key} {value:.2f}" for name, found in ratios.items() for key, value in found.items()],
        content={"results": results, "ratios": ratios},
    )


def _row(config: StepTimeConfig, result: Measured) -> dict[str, Any]:
    memory = result["peak_bytes_above_reference"]
    return {
        "step": result["contestant"],
        "median ms": 1e3 * result["median_seconds"],
        f"mean / {config.reference}": result["mean_ratio"],
        f"median / {config.reference}": result["median_ratio"],
        "p99 / p50": result["p99_over_p50"],
        "max / p50": result["max_over_p50"],
        "state MB": result["state_bytes"] / 1e6,
        "state / parameters": result["state_over_parameters"],
        f"peak MB above {config.reference}": memory and memory / 1e6,
    }


def _bars(config: StepTimeConfig, name: str, found: list[Measured]) -> Figure:
    figure, axes = subplots()
    bars = axes.bar([r["contestant"] for r in found], [r["mean_ratio"] for r in found], color=COLOURS[0], width=0.6)
    axes.bar_label(bars, fmt="%.2f", fontsize=9)
    axes.set(ylabel=f"mean step time / {config.reference}'s", title=name)
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="x", labelrotation=20 if len(found) > 5 else 0)
    return finish(figure, f"{name}: mean step time as a ratio.")


if __name__ == "__main__":
    run_command(main)
