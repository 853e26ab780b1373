"""What a damping sweep is: the grid, the search at each point of it, the budget, what is recorded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common.config import LOCAL, ConfigError, ExperimentConfig, check_keys, resolved
from benchmarks.common.optimizers import OPTIMIZERS
from benchmarks.common.results import fingerprint
from benchmarks.common.search import OptimizerConfig, SearchRange, check_heartbeat
from benchmarks.common.tasks import TaskConfig

SEARCHED = ("lr", "lr_decay", "momentum")
DAMPED = ("kfac", "ekfac")  # optimizers that have a damping


@dataclass(frozen=True)
class HistogramConfig:
    """Histograms of the squared mini-batch gradient, per layer.

    Attributes:
        interval: steps between histograms.
        low, high, width: bins of log10, ``width`` decades each; exact zeros are counted in a bin of their own, what
            is outside goes to the outermost bins.
        dampings: whose histograms the page shows.
    """

    interval: int = 60
    low: float = -24.0
    high: float = 4.0
    width: float = 0.5
    dampings: list[float] = field(default_factory=lambda: [1e-2, 1e0, 1e2])

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"histogram: interval must be >= 1, got {self.interval}")
        if not self.low < self.high or not self.width > 0:
            raise ValueError(f"histogram: need low < high and width > 0, got {self.low}, {self.high}, {self.width}")

    @property
    def num_bins(self) -> int:
        """Bins between ``low`` and ``high``."""
        return round((self.high - self.low) / self.width)


@dataclass(frozen=True)
class Setting:
    """One line of the study: an optimizer, with a damping unless it has none."""

    optimizer: str
    damping: float | None = None

    @property
    def key(self) -> str:
        """How it is called in files."""
        return self.optimizer if self.damping is None else f"{self.optimizer}-{self.damping:.0e}"

    @property
    def label(self) -> str:
        """``SGD``, or the optimizer's name with the damping."""
        name = self.optimizer.upper() if len(self.optimizer) <= 5 else self.optimizer.replace("_", " ")
        return name if self.damping is None else f"{name} γ = {self.damping:.0e}"


def _default_search() -> dict[str, SearchRange]:
    ranges = (SearchRange(1e-4, 100.0, log=True), SearchRange(0.0, 1.0), SearchRange(0.0, 0.99))
    return dict(zip(SEARCHED, ranges, strict=True))


@dataclass(frozen=True, kw_only=True)
class SweepConfig(ExperimentConfig):
    """One sweep over damping.

    Attributes:
        dampings: the grid; each value gets a search of its own with ``num_trials`` trials.
        optimizers: their fixed settings, and ranges where they differ from those of the sweep. Those in ``without_damping``
            take part once, the others at every damping.
        search: ranges of ``lr``, ``momentum`` and ``lr_decay`` (the share of the learning rate that a linear decay has
            taken away by the last step).
        num_trials: of each setting. ``num_kept``: so many with the lowest final training loss make the mean curve.
        num_startup: random trials before the sampler models the loss.
        seed: of the sampler. ``training_seed``: trial k of every setting trains with this plus k.
        divergence_factor: a trial whose mini-batch loss, averaged over ``read_interval`` steps, is not finite or
            above this many times its first one has diverged and stops; so has one that ends above its initial loss.
        read_interval: steps between readings of the loss, and the resolution of the learning curves.
        heartbeat_seconds, grace_seconds: of optuna's heartbeat; a trial that is silent for longer is run again.
        num_spectra: best runs of each damping that are trained once more to follow their eigenvalues.
        workers: processes on this machine; with several GPUs each has its own.
        storage: database URL (sqlite, postgresql, mysql) or a path: ``*.journal`` for a journal file, else SQLite;
            None: an SQLite file below ``out``.
    """

    task: TaskConfig
    dampings: list[float] = field(default_factory=lambda: [10.0**power for power in range(-5, 3)])
    optimizers: dict[str, OptimizerConfig] = field(default_factory=lambda: {"sgd": OptimizerConfig(), "kfac": OptimizerConfig()})
    without_damping: list[str] = field(default_factory=lambda: ["sgd"])
    search: dict[str, SearchRange] = field(default_factory=_default_search)
    num_trials: int = 300
    num_kept: int = 100
    num_startup: int = 20
    training_seed: int = 0
    divergence_factor: float = 10.0
    read_interval: int = 10
    histogram: HistogramConfig = field(default_factory=HistogramConfig)
    num_spectra: int = 3
    tensorboard: bool = True
    workers: int = field(default=1, metadata=LOCAL)
    heartbeat_seconds: int = field(default=5, metadata=LOCAL)
    grace_seconds: int = field(default=20, metadata=LOCAL)
    storage: str | None = field(default=None, metadata=LOCAL)
    out: Path = field(default=Path("out/damping_sweep"), metadata=LOCAL)

    def __post_init__(self) -> None:
        for key in ("num_trials", "num_kept", "num_startup", "workers", "threads", "read_interval"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be >= 1, got {getattr(self, key)}")
        check_heartbeat(self.heartbeat_seconds, self.grace_seconds)
        if self.num_kept > self.num_trials:
            raise ValueError(f"num_kept must be at most num_trials ({self.num_trials}), got {self.num_kept}")
        if not 1 < self.divergence_factor < math.inf:
            raise ValueError(f"divergence_factor must be a finite number > 1, got {self.divergence_factor}")
        self._check_grid()
        check_keys({key: 0 for own in self.optimizers.values() for key in own.search}, SEARCHED, "optimizers.search")
        check_keys(self.search, SEARCHED, "search")
        for key in SEARCHED:
            if key not in self.search:
                raise ConfigError(f"key 'search.{key}' is missing; all of {', '.join(SEARCHED)} are searched.")

    def _check_grid(self) -> None:
        if not self.optimizers:
            raise ConfigError("key 'optimizers' must name at least one optimizer.")
        for name in self.optimizers:
            if self.kind(name) not in OPTIMIZERS:
                raise ConfigError(
                    f"optimizers: unknown optimizer '{self.kind(name)}'; allowed: {', '.join(OPTIMIZERS)} (a variant "
                    "under another key says which one it is with 'kind')."
                )
            if name not in self.without_damping and self.kind(name) not in DAMPED:
                raise ConfigError(
                    f"key 'without_damping' must name '{name}', which has no damping; only {', '.join(DAMPED)} have one."
                )
        for name in self.without_damping:
            if name not in self.optimizers:
                raise ConfigError(
                    f"key 'without_damping' names '{name}', which is not among the optimizers {', '.join(self.optimizers)}."
                )
        for damping in self.dampings:
            if not 0 < damping < math.inf:
                raise ConfigError(f"key 'dampings' must hold finite numbers > 0, got {damping:g}.")
        if len(set(self.dampings)) != len(self.dampings):
            raise ConfigError(f"key 'dampings' must hold different numbers, got {self.dampings}.")

    def kind(self, name: str) -> str:
        """The optimizer to build for the key ``name`` of ``optimizers``."""
        return self.optimizers[name].kind or name

    @property
    def damped(self) -> list[str]:
        """Keys of the optimizers that have a damping."""
        return [name for name in self.optimizers if name not in self.without_damping]

    def settings(self) -> list[Setting]:
        """The lines of the study in the order of the pictures: those without damping first."""
        plain = [Setting(name) for name in self.optimizers if name in self.without_damping]
        return plain + [Setting(name, damping) for name in self.damped for damping in sorted(self.dampings)]

    def ranges(self, setting: Setting) -> dict[str, SearchRange]:
        """Search ranges of a setting."""
        return {**self.search, **self.optimizers[setting.optimizer].search}

    def shows_histogram(self, damping: float | None) -> bool:
        """Whether the page shows the gradients at this damping."""
        return damping is not None and any(math.isclose(damping, shown) for shown in self.histogram.dampings)

    def study_name(self, setting: Setting) -> str:
        """Another task, range or seed is another study: old trials must not be taken for new ones.

        The number of trials is not part of the name: a larger budget goes on where the smaller one ended.
        """
        identity = [resolved(self.task), resolved(self.optimizers[setting.optimizer]), resolved(self.ranges(setting))]
        identity += [self.num_startup, self.seed, self.training_seed, self.divergence_factor, self.read_interval]
        return f"{self.name}-{setting.key}-{fingerprint([*identity, self.histogram.interval, self.device])}"
