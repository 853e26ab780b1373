"""What an experiment on weight uncertainty is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.common.config import LOCAL, ConfigError, ExperimentConfig
from benchmarks.common.data import DataConfig
from benchmarks.common.search import SearchConfig, SearchRange

Kind = Literal["sgd", "adamw", "kfac", "kfac_vi", "ivon"]


@dataclass(frozen=True)
class RateSchedule:
    """Learning rate over the training, as a factor of the method's.

    Attributes:
        name: ``constant``, ``cosine`` to zero, or ``polynomial``: ``(1 − t / (T + one epoch))^power`` after the warm-up,
            the rule of the KFAC-VI study.
        warmup_steps: the factor rises linearly from ``initial`` to 1 over so many first steps.
    """

    name: Literal["constant", "cosine", "polynomial"] = "cosine"
    warmup_steps: int = 0
    initial: float = 0.1
    power: float = 2.0

    def factor(self, step: int, num_steps: int, epoch_steps: int) -> float:
        """The factor in force for step ``step`` (from 0) of ``num_steps``."""
        if step < self.warmup_steps:
            return self.initial + (1 - self.initial) * step / self.warmup_steps
        done = step - self.warmup_steps
        if self.name == "constant":
            return 1.0
        if self.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done / max(1, num_steps - self.warmup_steps)))
        return (1 - done / (num_steps + epoch_steps - self.warmup_steps)) ** self.power


@dataclass(frozen=True)
class MethodConfig:
    """One way to train and to predict.

    Attributes:
        kind: the optimizer; ``ivon`` takes part if the package ``ivon-opt`` is installed.
        settings: arguments of its constructor.
        num_samples: weight samples per training step (``kfac_vi``, ``ivon``); 0 trains ``kfac_vi`` at its mean, as K-FAC
            with the study's rules for decay and momentum.
        members: nets of a deep ensemble, each trained alone.
        dropout: share of features dropped before every Linear layer but the first; the ensemble then comes from dropout
            left on (Gal & Ghahramani 2016).
        laplace: ``linearized`` or ``samples``: a K-FAC Laplace posterior after the training, its prior precision that of
            the setting ``laplace_prior``, or chosen by the evidence where there is none.
        schedule: in place of the experiment's.
        search, start: ranges of settings to search, and the first trial.
    """

    kind: Kind
    settings: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 1
    members: int = 1
    dropout: float = 0.0
    laplace: Literal["linearized", "samples"] | None = None
    schedule: RateSchedule | None = None
    search: dict[str, SearchRange] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = 0 if self.kind == "kfac_vi" else 1
        if self.num_samples < least or self.members < 1:
            raise ValueError(f"num_samples must be >= {least}, members >= 1, got {self.num_samples} and {self.members}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.num_samples > 1 and self.kind not in ("kfac_vi", "ivon"):
            raise ValueError(f"num_samples concerns kfac_vi and ivon, not {self.kind}")
        if sum((self.members > 1, self.dropout > 0, self.laplace is not None)) > 1:
            raise ValueError("members, dropout and laplace are three ways to an ensemble; choose one")

    @property
    def cost(self) -> int:
        """Gradients per step, over all nets."""
        return self.members * max(1, self.num_samples)


@dataclass(frozen=True, kw_only=True)
class VIConfig(ExperimentConfig):
    """One experiment.

    Attributes:
        model: ``name`` and arguments of the function in ``benchmarks/common/models.py``.
        epochs: passes over the training data (steps are rounded).
        methods: who takes part.
        predict_samples: draws of an ensemble at test time.
        evaluations: points of the accuracy curves.
        eval_examples: at most so many examples of each set for a point of the curves; None: all.
        angles: rotations of the test images, in degrees, at which the uncertainty is measured.
        unfamiliar: another data set whose inputs should be told apart from the test set.
        search: budget of the search, the same for every method that has ranges; None: no search.
        num_validation: training examples set aside for the search, beyond ``data.num_train``.
        num_seeds: runs, with seeds ``seed, seed + 1, …``.
    """

    data: DataConfig
    model: dict[str, Any]
    methods: dict[str, MethodConfig]
    epochs: float = 15.0
    batch_size: int = 64
    schedule: RateSchedule = field(default_factory=RateSchedule)
    predict_samples: int = 50
    evaluations: int = 15
    eval_examples: int | None = None
    angles: list[float] = field(default_factory=lambda: [0.0, 30.0, 60.0, 90.0, 120.0, 150.0, 180.0])
    unfamiliar: DataConfig | None = None
    search: SearchConfig | None = None
    num_validation: int = 0
    num_seeds: int = 3
    out: Path = field(default=Path("out/kfac_vi"), metadata=LOCAL)
    only: list[str] = field(default_factory=list, metadata=LOCAL)

    def __post_init__(self) -> None:
        for name in ("batch_size", "predict_samples", "evaluations", "num_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.epochs > 0:
            raise ValueError(f"epochs must be > 0, got {self.epochs}")
        unknown = set(self.only) - set(self.methods)
        if unknown:
            raise ConfigError(f"only: unknown methods {sorted(unknown)}; allowed: {', '.join(self.methods)}.")
        if self.search is not None and self.num_validation < 1:
            raise ValueError("a search needs num_validation >= 1: settings must not be chosen on the test set")

    def taking_part(self) -> dict[str, MethodConfig]:
        """The methods of this call: all, or those in ``only``."""
        return {name: method for name, method in self.methods.items() if not self.only or name in self.only}
