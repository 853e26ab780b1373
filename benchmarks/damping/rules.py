"""Runs with adaptive damping beside runs with every fixed damping of a grid."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.common.config import LOCAL, ConfigError, check_keys, resolved
from benchmarks.common.optimizers import build_optimizer
from benchmarks.common.progress import progress
from benchmarks.common.results import append_json_line, fingerprint, read_json_lines
from benchmarks.common.tasks import Task, TaskConfig
from kfac_opt._curvature.linalg import FactorizationError
from kfac_opt.damping import DampingRule, ExponentialDamping, LevenbergMarquardt, LinearDamping, TrustRegionDamping

RULES: dict[str, Callable[..., DampingRule]] = {
    "levenberg_marquardt": LevenbergMarquardt,
    "trust_region": TrustRegionDamping,
    "exponential": ExponentialDamping,
    "linear": LinearDamping,
}


@dataclass(frozen=True)
class RuleConfig:
    """One rule.

    Attributes:
        kind: which one. ``options``: arguments of its constructor.
    """

    kind: Literal["levenberg_marquardt", "trust_region", "exponential", "linear"]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RulesConfig:
    """Adaptive damping against the best fixed damping of a grid, everything else the same.

    Attributes:
        kfac: settings of KFAC that all runs share (all but ``damping``).
        schedule: ``lr_decay``: share of the learning rate that a linear decay has taken away by the last step.
        dampings: the grid of fixed values. ``starts``: where every rule starts.
        tuned: settings of further fixed runs, by name, with ``damping`` and ``lr_decay`` of their own: what a sweep with a
            search at every damping found.
        num_seeds: runs of each, with seeds ``seed, seed + 1, …``.
        read_interval: steps that one point of the curves averages.
    """

    name: str
    task: TaskConfig
    kfac: dict[str, Any] = field(default_factory=dict)
    lr_decay: float = 0.0
    dampings: list[float] = field(default_factory=lambda: [10.0**power for power in range(-5, 3)])
    starts: list[float] = field(default_factory=lambda: [1e-3, 1e1])
    rules: dict[str, RuleConfig] = field(default_factory=dict)
    tuned: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_seeds: int = 5
    seed: int = 0
    read_interval: int = 10
    threads: int = 1
    device: str = "cpu"
    data_root: Path = field(default=Path("data"), metadata=LOCAL)
    out: Path = field(default=Path("out/damping_rules"), metadata=LOCAL)
    keep: Path | None = field(default=None, metadata=LOCAL)

    def __post_init__(self) -> None:
        if self.num_seeds < 1 or self.read_interval < 1:
            raise ValueError(f"num_seeds and read_interval must be >= 1, got {self.num_seeds} and {self.read_interval}")
        if not 0.0 <= self.lr_decay <= 1.0:
            raise ValueError(f"lr_decay must be in [0, 1], got {self.lr_decay}")
        if "damping" in self.kfac:
            raise ConfigError("key 'kfac.damping' is not allowed: give 'dampings' and 'starts'.")
        for name, rule in self.rules.items():
            check_keys(rule.options, _options_of(rule.kind), f"rules.{name}.options")
        if not self.dampings or any(not 0 < damping < math.inf for damping in [*self.dampings, *self.starts]):
            raise ConfigError(f"keys 'dampings' and 'starts' must hold finite numbers > 0, got {self.dampings}, {self.starts}.")

    @property
    def folder(self) -> Path:
        """Where this comparison writes."""
        return self.out / self.name


def _options_of(kind: str) -> list[str]:
    import inspect

    return [name for name in inspect.signature(RULES[kind]).parameters if name != "optimizer"]


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


def run_rules(config: RulesConfig) -> dict[str, list[RuleRun]]:
    """All runs by the name of their line; those that an earlier command finished are read from the log."""
    torch.set_num_threads(config.threads)
    log = config.folder / "runs.jsonl"
    known = {entry["identity"]: entry["run"] for entry in read_json_lines(log)}
    wanted = [(line, config.seed + number) for number in range(config.num_seeds) for line in lines(config)]
    identities = [_identity(config, line, seed) for line, seed in wanted]
    found: dict[str, list[RuleRun]] = {}
    task: Task | None = None
    done = sum(identity in known for identity in identities)
    with progress(len(wanted), config.name, done=done) as display:
        for (line, seed), identity in zip(wanted, identities, strict=True):
            if identity not in known:
                task = task or Task(config.task, config.data_root, config.device)
                known[identity] = asdict(train_line(config, task, line, seed))
                append_json_line(log, {"identity": identity, "line": line.name, "seed": seed, "run": known[identity]})
                display.advance(note=line.name)
            found.setdefault(line.name, []).append(_restore(known[identity]))
    return found


def _identity(config: RulesConfig, line: Line, seed: int) -> str:
    rule = None if line.rule is None else resolved(config.rules[line.rule])
    return fingerprint([resolved(config.task), asdict(line), rule, seed, config.read_interval, config.device])


def _restore(content: dict[str, Any]) -> RuleRun:
    run = RuleRun(**content)
    run.final_loss = math.inf if run.final_loss is None else run.final_loss
    run.area = math.inf if run.area is None else run.area
    run.test_error = math.nan if run.test_error is None else run.test_error
    return run


def train_line(config: RulesConfig, task: Task, line: Line, seed: int) -> RuleRun:
    """One run; a divergence is a result."""
    model = task.build_model(seed)
    model.train()
    optimizer = build_optimizer("kfac", model, {**line.settings, "damping": line.damping}, task.config.likelihood, seed)
    rule = None
    if line.rule is not None:
        chosen = config.rules[line.rule]
        rule = RULES[chosen.kind](optimizer, **chosen.options)
    rate = optimizer.param_groups[0]["lr"]
    batches, losses, run = task.batches(seed), [], RuleRun()
    for step in range(task.config.steps):
        inputs, targets = next(batches)
        started = time.perf_counter()
        optimizer.param_groups[0]["lr"] = rate * (1.0 - line.lr_decay * step / task.config.steps)
        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets)
        loss.backward()
        try:
            optimizer.step()
        except FactorizationError:
            break
        stepped = time.perf_counter()
        if rule is not None:
            _apply(rule, loss.detach(), lambda x=inputs, y=targets: task.loss(model(x), y))
        run.rule_seconds += time.perf_counter() - stepped
        run.step_seconds += stepped - started
        losses.append(loss.detach())
        if (step + 1) % config.read_interval == 0:
            mean = float(torch.stack(losses[-config.read_interval :]).mean())
            run.curve.append(mean)
            run.dampings.append(float(optimizer.param_groups[0]["damping"]))
            if not math.isfinite(mean):
                break
    else:
        run.area = float(torch.stack(losses).mean())
        run.final_loss = task.evaluate(model, "train").loss
        run.test_error = task.evaluate(model, "test").error
    optimizer.detach()  # type: ignore[attr-defined]
    return run


def _apply(rule: DampingRule, loss: Tensor, closure: Callable[[], Tensor]) -> None:
    if isinstance(rule, LevenbergMarquardt):
        rule.step(loss, closure)
    else:
        rule.step()  # type: ignore[attr-defined]
