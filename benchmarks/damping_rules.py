"""Damping that adapts itself against the best fixed damping of a grid, from starts that are far off.

    python -m benchmarks.damping_rules --config configs/damping_rules/mnist.yaml --data-root ~/data

Stopped at any point, the same command goes on.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.common.command import run_command
from benchmarks.common.config import LOCAL, ConfigError, ExperimentConfig, check_keys, resolved
from benchmarks.common.figures import COLOURS, Curve, Figure, line_figure
from benchmarks.common.optimizers import build_optimizer
from benchmarks.common.report import Report, Table, progress, run_script
from benchmarks.common.results import RunLog
from benchmarks.common.statistics import text
from benchmarks.common.tasks import Task, TaskConfig
from benchmarks.common.train import Loop
from kfac_opt.damping import DampingRule, ExponentialDamping, LevenbergMarquardt, LinearDamping, TrustRegionDamping

RULES: dict[str, Callable[..., DampingRule]] = {
    "levenberg_marquardt": LevenbergMarquardt,
    "trust_region": TrustRegionDamping,
    "exponential": ExponentialDamping,
    "linear": LinearDamping,
}


@dataclass(frozen=True)
class RuleConfig:
    """One rule: its ``kind``, and ``options`` of its constructor."""

    kind: Literal["levenberg_marquardt", "trust_region", "exponential", "linear"]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RulesConfig(ExperimentConfig):
    """Adaptive damping against the best fixed damping of a grid, everything else the same.

    Attributes:
        kfac: settings of KFAC that all runs share (all but ``damping``).
        lr_decay: share of the learning rate that a linear decay has taken away by the last step.
        dampings: the grid of fixed values. ``starts``: where every rule starts.
        tuned: settings of further fixed runs, by name, with ``damping`` and ``lr_decay`` of their own: what a sweep with a
            search at every damping found.
        num_seeds: runs of each, with seeds ``seed, seed + 1, …``.
        read_interval: steps that one point of the curves averages.
    """

    task: TaskConfig
    kfac: dict[str, Any] = field(default_factory=dict)
    lr_decay: float = 0.0
    dampings: list[float] = field(default_factory=lambda: [10.0**power for power in range(-5, 3)])
    starts: list[float] = field(default_factory=lambda: [1e-3, 1e1])
    rules: dict[str, RuleConfig] = field(default_factory=dict)
    tuned: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_seeds: int = 5
    read_interval: int = 10
    out: Path = field(default=Path("out/damping_rules"), metadata=LOCAL)

    def __post_init__(self) -> None:
        if self.num_seeds < 1 or self.read_interval < 1:
            raise ValueError(f"num_seeds and read_interval must be >= 1, got {self.num_seeds} and {self.read_interval}")
        if not 0.0 <= self.lr_decay <= 1.0:
            raise ValueError(f"lr_decay must be in [0, 1], got {self.lr_decay}")
        if "damping" in self.kfac:
            raise ConfigError("key 'kfac.damping' is not allowed: give 'dampings' and 'starts'.")
        for name, rule in self.rules.items():
            allowed = [key for key in inspect.signature(RULES[rule.kind]).parameters if key != "optimizer"]
            check_keys(rule.options, allowed, f"rules.{name}.options")
        if not self.dampings or any(not 0 < damping < math.inf for damping in [*self.dampings, *self.starts]):
            raise ConfigError(f"keys 'dampings' and 'starts' must hold finite numbers > 0, got {self.dampings}, {self.starts}.")


@dataclass(frozen=True)
class Line:
    """One line of the comparison: a fixed damping (no rule), or a rule with its start."""

    name: str
    damping: float
    rule: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    lr_decay: float = 0.0


@dataclass
class RuleRun:
    """One run.

    Attributes:
        final_loss, test_error: at the end; infinite and nan when it broke off.
        area: mean mini-batch loss over the run.
        curve, dampings: mini-batch loss, and damping, averaged over ``read_interval`` steps (damping: the last).
        step_seconds: of forward, backward and step; ``rule_seconds`` of the rule.
    """

    final_loss: float = math.inf
    test_error: float = math.nan
    area: float = math.inf
    curve: list[float] = field(default_factory=list)
    dampings: list[float] = field(default_factory=list)
    step_seconds: float = 0.0
    rule_seconds: float = 0.0

    @classmethod
    def restore(cls, content: dict[str, Any]) -> RuleRun:
        """From a line of the log, where numbers that were not finite are None."""
        missing = {"final_loss": math.inf, "area": math.inf, "test_error": math.nan}
        return cls(**{**content, **{key: value for key, value in missing.items() if content[key] is None}})


def lines(config: RulesConfig) -> list[Line]:
    """All lines: the fixed grid, the tuned runs, every rule from every start."""
    found = [Line(f"fixed {d:.0e}", d, None, dict(config.kfac), config.lr_decay) for d in config.dampings]
    for name, settings in config.tuned.items():
        own = dict(settings)
        decay, damping = float(own.pop("lr_decay", 0.0)), float(own.pop("damping"))
        found.append(Line(name, damping, None, {**config.kfac, **own}, decay))
    for name in config.rules:
        found += [Line(f"{name} from {s:.0e}", s, name, dict(config.kfac), config.lr_decay) for s in config.starts]
    return found


def main(arguments: Sequence[str] | None = None) -> Report:
    """Runs what is missing and writes page and summary."""
    return run_script(RulesConfig, run, arguments, "Adaptive damping against the best fixed damping.", None)


def run(config: RulesConfig) -> Report:
    """All runs, and what they come to."""
    return make_report(config, run_lines(config))


def run_lines(config: RulesConfig) -> dict[str, list[RuleRun]]:
    """All runs by line; those that an earlier command finished are read from the log."""
    log, task = RunLog(config.folder / "runs.jsonl"), Task(config.task, config.data_root, config.device)
    runs: dict[str, list[RuleRun]] = {line.name: [] for line in lines(config)}
    with progress(len(runs) * config.num_seeds, config.name) as display:
        for seed in range(config.seed, config.seed + config.num_seeds):
            for line in lines(config):
                rule = None if line.rule is None else resolved(config.rules[line.rule])
                identity = [resolved(config.task), asdict(line), rule, seed, config.read_interval, config.device]
                content = log.get(identity, lambda: asdict(train_line(config, task, line, seed)), line=line.name, seed=seed)  # noqa: B023
                runs[line.name].append(RuleRun.restore(content))
                display.update()
    return runs


def train_line(config: RulesConfig, task: Task, line: Line, seed: int) -> RuleRun:
    """One run; a divergence is a result."""
    model = task.build_model(seed).train()
    optimizer: Any = build_optimizer("kfac", model, {**line.settings, "damping": line.damping}, task.config.likelihood, seed)
    rule: Any = None
    if line.rule is not None:
        chosen = config.rules[line.rule]
        rule = RULES[chosen.kind](optimizer, **chosen.options)
    run, losses, num_steps = RuleRun(), [], task.config.steps
    decay = line.lr_decay / num_steps
    loop = Loop(model, optimizer, task.batches(seed), task.loss, num_steps, lambda step: 1.0 - decay * step)
    for done, loss in loop:
        losses.append(loss)
        if loop.broken_step is not None:
            break
        with loop.stopped():
            started = time.perf_counter()
            if isinstance(rule, LevenbergMarquardt):
                rule.step(loss, lambda: task.loss(model(loop.batch[0]), loop.batch[1]))
            elif rule is not None:
                rule.step()
            run.rule_seconds += time.perf_counter() - started
        if done % config.read_interval == 0:
            run.curve.append(float(torch.stack(losses[-config.read_interval :]).mean()))
            run.dampings.append(float(optimizer.param_groups[0]["damping"]))
        if run.curve and not math.isfinite(run.curve[-1]):
            break
    else:
        run.area = float(torch.stack(losses).mean())
        run.final_loss = task.evaluate(model, "train").loss
        run.test_error = task.evaluate(model, "test").error
    run.step_seconds = loop.seconds
    optimizer.detach()
    return run


def make_report(config: RulesConfig, runs: dict[str, list[RuleRun]]) -> Report:
    """Table, curves, and the numbers behind them."""
    every = lines(config)
    fixed = [line for line in every if line.rule is None and line.name not in config.tuned]
    best = min(fixed, key=lambda line: _median(runs[line.name], "final_loss"))
    best_area = min(fixed, key=lambda line: _median(runs[line.name], "area"))
    targets = (_median(runs[best.name], "final_loss"), _median(runs[best.name], "area"))
    caption = (
        f"Medians over {config.num_seeds} seeds (lowest to highest); relative: to the fixed damping with the lowest final "
        f"loss, {best.damping:.0e} (the lowest area has {best_area.damping:.0e}). Area: mean mini-batch loss over the run. "
        "Extra time: of the rule, relative to forward, backward and step."
    )
    shown = [line for line in every if line is best or line.rule is not None or line.name in config.tuned]
    shown = [line for line in shown if math.isfinite(_median(runs[line.name], "final_loss"))]
    return Report(
        title=f"Adaptive damping: {config.name}",
        text=[
            f"{config.task.steps} steps of batch {config.task.batch_size} on {config.task.data.name}; every run has the same "
            "settings except for the damping: " + ", ".join(f"{key} {value}" for key, value in config.kfac.items()) + "."
        ],
        tables=[Table.of(caption, [_row(line, runs[line.name], targets) for line in every])],
        figures={
            "learning_curves": _curves("Training loss", config, runs, shown, "curve", "training loss in nats"),
            "dampings": _curves("Damping", config, runs, shown, "dampings", "damping"),
        },
        content={"best_fixed": best.name, "lines": {line.name: _numbers(runs[line.name], targets) for line in every}},
    )


def _median(runs: list[RuleRun], key: str) -> float:
    return float(np.median([math.inf if math.isnan(value := getattr(run, key)) else value for run in runs]))


def _numbers(runs: list[RuleRun], targets: tuple[float, float]) -> dict[str, Any]:
    return {
        "final_loss": [run.final_loss for run in runs],
        "area": [run.area for run in runs],
        "test_error": [run.test_error for run in runs],
        "relative_final_loss": _median(runs, "final_loss") / targets[0],
        "relative_area": _median(runs, "area") / targets[1],
        "extra_time": sum(run.rule_seconds for run in runs) / max(1e-12, sum(run.step_seconds for run in runs)),
        "final_damping": [run.dampings[-1] if run.dampings else None for run in runs],
    }


def _row(line: Line, runs: list[RuleRun], targets: tuple[float, float]) -> dict[str, Any]:
    numbers, finals = _numbers(runs, targets), sorted(run.final_loss for run in runs)
    return {
        "damping": line.name,
        "final loss": f"{text(_median(runs, 'final_loss'))} ({text(finals[0])} to {text(finals[-1])})",
        "final loss, relative": numbers["relative_final_loss"],
        "area": _median(runs, "area"),
        "area, relative": numbers["relative_area"],
        "test error %": 100 * _median(runs, "test_error"),
        "extra time %": "" if line.rule is None else 100 * numbers["extra_time"],
        "diverged": sum(math.isinf(value) for value in finals),
    }


def _curves(
    what: str, config: RulesConfig, runs: dict[str, list[RuleRun]], shown: list[Line], key: str, y_label: str
) -> Figure:
    curves, kinds = [], list(config.rules)
    for line in shown:
        values = np.array([getattr(run, key) for run in runs[line.name] if math.isfinite(run.final_loss)])
        steps = [config.read_interval * (index + 1) for index in range(values.shape[1])]
        colour = "#000000" if line.rule is None else COLOURS[kinds.index(line.rule) % len(COLOURS)]
        style = ":" if line.name in config.tuned else "-" if line.rule is None or line.damping == config.starts[0] else "--"
        curves.append(Curve(line.name, steps, np.median(values, 0), values.min(0), values.max(0), colour, style))
    return line_figure(f"{what} over the run: median over seeds.", curves, x_label="step", y_label=y_label, beside=True)


if __name__ == "__main__":
    run_command(main)
