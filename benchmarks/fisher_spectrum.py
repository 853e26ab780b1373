"""Spectra of the Fisher matrix of a trained net: the study by Ishii and Yokota, and how accurate each estimate is.

    python -m benchmarks.fisher_spectrum --config configs/fisher_spectrum/cifar10.yaml --data-root data

Six panels (exact, one sampled label, empirical × full, layer-wise) show stochastic Lanczos quadrature over all
eigenvalues; a table holds the Wasserstein error of quadrature, snapped quadrature and block Lanczos; the last figure
sets the spectrum of K-FAC's Kronecker approximation beside the true one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.common.command import run_command
from benchmarks.common.config import LOCAL, ExperimentConfig
from benchmarks.common.data import DataConfig, Dataset, load_data
from benchmarks.common.figures import COLOURS, Figure, finish, subplots
from benchmarks.common.models import build_model
from benchmarks.common.plain_sgd import SGDConfig, train_sgd
from benchmarks.common.report import Finding, Report, Table, findings_table, run_script, verdict
from benchmarks.common.tasks import evaluate
from kfac_opt import KFAC
from kfac_opt.fisher import FisherMatrix, SpectralDensity, SpectralErrors, spectral_density

KINDS = ("exact", "mc", "empirical")
BLOCKS = ("full", "layer_wise")
TITLES = {"exact": "exact", "mc": "one sampled label", "empirical": "empirical", "full": "full", "layer_wise": "layer-wise"}
SAME_CURVE = 0.1
"""L1 distance of two broadened curves below which they count as matching; disjoint ones have 2."""
PART = (0.05, 0.95)
"""Common share of two densities that counts as an overlap in part."""
MAX_PRODUCTS, ACCURATE = 200, 0.01


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


@dataclass(frozen=True, kw_only=True)
class SpectrumConfig(ExperimentConfig):
    """The experiment.

    Attributes:
        num_fisher: training examples that the matrix is taken over.
        estimates: in the table; the first is drawn over the exact density in the six panels.
        num_seeds: of the estimates' random starts.
    """

    data: DataConfig
    model: dict[str, Any]
    training: SGDConfig = field(default_factory=SGDConfig)
    num_fisher: int = 2000
    estimates: list[EstimateConfig] = field(default_factory=list)
    num_seeds: int = 3
    memory_gib: float = 2.0
    out: Path = field(default=Path("out/fisher_spectrum"), metadata=LOCAL)

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


Spectra = dict[tuple[str, str], Spectrum]


def main(arguments: Sequence[str] | None = None) -> Report:
    """Trains the net, computes all spectra and writes the page."""
    return run_script(SpectrumConfig, run, arguments, __doc__ or "", "fisher_spectrum/digits.yaml")


def run(config: SpectrumConfig) -> Report:
    """The experiment without its files."""
    dataset = load_data(config.data, config.data_root).to(config.device)
    model = build_model(config.model, config.seed).to(config.device)
    train_loss = train_sgd(model, dataset, config.training, config.seed)
    test_error = evaluate(model, dataset.test_inputs, dataset.test_targets).error
    examples = fisher_examples(config, dataset)
    table = {
        (kind, blocks): measure(config, model, examples, kind, blocks) for kind, blocks in itertools.product(KINDS, BLOCKS)
    }
    return make_report(config, table, kfac_spectrum(model, examples[0]), train_loss, test_error)


def fisher_examples(config: SpectrumConfig, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """The training examples that the matrix is taken over."""
    chosen = torch.randperm(len(dataset.train_inputs), generator=torch.Generator().manual_seed(config.seed))
    chosen = chosen[: config.num_fisher].to(dataset.train_inputs.device)
    return dataset.train_inputs[chosen], dataset.train_targets[chosen]


def measure(config: SpectrumConfig, model: nn.Module, examples: tuple[Tensor, Tensor], kind: Any, blocks: Any) -> Spectrum:
    """All eigenvalues and all estimates of one matrix; on a CPU in processor time, which other processes do not lengthen."""
    clock = time.process_time if torch.device(config.device).type == "cpu" else time.perf_counter
    start, generator = clock(), torch.Generator().manual_seed(config.seed)
    limit = int(config.memory_gib * 2**30)
    fisher = FisherMatrix(model, examples, kind=kind, blocks=blocks, generator=generator, memory_limit=limit)
    exact = spectral_density(fisher, "exact")
    exact_seconds = clock() - start
    estimated = []
    for estimate in config.estimates:
        start = clock()
        densities = [
            spectral_density(
                fisher,
                estimate.method,
                torch.Generator().manual_seed(config.seed + seed),
                num_probes=estimate.vectors,
                block_size=estimate.vectors,
                num_steps=estimate.steps,
                node_weights=estimate.node_weights,
            )
            for seed in range(config.num_seeds)
        ]
        seconds = (clock() - start) / config.num_seeds
        estimated.append(Estimated(estimate, [density.errors(exact) for density in densities], seconds, densities[0]))
    return Spectrum(kind, blocks, exact, exact_seconds, fisher.route, estimated)


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


def make_report(
    config: SpectrumConfig, table: Spectra, kfac: SpectralDensity, train_loss: float, test_error: float
) -> Report:
    """Tables, figures and findings."""
    full, by_layer = table["exact", "full"].exact, table["exact", "layer_wise"].exact
    found = findings(table)
    names = ("K-FAC", "exact, full", "exact, layer-wise")
    ends = [
        {"matrix": name, "trace": density.trace, "λ max": density.largest}
        for name, density in zip(names, (kfac, full, by_layer), strict=True)
    ]
    return Report(
        title=f"Spectra of the Fisher matrix: {config.name}",
        text=[
            f"{config.model['name']} with {full.size} parameters after {config.training.steps} steps of SGD on "
            f"{config.data.name} (training loss {train_loss:.3g}, test error {test_error:.1%}), matrix over "
            f"{config.num_fisher} training examples. Errors are means over {config.num_seeds} seeds: Wasserstein-1 distance of "
            "the unbroadened measures over the mean eigenvalue ('everything at zero' scores 1), relative errors of trace, "
            "Σλ² and λ max."
        ],
        tables=[
            Table.of("Estimates against all eigenvalues.", [row for spectrum in table.values() for row in _rows(spectrum)]),
            Table.of("K-FAC's Kronecker approximation beside the true matrix.", ends),
            findings_table("Ishii & Yokota", found),
        ],
        findings=found,
        figures={
            "panels": _panels(
                table,
                "linear",
                f"The study's figure: density of the eigenvalues, all of them (line) and {config.estimates[0].label} (dashed), "
                "Gaussian kernel of 1 % of the range, same grid and kernel for both, logarithmic ordinate.",
            ),
            "panels_log": _panels(
                table,
                "log",
                "The same matrices per decade of eigenvalue (kernel 0.15 decades): all eigenvalues, and the most accurate "
                "estimate of the table. The legend says which share lies below the axis.",
            ),
            "kfac": _kfac_figure(full, by_layer, kfac),
        },
        content={
            "parameters": full.size,
            "train_loss": train_loss,
            "test_error": test_error,
            "spectra": [_plain(spectrum) for spectrum in table.values()],
            "kfac": {"trace": kfac.trace, "largest": kfac.largest, "squares": kfac.moment(2) * full.size},
        },
        scalars={
            f"wasserstein/{s.kind}-{s.blocks}-{e.estimate.label}": [(0, e.mean("wasserstein"))]
            for s in table.values()
            for e in s.estimated
        },
    )


def _rows(spectrum: Spectrum) -> list[dict[str, Any]]:
    matrix = {"kind": TITLES[spectrum.kind], "blocks": TITLES[spectrum.blocks]}
    rows = [
        {
            **matrix,
            "estimate": found.estimate.label,
            "products": found.density.num_products,
            "Wasserstein-1 / mean": found.mean("wasserstein"),
            "trace": found.mean("trace"),
            "Σλ²": found.mean("squares"),
            "λ max": found.mean("top"),
            "seconds": found.seconds,
        }
        for found in spectrum.estimated
    ]
    return [*rows, {**matrix, "estimate": "all eigenvalues", "seconds": spectrum.exact_seconds}]


def _plain(spectrum: Spectrum) -> dict[str, Any]:
    exact = spectrum.exact
    return {
        "kind": spectrum.kind,
        "blocks": spectrum.blocks,
        "route": spectrum.route,
        "trace": exact.trace,
        "largest": exact.largest,
        "squares": exact.moment(2) * exact.size,
        "fraction_below": exact.fraction_below(),
        "exact_seconds": spectrum.exact_seconds,
        "estimates": [
            {
                "label": found.estimate.label,
                "products": found.density.num_products,
                "seconds": found.seconds,
                "errors": [asdict(error) for error in found.errors],
            }
            for found in spectrum.estimated
        ],
    }


def findings(table: Spectra) -> list[Finding]:
    """The study's three findings, and the accuracy that was aimed at, in numbers."""
    distances = {
        f"{TITLES[kind]}, {TITLES[blocks]}": _curve_distance(spectrum.exact, spectrum.estimated[0].density)
        for (kind, blocks), spectrum in table.items()
    }
    overlap = {TITLES[kind]: _overlap(table["exact", "full"].exact, table[kind, "full"].exact) for kind in KINDS[1:]}
    ranges = {TITLES[kind]: table[kind, "layer_wise"].exact.largest / table[kind, "full"].exact.largest for kind in KINDS}
    worst: dict[str, float] = {}
    for found in itertools.chain(*(table["exact", blocks].estimated for blocks in BLOCKS)):
        if found.estimate.method == "block_lanczos" and found.density.num_products <= MAX_PRODUCTS:
            error = max(error.wasserstein for error in found.errors)
            worst[found.estimate.label] = max(error, worst.get(found.estimate.label, 0.0))
    return [
        Finding(
            "SLQ matches the exact density",
            f"broadened curves of the first estimate differ by less than {SAME_CURVE:g} in L1 (of 2) in all panels",
            distances,
            verdict(sum(distance < SAME_CURVE for distance in distances.values()) / len(distances)),
        ),
        Finding(
            "one sampled label and the empirical matrix overlap with the exact one in part",
            f"common share of the eigenvalues per decade between {PART[0]:g} and {PART[1]:g}",
            overlap,
            verdict(all(PART[0] < value < PART[1] for value in overlap.values())),
        ),
        Finding(
            "the layer-wise matrix has the smaller range",
            "λ max of layer-wise over full below 1",
            ranges,
            verdict(sum(value < 1 for value in ranges.values()) / len(ranges)),
        ),
        Finding(
            "(not in the study) block Lanczos with 200 products is accurate to 1 % of the mean eigenvalue",
            f"worst seed's Wasserstein-1 of the best block size at most {ACCURATE:g} of the mean, full and layer-wise",
            worst,
            verdict(min(worst.values()) <= ACCURATE if worst else None),
        ),
    ]


def _curve_distance(exact: SpectralDensity, estimate: SpectralDensity) -> float:
    """L1 distance of the broadened curves: same grid, same kernel."""
    sigma = exact.default_sigma
    grid = exact.grid(4000, sigma)
    return float(torch.trapezoid((exact.density(grid, sigma) - estimate.density(grid, sigma)).abs(), grid))


def _overlap(left: SpectralDensity, right: SpectralDensity) -> float:
    """Common share of two densities per decade, of the eigenvalues above the floor; 1 when they are equal."""
    floor = left.default_floor()
    grid = torch.logspace(-12, 6, 4000, dtype=torch.float64) * left.largest
    common = torch.minimum(left.log_density(grid, floor), right.log_density(grid, floor))
    mass = max(1 - left.fraction_below(floor), 1 - right.fraction_below(floor))
    return float(torch.trapezoid(common, grid.log10())) / mass


def _panels(table: Spectra, axis: Literal["linear", "log"], caption: str) -> Figure:
    figure, panels = subplots(2, 3, figsize=(12, 6.2), sharey=axis == "linear")
    for (row, blocks), (column, kind) in itertools.product(enumerate(BLOCKS), enumerate(KINDS)):
        spectrum, ax = table[kind, blocks], panels[row][column]
        found = spectrum.estimated[0]
        if axis == "log":
            found = min(spectrum.estimated, key=lambda e: e.mean("wasserstein"))
        sigma, floor = spectrum.exact.default_sigma, spectrum.exact.default_floor()
        options: dict[str, Any] = {"axis": axis, "sigma": sigma, "floor": floor}
        if axis == "linear":
            options["grid"] = spectrum.exact.grid(1500, sigma)
        spectrum.exact.plot(ax, label="all eigenvalues", color=COLOURS[0], **options)
        found.density.plot(ax, label=found.estimate.label, color=COLOURS[1], linestyle="--", **options)
        ax.set_title(f"{TITLES[kind]}, {TITLES[blocks]}")
        if axis == "linear":
            ax.set_ylim(bottom=1e-6)
        else:
            ax.set_ylim(top=1.35 * ax.get_ylim()[1])  # room for the legend
            ax.legend(loc="upper right", fontsize=8)
    return finish(figure, caption)


def _kfac_figure(full: SpectralDensity, by_layer: SpectralDensity, kfac: SpectralDensity) -> Figure:
    floor = full.default_floor()
    figure, ax = subplots(figsize=(7, 4.2))
    full.plot(ax, floor=floor, label="exact, full", color=COLOURS[0])
    by_layer.plot(ax, floor=floor, label="exact, layer-wise", color=COLOURS[2], linestyle="-.")
    kfac.plot(ax, floor=floor, label="K-FAC", color=COLOURS[1], linestyle="--")
    return finish(figure, "The spectrum of K-FAC's approximation beside the true one.")


if __name__ == "__main__":
    run_command(main)
