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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.command import run_command
from benchmarks.common.config import LOCAL, ConfigError, parse_arguments
from benchmarks.common.figures import bar_figure
from benchmarks.common.memory import peak_bytes
from benchmarks.common.page import Figure, Section, Table, machine_footer, write_page
from benchmarks.common.peers import is_installed
from benchmarks.common.progress import progress
from benchmarks.common.results import describe_machine, describe_versions, provenance, write_json
from benchmarks.common.steps import Step, StepConfig, make_step, run_steps
from benchmarks.common.tables import text_table
from benchmarks.common.timing import Timed, cycle_ratio, interleave, percentile
from benchmarks.common.workloads import Workload, WorkloadConfig

MEMORY_STEPS = 3
HEADER = ("step", "median ms", "mean / SGD", "median / SGD", "p99 / p50", "max / p50", "state MB", "peak MB above SGD")


@dataclass(frozen=True)
class StepTimeConfig:
    """What is measured.

    Attributes:
        reference: the contestant that all others are divided by.
        ratios: further ratios of two contestants' median steps, by name, e.g.
            ``{capture: [capture without factors, forward + backward]}``.
        max_rounds: upper limit of the rounds of a workload (tests).
        measure_memory: also run each contestant in a process of its own for its peak memory.
    """

    name: str
    workloads: dict[str, WorkloadConfig]
    contestants: dict[str, StepConfig]
    reference: str = "SGD"
    ratios: dict[str, list[str]] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)
    max_rounds: int | None = None
    measure_memory: bool = True
    threads: int = 1
    device: str = "cpu"
    seed: int = 0
    out: Path = field(default=Path("out/step_time"), metadata=LOCAL)
    keep: Path | None = field(default=None, metadata=LOCAL)

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


@dataclass(frozen=True)
class StepTime:
    """One contestant on one workload.

    Attributes:
        mean_ratio: mean over whole periods, divided by the reference's mean in the same rounds.
        median_ratio: median step divided by the reference's median step.
        peak_bytes_above_reference: None when memory was not measured.
    """

    contestant: str
    num_steps: int
    median_seconds: float
    mean_ratio: float
    median_ratio: float
    p99_over_p50: float
    max_over_p50: float
    state_bytes: int
    state_over_parameters: float
    peak_bytes_above_reference: int | None

    def row(self) -> list[str]:
        """One row under ``HEADER``."""
        memory = self.peak_bytes_above_reference
        return [
            self.contestant,
            f"{1e3 * self.median_seconds:.2f}",
            f"{self.mean_ratio:.2f}",
            f"{self.median_ratio:.2f}",
            f"{self.p99_over_p50:.2f}",
            f"{self.max_over_p50:.2f}",
            f"{self.state_bytes / 1e6:.1f} ({self.state_over_parameters:.1f} ×)",
            "—" if memory is None else f"{memory / 1e6:.0f}",
        ]


def main(arguments: Sequence[str] | None = None) -> dict[str, list[StepTime]]:
    """Measures all workloads, prints a table for each, writes JSON and the page."""
    config = _without_missing(parse_arguments(StepTimeConfig, arguments, description="Step time beside SGD's in the same run."))
    torch.set_num_threads(config.threads)
    results = {}
    for name in config.only or config.workloads:
        results[name] = measure(config, name)
        print(f"\n{name}\n{text_table(HEADER, [result.row() for result in results[name]])}")
        print("\n".join(ratio_lines(config, results[name])), flush=True)
        page = write_report(config, results)
    print(f"\npage: {page}")
    return results


def _without_missing(config: StepTimeConfig) -> StepTimeConfig:
    """Without the contestants whose package is not installed."""
    missing = [label for label, step in config.contestants.items() if step.kind == "peer" and not is_installed(step.optimizer)]
    for label in missing:
        print(f"'{label}' is left out: package '{config.contestants[label].optimizer}' is not installed", file=sys.stderr)
    kept = {label: step for label, step in config.contestants.items() if label not in missing}
    return replace(config, contestants=kept)


def measure(config: StepTimeConfig, name: str) -> list[StepTime]:
    """All contestants on one workload."""
    workload_config = config.workloads[name]
    workload = Workload(workload_config, config.device, config.seed)
    steps = {label: make_step(step, workload) for label, step in config.contestants.items()}
    rounds = workload_config.cycles * max(step.period for step in config.contestants.values())
    rounds = rounds if config.max_rounds is None else min(rounds, config.max_rounds)
    timed = {label: Timed(steps[label].run, config.contestants[label].stride) for label in steps}
    with progress(rounds, name) as display:
        alone = config.threads == 1 and config.device == "cpu"
        clock = time.thread_time if alone else time.perf_counter
        seconds = interleave(timed, rounds, device=config.device, on_round=display.advance, clock=clock)
    peaks = _peaks(config, workload_config) if config.measure_memory else {}
    num_bytes = sum(p.numel() * p.element_size() for p in workload.build_model().parameters())
    return [_evaluate(config, label, step, seconds, peaks, num_bytes) for label, step in steps.items()]


def ratio_lines(config: StepTimeConfig, found: list[StepTime]) -> list[str]:
    """The further ratios of the config, one line each."""
    return [f"{name}: {value:.2f}" for name, value in further_ratios(config, found).items()]


def further_ratios(config: StepTimeConfig, found: list[StepTime]) -> dict[str, float]:
    """Median step of the first contestant of each pair divided by the second's."""
    medians = {result.contestant: result.median_seconds for result in found}
    return {name: medians[first] / medians[second] for name, (first, second) in config.ratios.items()}


def _peaks(config: StepTimeConfig, workload: WorkloadConfig) -> dict[str, int]:
    return {
        label: peak_bytes(run_steps, step, workload, config.device, MEMORY_STEPS, device=config.device)
        for label, step in config.contestants.items()
    }


def _evaluate(
    config: StepTimeConfig,
    label: str,
    step: Step,
    seconds: dict[str, list[float]],
    peaks: dict[str, int],
    parameter_bytes: int,
) -> StepTime:
    contestant = config.contestants[label]
    own, every = seconds[label], seconds[config.reference]
    reference = every[:: contestant.stride]
    middle = percentile(own, 50)
    period = max(1, contestant.period // contestant.stride) if contestant.period > 1 else len(own)
    return StepTime(
        contestant=label,
        num_steps=len(own),
        median_seconds=middle,
        mean_ratio=cycle_ratio(own, reference, period),
        median_ratio=middle / percentile(every, 50),
        p99_over_p50=percentile(own, 99) / middle,
        max_over_p50=max(own) / middle,
        state_bytes=step.state_bytes(),
        state_over_parameters=step.state_bytes() / parameter_bytes,
        peak_bytes_above_reference=peaks[label] - peaks[config.reference] if peaks else None,
    )


def write_report(config: StepTimeConfig, results: dict[str, list[StepTime]]) -> Path:
    """JSON and page below ``out``, the small summary in ``keep``; called after every workload."""
    content: dict[str, Any] = provenance(config, config.seed, config.device)
    content["results"] = {name: [asdict(result) for result in found] for name, found in results.items()}
    content["ratios"] = {name: further_ratios(config, found) for name, found in results.items()}
    folder = config.out / config.name
    write_json(folder / "results.json", content)
    if config.keep is not None:
        write_json(config.keep / f"{config.name}.json", content)
    footer = machine_footer(describe_machine(config.device), describe_versions())
    sections = [_section(config, name, found) for name, found in results.items()]
    return write_page(folder / "index.html", f"Step time: {config.name}", sections, footer=footer)


def _section(config: StepTimeConfig, name: str, found: list[StepTime]) -> Section:
    workload = config.workloads[name]
    caption = (
        f"mean / {config.reference}: over whole periods of the intervals, in the same rounds. "
        "State in brackets: multiples of the parameters' bytes. Peak memory in a process of its own."
    )
    bars = bar_figure(
        {result.contestant: result.mean_ratio for result in found},
        y_label=f"mean step time / {config.reference}'s",
        title=name,
    )
    text = [f"{workload.model['name']}, batch {workload.batch_size}, input {workload.input_shape}."]
    table = Table(caption, HEADER, [result.row() for result in found])
    figures = [Figure(bars, "Mean step time as a ratio.")]
    return Section(name, text, [table], figures, notes=ratio_lines(config, found))


if __name__ == "__main__":
    run_command(main)
