"""Spectra of one net's Fisher matrices: all eigenvalues, and what each estimate makes of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.common.config import LOCAL
from benchmarks.common.data import DataConfig, Dataset
from benchmarks.fisher.training import SGDConfig
from kfac_opt import KFAC
from kfac_opt.fisher import FisherMatrix, SpectralDensity, SpectralErrors, spectral_density

KINDS = ("exact", "mc", "empirical")
BLOCKS = ("full", "layer_wise")
TITLES = {"exact": "exact", "mc": "one sampled label", "empirical": "empirical", "full": "full", "layer_wise": "layer-wise"}


@dataclass(frozen=True)
class EstimateConfig:
    """One way to estimate the density; several seeds."""

    method: Literal["slq", "block_lanczos"]
    vectors: int
    steps: int
    node_weights: Literal["quadrature", "snapped"]

    @property
    def label(self) -> str:
        """For tables."""
        name = "SLQ" if self.method == "slq" else "block Lanczos"
        return f"{name} {self.vectors} × {self.steps}" + (", snapped" if self.node_weights == "snapped" else "")


@dataclass(frozen=True)
class SpectrumConfig:
    """The experiment.

    Attributes:
        num_fisher: training examples that the matrix is taken over.
        estimates: in the table; the first is drawn over the exact density in the six panels.
        num_seeds: of the estimates' random starts.
        panel_seed: whose estimate is drawn.
    """

    name: str
    data: DataConfig
    model: dict[str, Any]
    training: SGDConfig = field(default_factory=SGDConfig)
    num_fisher: int = 2000
    estimates: list[EstimateConfig] = field(default_factory=list)
    num_seeds: int = 3
    threads: int = 1
    device: str = "cpu"
    seed: int = 0
    memory_gib: float = 2.0
    data_root: Path = field(default=Path("data"), metadata=LOCAL)
    out: Path = field(default=Path("out/fisher_spectrum"), metadata=LOCAL)
    keep: Path | None = field(default=None, metadata=LOCAL)

    def __post_init__(self) -> None:
        if self.num_fisher < 1 or self.num_seeds < 1 or not self.estimates:
            raise ValueError(
                f"num_fisher and num_seeds must be >= 1 and estimates not empty, got {self.num_fisher}, {self.num_seeds} "
                f"and {len(self.estimates)} estimates"
            )


@dataclass(frozen=True)
class Estimated:
    """One estimate of one matrix: errors for each seed, and the density of the first."""

    estimate: EstimateConfig
    errors: list[SpectralErrors]
    seconds: float
    products: int
    density: SpectralDensity

    def mean(self, field_name: str) -> float:
        """Mean of one error over the seeds."""
        return sum(getattr(error, field_name) for error in self.errors) / len(self.errors)


@dataclass(frozen=True)
class Spectrum:
    """One matrix: all eigenvalues (``exact_seconds`` with making the matrix) and their estimates."""

    kind: str
    blocks: str
    exact: SpectralDensity
    exact_seconds: float
    route: str
    estimated: list[Estimated]


def fisher_examples(config: SpectrumConfig, dataset: Dataset) -> tuple[Tensor, Tensor]:
    chosen = torch.randperm(len(dataset.train_inputs), generator=torch.Generator().manual_seed(config.seed))
    chosen = chosen[: config.num_fisher].to(dataset.train_inputs.device)
    return dataset.train_inputs[chosen], dataset.train_targets[chosen]


def measure(config: SpectrumConfig, model: nn.Module, examples: tuple[Tensor, Tensor], kind: str, blocks: str) -> Spectrum:
    """All eigenvalues and all estimates of one matrix; on a CPU in processor time, which other processes do not lengthen."""
    clock = time.process_time if torch.device(config.device).type == "cpu" else time.perf_counter
    start = clock()
    fisher = FisherMatrix(
        model,
        examples,
        kind=kind,  # type: ignore[arg-type]
        blocks=blocks,  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(config.seed),
        memory_limit=int(config.memory_gib * 2**30),
    )
    exact = spectral_density(fisher, "exact")
    exact_seconds = clock() - start
    estimated = []
    for estimate in config.estimates:
        start = clock()
        densities = [_estimate(fisher, estimate, config.seed + seed) for seed in range(config.num_seeds)]
        seconds = (clock() - start) / config.num_seeds
        errors = [density.errors(exact) for density in densities]
        estimated.append(Estimated(estimate, errors, seconds, densities[0].num_products, densities[0]))
    return Spectrum(kind, blocks, exact, exact_seconds, fisher.route, estimated)


def _estimate(fisher: FisherMatrix, estimate: EstimateConfig, seed: int) -> SpectralDensity:
    return spectral_density(
        fisher,
        estimate.method,
        torch.Generator().manual_seed(seed),
        num_probes=estimate.vectors,
        block_size=estimate.vectors,
        num_steps=estimate.steps,
        node_weights=estimate.node_weights,
    )


def kfac_spectrum(model: nn.Module, inputs: Tensor) -> SpectralDensity:
    """Eigenvalues of K-FAC's approximation (exact Fisher, all of ``inputs`` in one pass), as a running KFAC has them."""
    optimizer = KFAC(model, lr=0.0, fisher="exact", momentum=0.0, damping=1.0)
    try:
        model.train()
        model(inputs)
        optimizer.zero_grad()
        optimizer.step()
        return spectral_density(optimizer.curvature)
    finally:
        optimizer.detach()
