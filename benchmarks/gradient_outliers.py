"""Which examples carry the gradient, and when: per-example gradients over a training run (Yashima et al.).

    python -m benchmarks.gradient_outliers --config configs/gradient_outliers/mnist.yaml --data-root data

SGD with several learning rates and batch sizes. At checkpoints, over the whole training set and layer by layer: norms of
the per-example gradients and their outliers, the largest eigenvalue of the empirical Fisher, the projections on its
eigenvector, what is left of the eigenvalue without the tenth of the examples that carry most of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common.config import LOCAL, parse_arguments, resolved
from benchmarks.common.data import DataConfig, Dataset, load_data
from benchmarks.common.figures import COLOURS, figure_png, house_style
from benchmarks.common.models import build_model
from benchmarks.common.page import Figure, Table
from benchmarks.common.progress import progress
from benchmarks.common.results import fingerprint, read_json, write_json
from benchmarks.common.tables import text_table
from benchmarks.fisher import nets  # noqa: F401
from benchmarks.fisher.report import Finding, Report, findings_table, verdict, write_report
from benchmarks.fisher.training import SGDConfig, evaluate, train_sgd
from kfac_opt.fisher import GradientStatistics, gradient_statistics, symmetric_log_bins

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "gradient_outliers" / "digits.yaml"
NETWORK = "(network)"
HEADER = (
    "run", "part", "outliers", "published rule", "λ max", "trimmed λ", "fall", "|a| < 0.1", "max / median |a|",
    "drift", "diffusion",
)  # fmt: skip
PUBLISHED = (
    "Published at the end of training: CIFAR-10, batch 16: 76.53 to 30.60, batch 256: 407.6 to 55.66; MNIST, batch 16: "
    "0.3659 to 1e-6, batch 256: 2.063 to 0.2182."
)


@dataclass(frozen=True)
class Setting:
    """One training run. ``batch_size`` also sets the diffusion that is compared with the drift."""

    lr: float
    batch_size: int
    epochs: float

    @property
    def label(self) -> str:
        """For tables and files."""
        return f"lr {self.lr:g}, batch {self.batch_size}"


@dataclass(frozen=True)
class OutlierConfig:
    """The experiment.

    Attributes:
        settings: the runs.
        num_checkpoints: moments of a run that are looked at, from the start to the end, denser at the beginning.
        tolerance: of the eigenvectors.
        low, high: decades of the histogram of the projections.
        num_pictures: examples with the largest gradients that are shown.
    """

    name: str
    data: DataConfig
    model: dict[str, Any]
    settings: list[Setting]
    num_checkpoints: int = 12
    tolerance: float = 1e-3
    low: float = -4.0
    high: float = 3.0
    num_pictures: int = 10
    memory_gib: float = 2.0
    threads: int = 1
    device: str = "cpu"
    seed: int = 0
    data_root: Path = field(default=Path("data"), metadata=LOCAL)
    out: Path = field(default=Path("out/gradient_outliers"), metadata=LOCAL)
    keep: Path | None = field(default=None, metadata=LOCAL)

    def __post_init__(self) -> None:
        if not self.settings or self.num_checkpoints < 3:
            raise ValueError(
                f"settings must not be empty and num_checkpoints >= 3, got {len(self.settings)} settings and "
                f"{self.num_checkpoints} checkpoints"
            )


@dataclass(frozen=True)
class Moment:
    """A run at one checkpoint.

    Attributes:
        parts: numbers by layer and for the network, as ``GradientStatistics.summary``.
        histogram: counts of the network's projections in fixed bins.
        largest: indices of the examples with the largest gradients.
    """

    step: int
    epoch: float
    train_loss: float
    validation_loss: float
    validation_error: float
    parts: dict[str, dict[str, float]]
    histogram: list[int]
    largest: list[int]


@dataclass(frozen=True)
class Run:
    """One training run."""

    setting: Setting
    moments: list[Moment]

    @property
    def best(self) -> int:
        """Index of the checkpoint with the lowest validation loss."""
        return min(range(len(self.moments)), key=lambda i: self.moments[i].validation_loss)

    def curve(self, key: str, part: str = NETWORK) -> list[float]:
        """One number over the checkpoints."""
        return [moment.parts[part][key] for moment in self.moments]

    @property
    def epochs(self) -> list[float]:
        """Of the checkpoints."""
        return [moment.epoch for moment in self.moments]


def main(arguments: Sequence[str] | None = None) -> Report:
    """Runs what is missing, prints the table, writes PNG, page, TensorBoard and JSON."""
    config = parse_arguments(OutlierConfig, arguments, description=__doc__ or "", default=DEFAULT_CONFIG)
    torch.set_num_threads(config.threads)
    report = run(config)
    page = write_report(
        report, config, config.out / config.name, config.keep, seed=config.seed, device=config.device, name=config.name
    )
    for table in report.tables:
        print(text_table(table.header, table.rows), end="\n\n")
    print(f"page: {page}")
    return report


def run(config: OutlierConfig) -> Report:
    """The experiment without its report's files; finished runs are read back from ``out``."""
    dataset = load_data(config.data, config.data_root).to(config.device)
    runs = []
    with progress(len(config.settings) * config.num_checkpoints, config.name) as display:
        for setting in config.settings:
            finished = config.out / config.name / f"run-{_identity(config, setting)}.json"
            if not finished.is_file():
                found = follow(config, dataset, setting, lambda: display.advance(note=setting.label))  # noqa: B023
                write_json(finished, [vars(moment) for moment in found.moments])
            runs.append(Run(setting, [_moment(content) for content in read_json(finished)]))
    return make_report(config, dataset, runs)


def _identity(config: OutlierConfig, setting: Setting) -> str:
    content = {**resolved(config), "settings": resolved(setting)}
    return fingerprint({key: value for key, value in content.items() if key not in ("name", "num_pictures")})


def _moment(content: dict[str, Any]) -> Moment:
    """Numbers that were not finite come back as NaN."""
    return Moment(**json.loads(json.dumps(content).replace("null", "NaN")))


def checkpoints(steps: int, number: int) -> list[int]:
    """``number`` steps from 0 to the end, the distances growing with the step."""
    grown = np.linspace(0.0, 1.0, number) ** 2
    return sorted({round(float(share) * steps) for share in grown})


def follow(config: OutlierConfig, dataset: Dataset, setting: Setting, on_moment: Any) -> Run:
    """Trains one net and looks at it at every checkpoint."""
    model = build_model(config.model, config.seed).to(config.device)
    per_epoch = len(dataset.train_inputs) // setting.batch_size
    steps = max(1, round(setting.epochs * per_epoch))
    moments: list[Moment] = []
    due = set(checkpoints(steps, config.num_checkpoints))

    def look(step: int) -> None:
        if step in due:
            moments.append(_look(config, model, dataset, setting, step, step / per_epoch))
            on_moment()

    train_sgd(model, dataset, SGDConfig(steps, setting.batch_size, setting.lr, 0.0), config.seed, on_step=look)
    return Run(setting, moments)


def _look(config: OutlierConfig, model: nn.Module, dataset: Dataset, setting: Setting, step: int, epoch: float) -> Moment:
    found: GradientStatistics = gradient_statistics(
        model,
        (dataset.train_inputs, dataset.train_targets),
        tolerance=config.tolerance,
        memory_limit=int(config.memory_gib * 2**30),
    )
    edges = symmetric_log_bins(config.low, config.high)
    train_loss, _ = evaluate(model, dataset.train_inputs, dataset.train_targets)
    validation_loss, validation_error = evaluate(model, dataset.test_inputs, dataset.test_targets)
    return Moment(
        step=step,
        epoch=epoch,
        train_loss=train_loss,
        validation_loss=validation_loss,
        validation_error=validation_error,
        parts=found.summary(setting.batch_size),
        histogram=found.network.histogram(edges).tolist(),
        largest=found.network.norms.topk(min(config.num_pictures, found.num_examples)).indices.tolist(),
    )


# -- report -------------------------------------------------------------------------------------------------------


def make_report(config: OutlierConfig, dataset: Dataset, runs: list[Run]) -> Report:
    """Tables, figures, findings."""
    report = Report(
        title=f"Gradient outliers: {config.name}",
        text=[
            f"{config.model['name']} on {len(dataset.train_inputs)} examples of {config.data.name}, plain SGD. Gradients of "
            "all training examples at every checkpoint. Outliers: norm above median + 10 MAD; published rule: norm above 10 "
            "MAD. Trimmed λ: along the same eigenvector, without the tenth of the examples with the largest projections. "
            "Drift: norm of the mean gradient; diffusion: standard deviation of a mini-batch gradient.",
            PUBLISHED,
        ],
        findings=findings(runs),
    )
    report.tables = [
        Table("At the end of each run.", HEADER, [row for found in runs for row in _rows(found)]),
        findings_table("Yashima, Ishikawa, Sato & Matsuoka", report.findings),
    ]
    last = runs[0].moments[-1]
    report.figures = {
        "outliers": Figure(
            _outlier_figure(runs),
            "Number of outliers (left axis, whole network) and validation loss (right axis); the dotted line marks the lowest "
            "validation loss.",
        ),
        "projections": Figure(
            _projection_figure(config, runs),
            "Projections a of all training gradients on the first eigenvector of the empirical Fisher, over the run: share of "
            "the examples per bin, logarithmic colour.",
        ),
        "trimmed": Figure(_trimmed_figure(runs), "λ max of the network's empirical Fisher, and without the largest tenth."),
        "drift": Figure(_drift_figure(runs), "Signal against noise of the mini-batch gradient over the run."),
    }
    if config.data.name != "shakespeare" and dataset.train_inputs.dim() == 4:
        report.figures["examples"] = Figure(
            _picture_figure(dataset, last.largest),
            f"The examples with the largest gradients at the end of the run with {runs[0].setting.label}: index and label.",
        )
    report.content = {
        "bins": symmetric_log_bins(config.low, config.high).tolist(),
        "runs": [{"setting": vars(found.setting), "moments": [vars(moment) for moment in found.moments]} for found in runs],
    }
    for found in runs:
        tag = found.setting.label.replace(" ", "_").replace(",", "")
        for key in ("outliers", "eigenvalue", "trimmed_eigenvalue", "drift", "diffusion"):
            values = [(m.step, v) for m, v in zip(found.moments, found.curve(key)) if math.isfinite(v)]
            report.scalars[f"{tag}/{key}"] = values
        report.scalars[f"{tag}/validation_loss"] = [(m.step, m.validation_loss) for m in found.moments]
    return report


def _rows(found: Run) -> list[list[str]]:
    rows = []
    for name, part in found.moments[-1].parts.items():
        rows.append(
            [
                found.setting.label,
                name,
                f"{part['outliers']:.0f}",
                f"{part['outliers_uncentered']:.0f}",
                f"{part['eigenvalue']:.3g}",
                f"{part['trimmed_eigenvalue']:.3g}",
                f"{fall(part):.0%}",
                f"{part['small_share']:.0%}",
                f"{part['peak_ratio']:.3g}",
                f"{part['drift']:.2g}",
                f"{part['diffusion']:.2g}",
            ]
        )
    return rows


def fall(part: dict[str, float]) -> float:
    """Share of the eigenvalue that the trimmed tenth carries."""
    return 1.0 - part["trimmed_eigenvalue"] / part["eigenvalue"] if part["eigenvalue"] > 0 else math.nan


def findings(runs: list[Run]) -> list[Finding]:
    """The study's findings in numbers."""
    network = [fall(found.moments[-1].parts[NETWORK]) for found in runs]
    layers = [fall(part) for found in runs for name, part in found.moments[-1].parts.items() if name != NETWORK]
    inside = [found for found in runs if 0 < found.best < len(found.moments) - 1]
    growth = {found.setting.label: _growth(found) for found in inside}
    steepest = {found.setting.label: _steepest(found) for found in inside}
    minima = {found.setting.label: found.moments[found.best].epoch for found in inside}
    near = {key: rise[1] >= minima[key] / 2 and rise[0] <= 2 * minima[key] for key, rise in steepest.items()}
    never = [found.setting.label for found in runs if found not in inside]
    small = [found.moments[-1].parts[NETWORK]["small_share"] for found in runs]
    fallen = {found.setting.label: _fallen(found, steepest[found.setting.label][1]) for found in inside}
    grew = [1.0 if near[label] and growth[label] > 1 else 0.5 * (fallen[label] >= 0.9) for label in growth]
    return [
        Finding(
            "the largest eigenvalue is carried by few examples: without the tenth it falls by 60 to 99 %",
            verdict(sum(value >= 0.6 for value in network) / len(network)),
            f"whole network {min(network):.0%} to {max(network):.0%}, single layers {min(layers):.0%} to {max(layers):.0%}",
        ),
        Finding(
            "outliers grow sharply about where the validation loss is lowest",
            verdict(sum(grew) / len(grew)) if grew else "not tried",
            "; ".join(
                [
                    f"{label}: lowest loss at epoch {minima[label]:.1f}, steepest rise between {steepest[label][0]:.1f} and "
                    f"{steepest[label][1]:.1f} (the loss has then done {fallen[label]:.0%} of its fall), × {grown:.3g} from "
                    "half of the lowest loss's epoch to twice"
                    for label, grown in growth.items()
                ]
                + [f"{label}: no minimum inside the run" for label in never]
            ),
        ),
        Finding(
            "most projections are near zero",
            verdict(sum(value > 0.5 for value in small) / len(small)),
            f"|a| < 0.1 for {min(small):.0%} to {max(small):.0%} of the examples at the end",
        ),
    ]


def _growth(found: Run) -> float:
    """Outliers at twice the epoch of the lowest validation loss over those at half of it (at least one)."""
    epoch = found.moments[found.best].epoch
    counts = found.curve("outliers")
    before = float(np.interp(epoch / 2, found.epochs, counts))
    after = float(np.interp(min(2 * epoch, found.epochs[-1]), found.epochs, counts))
    return after / max(before, 1.0)


def _steepest(found: Run) -> tuple[float, float]:
    """Epochs of the two neighbouring checkpoints between which the number of outliers rises fastest."""
    rises = np.diff(found.curve("outliers")) / np.diff(found.epochs)
    start = int(np.argmax(rises))
    return found.epochs[start], found.epochs[start + 1]


def _fallen(found: Run, epoch: float) -> float:
    """Share of the whole fall of the validation loss that is done at this epoch."""
    losses = [moment.validation_loss for moment in found.moments]
    now = float(np.interp(epoch, found.epochs, losses))
    return (losses[0] - now) / (losses[0] - min(losses))


def _grid(runs: list[Run], height: float = 3.2, **options: Any) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    columns = min(2, len(runs))
    rows = -(-len(runs) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.6 * columns, height * rows), squeeze=False, **options)
    for unused in axes.flat[len(runs) :]:
        unused.set_axis_off()
    return figure, list(axes.flat)


def _outlier_figure(runs: list[Run]) -> bytes:
    with house_style():
        figure, axes = _grid(runs)
        for ax, found in zip(axes, runs):
            ax.plot(found.epochs, found.curve("outliers"), "o-", color=COLOURS[0], markersize=4, label="outliers")
            ax.plot(found.epochs, found.curve("outliers_uncentered"), ":", color=COLOURS[5], label="outliers, published rule")
            ax.set(xlabel="epoch", ylabel="examples", title=found.setting.label)
            ax.set_yscale("symlog", linthresh=10)
            other = ax.twinx()
            other.plot(
                found.epochs, [m.validation_loss for m in found.moments], "s-", color=COLOURS[1], markersize=3,
                label="validation loss",
            )  # fmt: skip
            other.grid(visible=False)
            other.spines["right"].set_visible(True)
            other.set_ylabel("validation loss in nats")
            ax.axvline(found.moments[found.best].epoch, color="#777777", linestyle=":", linewidth=1)
            lines = [*ax.get_lines()[:2], other.get_lines()[0]]
            ax.legend(lines, [line.get_label() for line in lines], fontsize=8, loc="center right")
        return figure_png(figure)


def _projection_figure(config: OutlierConfig, runs: list[Run]) -> bytes:
    from matplotlib.colors import LogNorm

    edges = symmetric_log_bins(config.low, config.high).tolist()
    with house_style():
        figure, axes = _grid(runs)
        for ax, found in zip(axes, runs):
            counts = np.asarray([moment.histogram for moment in found.moments], dtype=float).T
            shares = np.ma.masked_equal(counts / counts.sum(0), 0)
            norm = LogNorm(1 / counts.sum(0).max(), 1)
            image = ax.imshow(shares, origin="lower", aspect="auto", cmap="viridis", norm=norm)
            ticks = [i for i, edge in enumerate(edges) if abs(math.log10(abs(edge)) % 2) < 1e-6]
            ax.set_yticks([i + 0.5 for i in ticks], [f"{edges[i]:g}" for i in ticks], fontsize=7)
            places = range(0, len(found.moments), max(1, len(found.moments) // 6))
            ax.set_xticks(list(places), [f"{found.moments[i].epoch:.1f}" for i in places])
            ax.set(xlabel="epoch", ylabel="projection a", title=found.setting.label)
            ax.grid(visible=False)
            figure.colorbar(image, ax=ax, label="share of the examples")
        return figure_png(figure)


def _trimmed_figure(runs: list[Run]) -> bytes:
    import matplotlib.pyplot as plt

    with house_style():
        figure, ax = plt.subplots(figsize=(6.4, 4))
        for found, colour in zip(runs, COLOURS):
            ax.plot(found.epochs, found.curve("eigenvalue"), "-", color=colour, label=found.setting.label)
            ax.plot(found.epochs, found.curve("trimmed_eigenvalue"), "--", color=colour)
        ax.set(xlabel="epoch", ylabel="λ max (dashed: trimmed)", yscale="log")
        ax.legend()
        return figure_png(figure)


def _drift_figure(runs: list[Run]) -> bytes:
    import matplotlib.pyplot as plt

    with house_style():
        figure, ax = plt.subplots(figsize=(6.4, 4))
        for found, colour in zip(runs, COLOURS):
            ratio = np.asarray(found.curve("drift")) / np.maximum(found.curve("diffusion"), 1e-30)
            ax.plot(found.epochs, ratio, color=colour, label=found.setting.label)
        ax.axhline(1.0, color="#777777", linestyle=":", linewidth=1)
        ax.set(xlabel="epoch", ylabel="drift / diffusion", yscale="log")
        ax.legend()
        return figure_png(figure)


def _picture_figure(dataset: Dataset, indices: Sequence[int]) -> bytes:
    import matplotlib.pyplot as plt

    with house_style():
        columns = min(5, len(indices))
        rows = -(-len(indices) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(1.5 * columns, 1.75 * rows), squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        for ax, index in zip(axes.flat, indices):
            ax.imshow(_picture(dataset.train_inputs[index]), cmap="gray_r")
            ax.set_title(f"{index}: {int(dataset.train_targets[index])}", fontsize=8)
        return figure_png(figure)


def _picture(image: Tensor) -> np.ndarray:
    """``[height, width]`` or ``[height, width, 3]`` between 0 and 1."""
    low, high = image.amin(), image.amax()
    scaled = ((image - low) / (high - low).clamp_min(1e-12)).cpu()
    return scaled[0].numpy() if image.shape[0] == 1 else scaled.permute(1, 2, 0).numpy()


if __name__ == "__main__":
    main()
