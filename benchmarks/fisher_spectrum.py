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

from benchmarks.common.config import LOCAL, parse_arguments
from benchmarks.common.data import DataConfig, Dataset, load_data
from benchmarks.common.figures import COLOURS, figure_png, house_style
from benchmarks.common.models import build_model
from benchmarks.common.page import Figure, Table
from benchmarks.common.tables import text_table
from benchmarks.fisher import nets  # noqa: F401
from benchmarks.fisher.report import Finding, Report, findings_table, verdict, write_report
from benchmarks.fisher.training import SGDConfig, evaluate, train_sgd
from kfac_opt import KFAC
from kfac_opt.fisher import FisherMatrix, SpectralDensity, SpectralErrors, spectral_density

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "fisher_spectrum" / "digits.yaml"
KINDS = ("exact", "mc", "empirical")
BLOCKS = ("full", "layer_wise")
TITLES = {"exact": "exact", "mc": "one sampled label", "empirical": "empirical", "full": "full", "layer_wise": "layer-wise"}
HEADER = ("kind", "blocks", "estimate", "products", "Wasserstein-1 / mean", "trace", "Σλ²", "λ max", "seconds")


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


def main(arguments: Sequence[str] | None = None) -> Report:
    """Trains the net, computes all spectra, prints the table, writes PNG, page, TensorBoard and JSON."""
    config = parse_arguments(SpectrumConfig, arguments, description=__doc__ or "", default=DEFAULT_CONFIG)
    torch.set_num_threads(config.threads)
    report = run(config)
    page = write_report(
        report, config, config.out / config.name, config.keep, seed=config.seed, device=config.device, name=config.name
    )
    for table in report.tables:
        print(text_table(table.header, table.rows), end="\n\n")
    print(f"page: {page}")
    return report


def run(config: SpectrumConfig) -> Report:
    """The experiment without its files."""
    dataset = load_data(config.data, config.data_root).to(config.device)
    model = build_model(config.model, config.seed).to(config.device)
    train_loss = train_sgd(model, dataset, config.training, config.seed)
    _, test_error = evaluate(model, dataset.test_inputs, dataset.test_targets)
    examples = _fisher_examples(config, dataset)
    spectra = [measure(config, model, examples, kind, blocks) for kind, blocks in itertools.product(KINDS, BLOCKS)]
    kfac = kfac_spectrum(model, examples[0])
    return make_report(config, spectra, kfac, train_loss, test_error)


def _fisher_examples(config: SpectrumConfig, dataset: Dataset) -> tuple[Tensor, Tensor]:
    chosen = torch.randperm(len(dataset.train_inputs), generator=torch.Generator().manual_seed(config.seed))
    chosen = chosen[: config.num_fisher].to(dataset.train_inputs.device)
    return dataset.train_inputs[chosen], dataset.train_targets[chosen]


def measure(config: SpectrumConfig, model: nn.Module, examples: tuple[Tensor, Tensor], kind: str, blocks: str) -> Spectrum:
    """All eigenvalues and all estimates of one matrix."""
    start = time.perf_counter()
    fisher = FisherMatrix(
        model,
        examples,
        kind=kind,  # type: ignore[arg-type]
        blocks=blocks,  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(config.seed),
        memory_limit=int(config.memory_gib * 2**30),
    )
    exact = spectral_density(fisher, "exact")
    exact_seconds = time.perf_counter() - start
    estimated = []
    for estimate in config.estimates:
        start = time.perf_counter()
        densities = [_estimate(fisher, estimate, config.seed + seed) for seed in range(config.num_seeds)]
        seconds = (time.perf_counter() - start) / config.num_seeds
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


# -- report -------------------------------------------------------------------------------------------------------


def make_report(
    config: SpectrumConfig, spectra: list[Spectrum], kfac: SpectralDensity, train_loss: float, test_error: float
) -> Report:
    """Tables, figures and findings."""
    table = {(spectrum.kind, spectrum.blocks): spectrum for spectrum in spectra}
    size = spectra[0].exact.size
    full, by_layer = table["exact", "full"].exact, table["exact", "layer_wise"].exact
    report = Report(
        title=f"Spectra of the Fisher matrix: {config.name}",
        text=[
            f"{config.model['name']} with {size} parameters after {config.training.steps} steps of SGD on "
            f"{config.data.name} (training loss {train_loss:.3g}, test error {100 * test_error:.1f} %), matrix over "
            f"{config.num_fisher} training examples. Errors are means over {config.num_seeds} seeds: Wasserstein-1 distance of "
            "the unbroadened measures over the mean eigenvalue ('everything at zero' scores 1), relative errors of trace, "
            "Σλ² and λ max."
        ],
        findings=findings(table),
    )
    report.tables = [
        Table("Estimates against all eigenvalues.", HEADER, [row for spectrum in spectra for row in _rows(spectrum)]),
        findings_table("Ishii & Yokota", report.findings),
    ]
    report.figures = {
        "panels": Figure(_panels(table, axis="linear"), _panel_caption(config)),
        "panels_log": Figure(
            _panels(table, axis="log"),
            "The same matrices per decade of eigenvalue (kernel 0.15 decades): all eigenvalues, and the most accurate "
            "estimate of the table. The legend says which share lies below the axis.",
        ),
        "kfac": Figure(
            _kfac_figure(table, kfac),
            f"K-FAC's Kronecker approximation beside the true matrix: trace {kfac.trace:.3g} against {full.trace:.3g}, "
            f"λ max {kfac.largest:.3g} against {full.largest:.3g} (full) and {by_layer.largest:.3g} (layer-wise).",
        ),
    }
    report.content = {
        "parameters": size,
        "train_loss": train_loss,
        "test_error": test_error,
        "spectra": [_plain(spectrum) for spectrum in spectra],
        "kfac": {"trace": kfac.trace, "largest": kfac.largest, "squares": kfac.moment(2) * size},
    }
    report.scalars = {
        f"wasserstein/{s.kind}/{s.blocks}/{e.estimate.label}": [(0, e.mean("wasserstein"))] for s in spectra for e in s.estimated
    }
    return report


def _rows(spectrum: Spectrum) -> list[list[str]]:
    rows = []
    for found in spectrum.estimated:
        rows.append(
            [
                TITLES[spectrum.kind],
                TITLES[spectrum.blocks],
                found.estimate.label,
                str(found.products),
                f"{found.mean('wasserstein'):.4f}",
                f"{found.mean('trace'):.1e}",
                f"{found.mean('squares'):.1e}",
                f"{found.mean('top'):.1e}",
                f"{found.seconds:.2f}",
            ]
        )
    exact = ["all eigenvalues", "—", "0", "0", "0", "0", f"{spectrum.exact_seconds:.2f}"]
    return [*rows, [TITLES[spectrum.kind], TITLES[spectrum.blocks], *exact]]


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
                "products": found.products,
                "seconds": found.seconds,
                "errors": [asdict(error) for error in found.errors],
            }
            for found in spectrum.estimated
        ],
    }


def findings(table: dict[tuple[str, str], Spectrum]) -> list[Finding]:
    """The study's three findings in numbers."""
    first = {key: spectrum.estimated[0] for key, spectrum in table.items()}
    label = next(iter(first.values())).estimate.label
    distances = [_curve_distance(table[key].exact, found.density) for key, found in first.items()]
    wasserstein = [found.mean("wasserstein") for found in first.values()]
    matches = sum(distance < 0.1 for distance in distances) / len(distances)
    overlap = {kind: _overlap(table["exact", "full"].exact, table[kind, "full"].exact) for kind in ("mc", "empirical")}
    part = all(0.05 < value < 0.95 for value in overlap.values())
    smaller = {kind: table[kind, "layer_wise"].exact.largest / table[kind, "full"].exact.largest for kind in KINDS}
    return [
        Finding(
            "SLQ matches the exact density",
            verdict(matches),
            f"broadened curves of {label} differ by {min(distances):.3f} to {max(distances):.3f} in L1 (of 2), which the eye "
            f"takes for equal; the measures differ by {min(wasserstein):.2f} to {max(wasserstein):.2f} of the mean eigenvalue",
        ),
        Finding(
            "one sampled label and the empirical matrix overlap with the exact one in part",
            verdict(part),
            f"common share of the eigenvalues per decade: {overlap['mc']:.2f} (sampled), {overlap['empirical']:.2f} "
            f"(empirical); traces {_trace_ratio(table, 'mc'):.2f} and {_trace_ratio(table, 'empirical'):.2f} of the exact one",
        ),
        Finding(
            "the layer-wise matrix has the smaller range",
            verdict(sum(value < 1 for value in smaller.values()) / len(smaller)),
            "λ max of layer-wise over full: " + ", ".join(f"{TITLES[kind]} {value:.2f}" for kind, value in smaller.items()),
        ),
    ]


def _trace_ratio(table: dict[tuple[str, str], Spectrum], kind: str) -> float:
    return table[kind, "full"].exact.trace / table["exact", "full"].exact.trace


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


def _panel_caption(config: SpectrumConfig) -> str:
    return (
        f"The study's figure: density of the eigenvalues, all of them (line) and {config.estimates[0].label} (dashed), "
        "Gaussian kernel of 1 % of the range, same grid and kernel for both, logarithmic ordinate."
    )


def _panels(table: dict[tuple[str, str], Spectrum], axis: Literal["linear", "log"]) -> bytes:
    import matplotlib.pyplot as plt

    with house_style():
        figure, axes = plt.subplots(2, 3, figsize=(12, 6.2), sharey=axis == "linear")
        for (row, blocks), (column, kind) in itertools.product(enumerate(BLOCKS), enumerate(KINDS)):
            spectrum, ax = table[kind, blocks], axes[row][column]
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
        return figure_png(figure)


def _kfac_figure(table: dict[tuple[str, str], Spectrum], kfac: SpectralDensity) -> bytes:
    import matplotlib.pyplot as plt

    full, blocks = table["exact", "full"].exact, table["exact", "layer_wise"].exact
    floor = full.default_floor()
    with house_style():
        figure, ax = plt.subplots(figsize=(7, 4.2))
        full.plot(ax, floor=floor, label="exact, full", color=COLOURS[0])
        blocks.plot(ax, floor=floor, label="exact, layer-wise", color=COLOURS[2], linestyle="-.")
        kfac.plot(ax, floor=floor, label="K-FAC", color=COLOURS[1], linestyle="--")
        return figure_png(figure)


if __name__ == "__main__":
    main()
