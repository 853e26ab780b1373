"""How noisy is a Fisher matrix from sampled labels? Variance against labels, width and weight norm (Soen & Sun 2021).

    python -m benchmarks.estimator_variance --config configs/estimator_variance/mnist.yaml --data-root data

Everything is computed in closed form, for both estimators (outer products of the scores, and the Hessian with sampled
labels), and held against matrices from really sampled labels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.ticker import FormatStrFormatter, LogLocator
from torch import Tensor, nn

from benchmarks.common.command import run_command
from benchmarks.common.config import LOCAL, ExperimentConfig
from benchmarks.common.data import DataConfig, Dataset, load_data
from benchmarks.common.figures import COLOURS, Figure, finish, subplots
from benchmarks.common.models import build_model
from benchmarks.common.plain_sgd import SGDConfig, train_sgd
from benchmarks.common.report import Finding, Report, Table, findings_table, progress, run_script, verdict
from benchmarks.common.tasks import evaluate
from kfac_opt.fisher import EstimatorVariance, FisherMatrix, decay_for, effective_labels, estimator_variance

SHOWN = 1e-10
"""What is smaller than this share of the largest value is left out of a picture."""
AVERAGED = ("total", "covariance", "bound", "fisher_norm")


@dataclass(frozen=True, kw_only=True)
class VarianceConfig(ExperimentConfig):
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
    out: Path = field(default=Path("out/estimator_variance"), metadata=LOCAL)

    def __post_init__(self) -> None:
        for key in ("labels", "widths", "norms", "snapshots", "decays"):
            if not getattr(self, key):
                raise ValueError(f"{key} must not be empty")
        if self.num_inputs < 1 or self.num_draws < 2:
            raise ValueError(f"num_inputs must be >= 1 and num_draws >= 2, got {self.num_inputs} and {self.num_draws}")


def main(arguments: Sequence[str] | None = None) -> Report:
    """All sweeps; writes the page."""
    return run_script(VarianceConfig, run, arguments, __doc__ or "", "estimator_variance/digits.yaml")


def run(config: VarianceConfig) -> Report:
    """The experiment without its files."""
    dataset = load_data(config.data, config.data_root).to(config.device)
    inputs = dataset.train_inputs[: config.num_inputs].flatten(1)
    model = build_mlp(config, dataset, config.hidden, config.seed)
    flat = Dataset(
        dataset.name, dataset.train_inputs.flatten(1), dataset.train_targets,
        dataset.test_inputs.flatten(1), dataset.test_targets, dataset.num_classes,
    )  # fmt: skip
    snapshots, widths, norms = [], [], []

    def look(step: int) -> None:
        if step in config.snapshots:
            snapshots.append(point_of(step, variance_of(config, model, inputs)))

    with progress(3 + len(config.widths) + len(config.norms), config.name) as display:
        train_sgd(model, flat, config.training, config.seed, on_step=look)
        display.update()
        test_error = evaluate(model, flat.test_inputs, flat.test_targets).error
        found = variance_of(config, model, inputs)
        errors = SampledErrors(model, inputs)
        labels = check_labels(config, errors, found)
        display.update()
        averages = check_averages(config, errors, found)
        display.update()
        for width in config.widths:
            widths.append(fresh_nets(config, dataset, inputs, width))
            display.update()
        for factor in config.norms:
            norms.append(point_of(factor, variance_of(config, scaled(model, factor), inputs)))
            display.update()
    sweeps = {"training": pd.DataFrame(snapshots), "widths": pd.DataFrame(widths), "norms": pd.DataFrame(norms)}
    return make_report(config, found, labels, averages, sweeps, test_error)


def variance_of(config: VarianceConfig, model: nn.Module, inputs: Tensor) -> EstimatorVariance:
    """Both estimators, the second by random vectors."""
    return estimator_variance(model, inputs, second="probes", num_probes=config.num_probes)


def point_of(x: float, found: EstimatorVariance) -> dict[str, float]:
    """The network's numbers at one place of a sweep."""
    first = dict(zip(AVERAGED, (found.total_variance, found.covariance_norm, found.bound, found.fisher_norm), strict=True))
    second = found.second
    if second is None:
        return {"x": x, **first}
    values = (second.total_variance, second.covariance_norm, second.bound)
    return {"x": x, **first, **dict(zip(("second_total", "second_covariance", "second_bound"), values, strict=True))}


def build_mlp(config: VarianceConfig, dataset: Dataset, hidden: Sequence[int], seed: int) -> nn.Module:
    """A fully connected net; without the leading Flatten it is a plain chain of layers."""
    sizes = [dataset.train_inputs[0].numel(), *hidden, dataset.num_classes]
    model = build_model({"name": "mlp", "sizes": sizes, "activation": config.activation}, seed)
    return nn.Sequential(*list(model.children())[1:]).to(config.device)


def fresh_nets(config: VarianceConfig, dataset: Dataset, inputs: Tensor, width: int) -> dict[str, float]:
    """Two hidden layers at initialisation: I1 as the geometric mean over the seeds, I2 of the first."""
    nets = [build_mlp(config, dataset, [width, width], config.seed + number) for number in range(config.num_width_seeds)]
    points = pd.DataFrame(point_of(width, estimator_variance(net, inputs, second="skip")) for net in nets)
    return {**point_of(width, variance_of(config, nets[0], inputs)), **np.exp(np.log(points[list(AVERAGED)]).mean()).to_dict()}


def scaled(model: nn.Module, factor: float) -> nn.Module:
    """A copy with all weights multiplied; biases stay."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(factor)
    return model


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
        found = []
        for _ in range(draws):
            mixed = torch.zeros_like(self.probabilities)
            for weight in weights:
                drawn = torch.multinomial(self.probabilities, labels, replacement=True, generator=generator)
                mixed.scatter_add_(1, drawn, torch.full_like(drawn, weight / labels, dtype=mixed.dtype))
            difference = (mixed / sum(weights) - self.probabilities).flatten()
            found.append(float(difference @ self.squares @ difference))
        return found


def check_labels(config: VarianceConfig, errors: SampledErrors, found: EstimatorVariance) -> pd.DataFrame:
    """Squared error of sampled matrices against the predicted ``total_variance / m``."""
    checks = []
    for labels in config.labels:
        squares = errors.of_averages([1.0], labels, config.num_draws, config.seed + labels)
        checks.append(_check(labels, found.relative_error(labels), squares, found.fisher_norm))
    return pd.DataFrame(checks)


def check_averages(config: VarianceConfig, errors: SampledErrors, found: EstimatorVariance) -> pd.DataFrame:
    """Squared error of running averages of sampled matrices against the effective number of labels."""
    checks = []
    for decay in config.decays:
        # Until what was left out weighs a millionth: the average has then forgotten its start.
        length = 1 if decay == 0.0 else math.ceil(math.log(1e-6) / math.log(decay))
        weights = [(1.0 - decay) * decay**age for age in range(length)]
        squares = errors.of_averages(weights, config.label_samples, config.num_draws, config.seed + 100)
        checks.append(_check(decay, found.relative_error(config.label_samples, decay), squares, found.fisher_norm))
    return pd.DataFrame(checks)


def _check(x: float, predicted: float, squares: Sequence[float], norm: float) -> dict[str, float]:
    """Predicted and seen relative error at one ``m`` or one ``factor_decay``; ``low``, ``high``: ± three standard errors."""
    values = pd.Series(squares)
    ends = {"seen": values.mean(), "low": values.mean() - 3 * values.sem(), "high": values.mean() + 3 * values.sem()}
    return {"x": x, "predicted": predicted, **{key: math.sqrt(max(value, 0.0)) / norm for key, value in ends.items()}}


def make_report(
    config: VarianceConfig,
    found: EstimatorVariance,
    labels: pd.DataFrame,
    averages: pd.DataFrame,
    sweeps: dict[str, pd.DataFrame],
    test_error: float,
) -> Report:
    """Tables, figures, findings and the sentences about label_samples and factor_decay."""
    held = findings(config, found, labels, averages, sweeps)
    training = sweeps["training"]
    relative = training["total"] ** 0.5 / training["fisher_norm"]
    described = found.describe(config.label_samples, config.factor_decay).splitlines()
    caption = (
        f"Relative error of one layer's block from one batch with one label, averaged with factor_decay "
        f"{config.factor_decay:g} (worth {effective_labels(config.label_samples, config.factor_decay):.3g} labels), and what an "
        "error of 10 % needs."
    )
    along = [{"step": int(x), "√Var / ‖F‖": value} for x, value in zip(training["x"], relative, strict=True)]
    return Report(
        title=f"Variance of the Fisher estimators: {config.name}",
        text=[
            f"Fully connected net {config.hidden} ({config.activation}) after {config.training.steps} steps of SGD on "
            f"{config.data.name} (test error {test_error:.1%}), {config.num_inputs} training inputs as one batch. "
            "I1: outer products of scores of sampled labels, what K-FAC's default averages; I2: the Hessian of the loss with "
            f"sampled labels. I1 in closed form; I2 from {config.num_probes} random vectors per layer.",
            *described[:1],
        ],
        tables=[
            Table.of(caption, [_layer_row(config, part) for part in [*found.layers.values(), found]]),
            findings_table("Soen & Sun", held),
            Table.of("The noise of one batch with one label along the training.", along),
        ],
        findings=held,
        figures={
            "labels": _check_figure(config, labels, averages),
            "width": _sweep_figure(
                sweeps["widths"],
                "width of two hidden layers",
                f"At initialisation, I1 over {config.num_width_seeds} seeds. Dashed: upper bounds. m = 1.",
            ),
            "norm": _sweep_figure(
                sweeps["norms"],
                "factor on the trained weights",
                "The trained net with scaled weights: more norm, more variance, until the predictions are sure.",
            ),
            "training": _sweep_figure(training[training["x"] > 0], "training step", "Along the training."),
        },
        notes=described,
        content={
            "network": _numbers(found),
            "layers": {name: _numbers(layer) for name, layer in found.layers.items()},
            "labels": labels.to_dict("records"),
            "averages": averages.to_dict("records"),
            **{name: sweep.to_dict("records") for name, sweep in sweeps.items()},
            "test_error": test_error,
        },
        scalars={"training/relative_error": [(int(x), float(value)) for x, value in zip(training["x"], relative, strict=True)]},
    )


def _numbers(part: Any) -> dict[str, Any]:
    keys = ("total_variance", "covariance_norm", "bound", "fisher_norm", "spectral_norm", "spectral_bound")
    second = None if part.second is None else vars(part.second)
    return {**{key: getattr(part, key) for key in keys}, "relative_error": part.relative_error(), "second": second}


def _layer_row(config: VarianceConfig, part: Any) -> dict[str, Any]:
    needed, bound = part.labels_for(0.1), part.spectral_bound
    return {
        "layer": part.name,
        "√Var / ‖F‖, one label": part.relative_error(1),
        "with the average": part.relative_error(config.label_samples, config.factor_decay),
        "labels for 10 %": needed,
        "factor_decay for 10 %": f"{decay_for(needed, config.label_samples):.4f}",
        "‖Cov‖ / bound": part.covariance_norm / part.bound if part.bound else None,
        "‖∂h/∂W‖ / bound": bound and part.spectral_norm / bound,
    }


def findings(
    config: VarianceConfig,
    found: EstimatorVariance,
    labels: pd.DataFrame,
    averages: pd.DataFrame,
    sweeps: dict[str, pd.DataFrame],
) -> list[Finding]:
    """The laws of the study in numbers."""
    every = pd.concat(sweeps.values())
    own = [layer.second.total_variance for layer in found.layers.values() if layer.second is not None]
    across = found.second.total_variance if found.second is not None else math.nan
    spectral = [layer.spectral_norm / layer.spectral_bound for layer in found.layers.values() if layer.spectral_bound]
    up_to_trained = sweeps["norms"][sweeps["norms"]["x"] <= 1.0]
    exponents = {"weight norm": _exponent(up_to_trained), "width": _exponent(sweeps["widths"])}
    correlation = float(every["covariance"].corr(every["bound"], method="spearman"))
    inside = {name: checks["predicted"].between(checks["low"], checks["high"]).mean() for name, checks in
              (("labels", labels), ("averages", averages))}  # fmt: skip
    relu = config.activation == "relu"
    return [
        Finding(
            "the variance falls as 1/m with the number of labels",
            f"predicted error inside three standard errors of {config.num_draws} sampled matrices, share of the m's",
            {"share": inside["labels"], **{f"m = {row.x:g}, predicted": row.predicted for row in labels.itertuples()}},
            verdict(inside["labels"]),
        ),
        Finding(
            "(not in the study) an average with decay d is worth m (1+d)/(1−d) labels",
            "the same, share of the decays",
            {"share": inside["averages"], **{f"d = {row.x:g}, seen": row.seen for row in averages.itertuples()}},
            verdict(inside["averages"]),
        ),
        _bounded("‖Cov(I1)‖ ≤ ‖J‖⁴ ‖K − H⊗H‖ / m", every["covariance"] / every["bound"]),
        _bounded("‖Cov(I2)‖ ≤ ‖∂²h‖² ‖H‖ / m", every["second_covariance"] / every["second_bound"]),
        Finding(
            "ReLU nets: I2's diagonal blocks have no variance, its cross-layer blocks have",
            "the sum over the diagonal blocks is 0, that of the whole matrix is not",
            {"diagonal blocks": sum(own), "whole matrix": across, "I1": found.total_variance},
            verdict((max(own) == 0.0 and across > 0.0) if relu else None),
        ),
        _bounded("a layer's Jacobian is bounded by the spectral norms of the weights above it", pd.Series(spectral, dtype=float)),
        Finding(
            "the variance follows the size of the Jacobian, so that it grows with the norm of the weights",
            "rank correlation of ‖Cov(I1)‖ with its bound over all nets above 0.8, and a positive exponent of the weight norm "
            "up to that of the trained net",
            {"rank correlation": correlation, **{f"exponent of the {name}": value for name, value in exponents.items()}},
            verdict(correlation > 0.8 and exponents["weight norm"] > 0),
        ),
    ]


def _bounded(statement: str, ratios: pd.Series) -> Finding:
    """Whether shares of a bound stay below it, up to rounding."""
    ratios = ratios[np.isfinite(ratios)]
    numbers = {"least": float(ratios.min()), "most": float(ratios.max())} if len(ratios) else {}
    held = bool((ratios <= 1 + 1e-5).all()) if numbers else None
    return Finding(statement, "the share of the bound is at most 1", numbers, verdict(held))


def _exponent(points: pd.DataFrame) -> float:
    """Of a power law of ‖Cov(I1)‖, fitted on logarithmic axes."""
    points = points[points["covariance"] > 0]
    return float(np.polyfit(np.log(points["x"]), np.log(points["covariance"]), 1)[0]) if len(points) > 1 else math.nan


def _check_figure(config: VarianceConfig, labels: pd.DataFrame, averages: pd.DataFrame) -> Figure:
    figure, panels = subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for ax, checks, name in zip(panels, (labels, averages), ("labels per input m", "factor_decay d"), strict=True):
        x = checks["x"] if checks is labels else 1.0 - checks["x"]
        ax.plot(x, checks["predicted"], color=COLOURS[0], label="predicted")
        bars = [checks["seen"] - checks["low"], checks["high"] - checks["seen"]]
        ax.errorbar(x, checks["seen"], yerr=bars, fmt="o", color=COLOURS[1], label="seen", capsize=3)
        ax.set(xscale="log", yscale="log", xlabel=name)
        ax.set_xticks(x, [f"{value:g}" for value in checks["x"]])
        ax.minorticks_off()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    panels[1].invert_xaxis()
    panels[0].set_ylabel("‖F sampled − F‖ / ‖F‖")
    panels[0].legend()
    caption = (
        f"Relative error of matrices from sampled labels: predicted (line) and seen in {config.num_draws} draws (bars: three "
        "standard errors), against the number of labels and, averaged, against the decay."
    )
    return finish(figure, caption)


def _sweep_figure(points: pd.DataFrame, x_label: str, caption: str) -> Figure:
    figure, ax = subplots(figsize=(5.6, 3.8))
    points = points[points["covariance"] > 0]  # nothing to draw on a logarithmic axis
    ax.plot(points["x"], points["covariance"], "o-", color=COLOURS[0], label="‖Cov(I1)‖")
    ax.plot(points["x"], points["bound"], "--", color=COLOURS[0], label="its bound")
    ax.plot(points["x"], points["second_covariance"], "s-", color=COLOURS[1], label="‖Cov(I2)‖")
    ax.plot(points["x"], points["second_bound"], "--", color=COLOURS[1], label="its bound")
    ax.plot(points["x"], points["fisher_norm"] ** 2, ":", color="#555555", label="‖F‖²")
    ax.set(xscale="log", yscale="log", xlabel=x_label, ylabel="norm")
    ax.set_xticks(points["x"], [f"{value:g}" for value in points["x"]])
    ax.minorticks_off()
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, SHOWN * high), high)
    ax.legend()
    return finish(figure, caption)


if __name__ == "__main__":
    run_command(main)
