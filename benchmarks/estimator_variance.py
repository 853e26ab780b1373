"""How noisy is a Fisher matrix from sampled labels? Variance against labels, width and weight norm (Soen & Sun 2021).

    python -m benchmarks.estimator_variance --config configs/estimator_variance/mnist.yaml --data-root data

Everything is computed in closed form, for both estimators (outer products of the scores, and the Hessian with sampled
labels), and held against matrices from really sampled labels.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common.config import LOCAL, parse_arguments
from benchmarks.common.data import DataConfig, Dataset, load_data
from benchmarks.common.figures import COLOURS, figure_png, house_style
from benchmarks.common.models import build_model
from benchmarks.common.page import Figure, Table
from benchmarks.common.progress import progress
from benchmarks.common.tables import text_table
from benchmarks.fisher.report import Finding, Report, findings_table, verdict, write_report
from benchmarks.fisher.training import SGDConfig, evaluate, train_sgd
from kfac_opt.fisher import EstimatorVariance, FisherMatrix, decay_for, effective_labels, estimator_variance

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "estimator_variance" / "digits.yaml"
LAYER_HEADER = (
    "layer", "√Var / ‖F‖, one label", "with the average", "labels for 10 %", "factor_decay for 10 %", "‖Cov‖ / bound",
    "‖∂h/∂W‖ / bound",
)  # fmt: skip


@dataclass(frozen=True)
class VarianceConfig:
    """The experiment.

    Attributes:
        hidden: widths of the hidden layers of the net that is looked at closely (an MLP on the flattened images).
        activation: of all nets.
        num_inputs: inputs that the variance is that of, as one mini-batch.
        labels: values of ``m``.
        num_draws: matrices from sampled labels per ``m`` and per decay, for the check.
        factor_decay, label_samples: of an optimizer, for the numbers of the table.
        decays: values of ``factor_decay`` whose running average of sampled matrices is checked.
        widths: of two hidden layers, at initialisation; I1 over ``num_width_seeds`` initialisations.
        norms: factors on all weights of the trained net.
        snapshots: numbers of training steps at which the trained net is looked at.
        num_probes: random vectors per layer for the second estimator of large nets.
    """

    name: str
    data: DataConfig
    hidden: list[int]
    activation: str = "relu"
    training: SGDConfig = field(default_factory=SGDConfig)
    num_inputs: int = 32
    labels: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    num_draws: int = 2000
    factor_decay: float = 0.95
    label_samples: int = 1
    decays: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.8, 0.95])
    widths: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    num_width_seeds: int = 5
    norms: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0])
    snapshots: list[int] = field(default_factory=lambda: [0, 10, 30, 100, 300, 1000])
    num_probes: int = 20
    threads: int = 1
    device: str = "cpu"
    seed: int = 0
    data_root: Path = field(default=Path("data"), metadata=LOCAL)
    out: Path = field(default=Path("out/estimator_variance"), metadata=LOCAL)
    keep: Path | None = field(default=None, metadata=LOCAL)

    def __post_init__(self) -> None:
        for key in ("labels", "widths", "norms", "snapshots", "decays"):
            if not getattr(self, key):
                raise ValueError(f"{key} must not be empty")
        if self.num_inputs < 1 or self.num_draws < 2:
            raise ValueError(f"num_inputs must be >= 1 and num_draws >= 2, got {self.num_inputs} and {self.num_draws}")


@dataclass(frozen=True)
class Point:
    """The network's numbers at one place of a sweep."""

    x: float
    total: float
    covariance: float
    bound: float
    fisher_norm: float
    second_total: float
    second_covariance: float
    second_bound: float

    @classmethod
    def of(cls, x: float, found: EstimatorVariance) -> Point:
        """From a result."""
        second = found.second
        assert second is not None
        return cls(
            x, found.total_variance, found.covariance_norm, found.bound, found.fisher_norm,
            second.total_variance, second.covariance_norm, second.bound,
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> Report:
    """All sweeps; prints the tables, writes PNG, page, TensorBoard and JSON."""
    config = parse_arguments(VarianceConfig, arguments, description=__doc__ or "", default=DEFAULT_CONFIG)
    torch.set_num_threads(config.threads)
    report = run(config)
    page = write_report(
        report, config, config.out / config.name, config.keep, seed=config.seed, device=config.device, name=config.name
    )
    for table in report.tables:
        print(text_table(table.header, table.rows), end="\n\n")
    print("\n".join(report.notes))
    print(f"page: {page}")
    return report


def run(config: VarianceConfig) -> Report:
    """The experiment without its files."""
    dataset = load_data(config.data, config.data_root).to(config.device)
    inputs = dataset.train_inputs[: config.num_inputs].flatten(1)
    model = _mlp(config, dataset, config.hidden, config.seed)
    snapshots: list[Point] = []

    def look(step: int) -> None:
        if step in config.snapshots:
            snapshots.append(Point.of(step, _variance(config, model, inputs)))

    with progress(4 + len(config.widths) + len(config.norms), config.name) as display:
        train_sgd(model, _flat(dataset), config.training, config.seed, on_step=look)
        display.advance(note="training")
        test_error = evaluate(model, dataset.test_inputs.flatten(1), dataset.test_targets)[1]
        found = _variance(config, model, inputs)
        errors = SampledErrors(model, inputs)
        labels = check_labels(config, errors, found)
        display.advance(note="labels")
        averages = check_averages(config, errors, found)
        display.advance(note="averages")
        widths = []
        for width in config.widths:
            widths.append(_fresh_nets(config, dataset, inputs, width))
            display.advance(note=f"width {width}")
        norms = []
        for factor in config.norms:
            norms.append(Point.of(factor, _variance(config, _scaled(model, factor), inputs)))
            display.advance(note=f"weights × {factor:g}")
    return make_report(config, found, labels, averages, snapshots, widths, norms, test_error)


def _mlp(config: VarianceConfig, dataset: Dataset, hidden: Sequence[int], seed: int) -> nn.Module:
    sizes = [dataset.train_inputs[0].numel(), *hidden, dataset.num_classes]
    model = build_model({"name": "mlp", "sizes": sizes, "activation": config.activation}, seed)
    # without the leading Flatten the net is a plain chain of layers
    return nn.Sequential(*list(model.children())[1:]).to(config.device)


def _fresh_nets(config: VarianceConfig, dataset: Dataset, inputs: Tensor, width: int) -> Point:
    """Two hidden layers at initialisation: I1 as the geometric mean over the seeds, I2 of the first."""
    first = Point.of(width, _variance(config, _mlp(config, dataset, [width, width], config.seed), inputs))
    points = [first]
    for seed in range(config.seed + 1, config.seed + config.num_width_seeds):
        found = estimator_variance(_mlp(config, dataset, [width, width], seed), inputs, second="skip")
        numbers = {"total": found.total_variance, "covariance": found.covariance_norm, "bound": found.bound}
        points.append(dataclasses.replace(first, **numbers, fisher_norm=found.fisher_norm))
    means = {
        key: float(np.exp(np.mean([math.log(getattr(point, key)) for point in points])))
        for key in ("total", "covariance", "bound", "fisher_norm")
    }
    return dataclasses.replace(first, **means)


def _flat(dataset: Dataset) -> Dataset:
    return Dataset(
        dataset.name,
        dataset.train_inputs.flatten(1),
        dataset.train_targets,
        dataset.test_inputs.flatten(1),
        dataset.test_targets,
        dataset.num_classes,
    )


def _scaled(model: nn.Module, factor: float) -> nn.Module:
    """A copy with all weights multiplied; biases stay."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(factor)
    return model


def _variance(config: VarianceConfig, model: nn.Module, inputs: Tensor) -> EstimatorVariance:
    return estimator_variance(model, inputs, second="probes", num_probes=config.num_probes)


@dataclass(frozen=True)
class Check:
    """Predicted and seen relative error of matrices from sampled labels, at one ``m`` or one ``factor_decay``.

    Attributes:
        low, high: the seen mean ± three standard errors.
    """

    x: float
    predicted: float
    seen: float
    low: float
    high: float


def check_labels(config: VarianceConfig, errors: SampledErrors, found: EstimatorVariance) -> list[Check]:
    """Squared error of sampled matrices against the predicted ``total_variance / m``."""
    checks = []
    for labels in config.labels:
        squares = errors.of_averages([1.0], labels, config.num_draws, config.seed + labels)
        checks.append(_check(labels, found.relative_error(labels), squares, found.fisher_norm))
    return checks


def check_averages(config: VarianceConfig, errors: SampledErrors, found: EstimatorVariance) -> list[Check]:
    """Squared error of running averages of sampled matrices against the effective number of labels."""
    checks = []
    for decay in config.decays:
        # Until what was left out weighs a millionth: the average has then forgotten its start.
        length = 1 if decay == 0.0 else math.ceil(math.log(1e-6) / math.log(decay))
        weights = [(1.0 - decay) * decay**age for age in range(length)]
        squares = errors.of_averages(weights, config.label_samples, config.num_draws, config.seed + 100)
        checks.append(_check(decay, found.relative_error(config.label_samples, decay), squares, found.fisher_norm))
    return checks


def _check(x: float, predicted: float, squares: Sequence[float], norm: float) -> Check:
    values = np.asarray(squares)
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(len(values))
    return Check(x, predicted, *(math.sqrt(max(value, 0.0)) / norm for value in (mean, mean - 3 * error, mean + 3 * error)))


class SampledErrors:
    """``‖F_sampled − F‖_F²`` for many draws of labels.

    A sampled matrix is a weighted sum of the outer products of the scores of all labels, so that the squared error is
    a quadratic form of the drawn counts in the squared inner products of the scores.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        with torch.no_grad():
            self.probabilities = model(inputs).double().softmax(-1)
        count, classes = self.probabilities.shape
        every = torch.arange(classes, device=inputs.device).expand(count, classes)
        matrix = FisherMatrix(model, inputs, kind="mc", label_samples=classes, labels=every, route="gram")
        parts: dict[str, list[Tensor]] = {}
        for name, store in matrix.rows_by_block():
            parts.setdefault(name, []).append(store.rows())
        scores = torch.cat([torch.cat(found) for found in parts.values()], dim=1).double() * math.sqrt(classes)
        self.squares = (scores @ scores.mT).square() / count**2

    def of_averages(self, weights: Sequence[float], labels: int, draws: int, seed: int) -> list[float]:
        """Squared errors of weighted averages of matrices from ``labels`` new labels per input each."""
        generator = torch.Generator(self.probabilities.device).manual_seed(seed)
        count, classes = self.probabilities.shape
        found = []
        for _ in range(draws):
            mixed = torch.zeros_like(self.probabilities)
            for weight in weights:
                drawn = torch.multinomial(self.probabilities, labels, replacement=True, generator=generator)
                mixed.scatter_add_(1, drawn, torch.full_like(drawn, weight / labels, dtype=mixed.dtype))
            difference = (mixed / sum(weights) - self.probabilities).reshape(count * classes)
            found.append(float(difference @ self.squares @ difference))
        return found


# -- report -------------------------------------------------------------------------------------------------------


def make_report(
    config: VarianceConfig,
    found: EstimatorVariance,
    labels: list[Check],
    averages: list[Check],
    snapshots: list[Point],
    widths: list[Point],
    norms: list[Point],
    test_error: float,
) -> Report:
    """Tables, figures, findings and the sentences about label_samples and factor_decay."""
    report = Report(
        title=f"Variance of the Fisher estimators: {config.name}",
        text=[
            f"Fully connected net {config.hidden} ({config.activation}) after {config.training.steps} steps of SGD on "
            f"{config.data.name} (test error {100 * test_error:.1f} %), {config.num_inputs} training inputs as one batch. "
            "I1: outer products of scores of sampled labels, what K-FAC's default averages; I2: the Hessian of the loss with "
            f"sampled labels. I1 in closed form; I2 from {config.num_probes} random vectors per layer.",
            *found.describe(config.label_samples, config.factor_decay).splitlines()[:1],
        ],
        findings=findings(config, found, labels, averages, snapshots, widths, norms),
        notes=found.describe(config.label_samples, config.factor_decay).splitlines(),
    )
    report.tables = [
        Table(
            f"Relative error of one layer's block from one batch with one label, averaged with factor_decay "
            f"{config.factor_decay:g} (worth {effective_labels(config.label_samples, config.factor_decay):.3g} labels), and "
            "what an error of 10 % needs.",
            LAYER_HEADER,
            _layer_rows(config, found),
        ),
        findings_table("Soen & Sun", report.findings),
    ]
    report.figures = _figures(config, labels, averages, snapshots, widths, norms)
    report.content = {
        "network": _numbers(found),
        "layers": {name: _numbers(layer) for name, layer in found.layers.items()},
        "labels": [vars(check) for check in labels],
        "averages": [vars(check) for check in averages],
        "training": [vars(point) for point in snapshots],
        "widths": [vars(point) for point in widths],
        "norms": [vars(point) for point in norms],
        "test_error": test_error,
    }
    report.scalars = {"training/relative_error": [(int(p.x), math.sqrt(p.total) / p.fisher_norm) for p in snapshots]}
    return report


def _numbers(part: Any) -> dict[str, Any]:
    second = part.second
    return {
        "total_variance": part.total_variance,
        "covariance_norm": part.covariance_norm,
        "bound": part.bound,
        "fisher_norm": part.fisher_norm,
        "relative_error": part.relative_error(),
        "spectral_norm": part.spectral_norm,
        "spectral_bound": part.spectral_bound,
        "second": None if second is None else vars(second),
    }


def _layer_rows(config: VarianceConfig, found: EstimatorVariance) -> list[list[str]]:
    rows = []
    for part in [*found.layers.values(), found]:
        needed = part.labels_for(0.1)
        bound = part.spectral_bound
        rows.append(
            [
                part.name,
                f"{part.relative_error(1):.3f}",
                f"{part.relative_error(config.label_samples, config.factor_decay):.3f}",
                f"{needed:.3g}",
                f"{decay_for(needed, config.label_samples):.4f}",
                f"{part.covariance_norm / part.bound:.2g}" if part.bound else "—",
                "—" if bound is None else f"{part.spectral_norm / bound:.2g}",
            ]
        )
    return rows


def findings(
    config: VarianceConfig,
    found: EstimatorVariance,
    labels: list[Check],
    averages: list[Check],
    snapshots: list[Point],
    widths: list[Point],
    norms: list[Point],
) -> list[Finding]:
    """The laws of the study in numbers."""
    sweep = [*snapshots, *widths, *norms]
    ratios = [p.covariance / p.bound for p in sweep if p.bound > 0]
    seconds = [p.second_covariance / p.second_bound for p in sweep if p.second_bound > 0]
    inside = sum(check.low <= check.predicted <= check.high for check in labels) / len(labels)
    inside_average = sum(check.low <= check.predicted <= check.high for check in averages) / len(averages)
    own = [layer.second.total_variance for layer in found.layers.values() if layer.second is not None]
    across = found.second.total_variance if found.second is not None else math.nan
    spectral = [layer.spectral_norm / layer.spectral_bound for layer in found.layers.values() if layer.spectral_bound]
    width_slope = _slope(widths, lambda p: p.covariance)
    norm_slope = _slope([p for p in norms if p.x <= 1.0], lambda p: p.covariance)
    correlation = _rank_correlation([p.covariance for p in sweep], [p.bound for p in sweep])
    relative = [math.sqrt(p.total) / p.fisher_norm for p in snapshots]
    return [
        Finding(
            "the variance falls as 1/m with the number of labels",
            verdict(inside),
            f"predicted error inside three standard errors of {config.num_draws} sampled matrices for {inside:.0%} of the m's; "
            f"m = {labels[0].x:g}: predicted {labels[0].predicted:.3f}, seen {labels[0].seen:.3f}; m = {labels[-1].x:g}: "
            f"{labels[-1].predicted:.3f}, {labels[-1].seen:.3f}",
        ),
        Finding(
            "(not in the study) an average with decay d is worth m (1+d)/(1−d) labels",
            verdict(inside_average),
            "; ".join(f"d = {c.x:g}: predicted {c.predicted:.3f}, seen {c.seen:.3f}" for c in averages),
        ),
        Finding(
            "‖Cov(I1)‖ ≤ ‖J‖⁴ ‖K − H⊗H‖ / m",
            verdict(all(ratio <= 1 for ratio in ratios)),
            f"the norm is {min(ratios):.2g} to {max(ratios):.2g} of the bound over all nets of this page",
        ),
        Finding(
            "‖Cov(I2)‖ ≤ ‖∂²h‖² ‖H‖ / m",
            verdict(all(ratio <= 1 for ratio in seconds)),
            f"{min(seconds):.2g} to {max(seconds):.2g} of the bound" if seconds else "I2 has no variance here",
        ),
        Finding(
            "ReLU nets: I2's diagonal blocks have no variance, its cross-layer blocks have",
            verdict(max(own) == 0.0 and across > 0.0) if config.activation == "relu" else "not tried",
            f"sum over the diagonal blocks {sum(own):.2g}, whole matrix {across:.2g} (I1: {found.total_variance:.2g})",
        ),
        Finding(
            "a layer's Jacobian is bounded by the spectral norms of the weights above it",
            verdict(all(ratio <= 1 + 1e-5 for ratio in spectral)) if spectral else "not tried",
            f"it is {min(spectral):.2g} to {max(spectral):.2g} of the bound" if spectral else "the net is no chain of layers",
        ),
        Finding(
            "the variance follows the size of the Jacobian, so that it grows with the norm of the weights",
            verdict(correlation > 0.8 and norm_slope > 0),
            f"rank correlation of ‖Cov(I1)‖ with its bound over all nets {correlation:.2f}; it grows as (weight norm)^"
            f"{norm_slope:.2f} up to the trained norm, beyond it sure predictions take it away again, and as width^"
            f"{width_slope:.2f} at PyTorch's initialisation, whose weights shrink with the width",
        ),
        Finding(
            "(not in the study) relative to ‖F‖ the noise changes along the training",
            "—",
            ", ".join(f"step {p.x:g}: {value:.2f}" for p, value in zip(snapshots, relative)),
        ),
    ]


def _rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (left, right)]
    return float(np.corrcoef(*ranks)[0, 1])


def _slope(points: Sequence[Point], value: Callable[[Point], float]) -> float:
    """Exponent of a power law fitted on logarithmic axes."""
    pairs = [(math.log(p.x), math.log(value(p))) for p in points if value(p) > 0]
    if len(pairs) < 2:
        return math.nan
    x, y = np.asarray(pairs).T
    return float(np.polyfit(x, y, 1)[0])


def _figures(
    config: VarianceConfig,
    labels: list[Check],
    averages: list[Check],
    snapshots: list[Point],
    widths: list[Point],
    norms: list[Point],
) -> dict[str, Figure]:
    return {
        "labels": Figure(
            _check_figure(labels, averages),
            f"Relative error of matrices from sampled labels: predicted (line) and seen in {config.num_draws} draws (bars: three "
            "standard errors), against the number of labels and, averaged, against the decay.",
        ),
        "width": Figure(
            _sweep_figure(widths, "width of two hidden layers"),
            f"At initialisation, I1 over {config.num_width_seeds} seeds. Dashed: upper bounds. m = 1.",
        ),
        "norm": Figure(
            _sweep_figure(norms, "factor on the trained weights"),
            "The trained net with scaled weights: more norm, more variance, until the predictions are sure.",
        ),
        "training": Figure(_sweep_figure([p for p in snapshots if p.x > 0], "training step"), "Along the training."),
    }


def _check_figure(labels: list[Check], averages: list[Check]) -> bytes:
    import matplotlib.pyplot as plt

    with house_style():
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
        for ax, checks, name in zip(axes, (labels, averages), ("labels per input m", "factor_decay d")):
            x = [c.x if ax is axes[0] else 1.0 - c.x for c in checks]
            seen = [c.seen for c in checks]
            bars = [[c.seen - c.low for c in checks], [c.high - c.seen for c in checks]]
            ax.plot(x, [c.predicted for c in checks], color=COLOURS[0], label="predicted")
            ax.errorbar(x, seen, yerr=bars, fmt="o", color=COLOURS[1], label="seen", capsize=3)
            ax.set(xscale="log", yscale="log", xlabel=name)
            ax.set_xticks(x, [f"{c.x:g}" for c in checks])
            ax.minorticks_off()
        axes[1].invert_xaxis()
        axes[0].set_ylabel("‖F sampled − F‖ / ‖F‖")
        axes[0].legend()
        return figure_png(figure)


def _sweep_figure(points: list[Point], x_label: str) -> bytes:
    import matplotlib.pyplot as plt

    with house_style():
        figure, ax = plt.subplots(figsize=(5.6, 3.8))
        x = [p.x for p in points]
        ax.plot(x, [p.covariance for p in points], "o-", color=COLOURS[0], label="‖Cov(I1)‖")
        ax.plot(x, [p.bound for p in points], "--", color=COLOURS[0], label="its bound")
        ax.plot(x, [p.second_covariance for p in points], "s-", color=COLOURS[1], label="‖Cov(I2)‖")
        ax.plot(x, [p.second_bound for p in points], "--", color=COLOURS[1], label="its bound")
        ax.plot(x, [p.fisher_norm**2 for p in points], ":", color="#555555", label="‖F‖²")
        ax.set(xscale="log", yscale="log", xlabel=x_label)
        ax.set_xticks(x, [f"{value:g}" for value in x])
        ax.minorticks_off()
        ax.legend()
        return figure_png(figure)


if __name__ == "__main__":
    main()
