"""Which examples carry the gradient, and when: per-example gradients over a training run (Yashima et al.).

    python -m benchmarks.gradient_outliers --config configs/gradient_outliers/mnist.yaml --data-root data

SGD with several learning rates and batch sizes. At checkpoints, over the whole training set and layer by layer: norms of
the per-example gradients and their outliers, the largest eigenvalue of the empirical Fisher, the projections on its
eigenvector, what is left of the eigenvalue without the tenth of the examples that carry most of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from torch import nn

from benchmarks.common.command import run_command
from benchmarks.common.config import LOCAL, ExperimentConfig, resolved
from benchmarks.common.data import DataConfig, Dataset, load_data
from benchmarks.common.figures import COLOURS, Figure, finish, subplots
from benchmarks.common.models import build_model
from benchmarks.common.plain_sgd import SGDConfig, train_sgd
from benchmarks.common.report import Finding, Report, Table, findings_table, progress, run_script, verdict
from benchmarks.common.results import RunLog
from benchmarks.common.tasks import evaluate
from kfac_opt.fisher import gradient_statistics, symmetric_log_bins

NETWORK = "(network)"

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


@dataclass(frozen=True, kw_only=True)
class OutlierConfig(ExperimentConfig):
    """The experiment.

    Attributes:
        settings: the runs.
        num_checkpoints: moments of a run that are looked at, from the start to the end, denser at the beginning.
        tolerance: of the eigenvectors.
        low, high: decades of the histogram of the projections.
    """

    data: DataConfig
    model: dict[str, Any]
    settings: list[Setting]
    num_checkpoints: int = 12
    tolerance: float = 1e-3
    low: float = -4.0
    high: float = 3.0
    memory_gib: float = 2.0
    out: Path = field(default=Path("out/gradient_outliers"), metadata=LOCAL)

    def __post_init__(self) -> None:
        if not self.settings or self.num_checkpoints < 3:
            raise ValueError(
                f"settings must not be empty and num_checkpoints >= 3, got {len(self.settings)} settings and "
                f"{self.num_checkpoints} checkpoints"
            )


@dataclass(frozen=True)
class Run:
    """One training run: a row per checkpoint.

    ``step``, ``epoch``, ``train_loss``, ``validation_loss``, ``validation_error``, the ``histogram`` of the network's
    projections in fixed bins, and ``parts``: numbers by layer and for the network, as ``GradientStatistics.summary``.
    """

    setting: Setting
    moments: pd.DataFrame

    def curve(self, key: str, part: str = NETWORK) -> np.ndarray:
        """One number over the checkpoints."""
        return np.array([found[part][key] for found in self.moments["parts"]], dtype=float)

    @property
    def best(self) -> int:
        """The checkpoint with the lowest validation loss."""
        return int(self.moments["validation_loss"].argmin())

    @property
    def last(self) -> dict[str, dict[str, float]]:
        """Numbers by layer and for the network at the end."""
        return self.moments["parts"].iloc[-1]


def main(arguments: Sequence[str] | None = None) -> Report:
    """Runs what is missing and writes the page."""
    return run_script(OutlierConfig, run, arguments, __doc__ or "", "gradient_outliers/digits.yaml")


def run(config: OutlierConfig) -> Report:
    """The experiment; finished runs are read back from ``out``."""
    dataset, log, runs = load_data(config.data, config.data_root).to(config.device), RunLog(config.folder / "runs.jsonl"), []
    shared = {key: value for key, value in resolved(config).items() if key not in ("name", "settings")}
    with progress(len(config.settings) * config.num_checkpoints, config.name) as display:
        for setting in config.settings:
            identity = [shared, resolved(setting)]
            found = log.get(identity, lambda: follow(config, dataset, setting, display.update), run=setting.label)  # noqa: B023
            runs.append(Run(setting, pd.DataFrame(found)))
    return make_report(config, dataset, runs)


def checkpoints(steps: int, number: int) -> list[int]:
    """``number`` steps from 0 to the end, the distances growing with the step."""
    return sorted({round(float(share) * steps) for share in np.linspace(0.0, 1.0, number) ** 2})


def follow(config: OutlierConfig, dataset: Dataset, setting: Setting, on_moment: Callable[[], object]) -> list[dict[str, Any]]:
    """Trains one net and looks at it at every checkpoint."""
    model = build_model(config.model, config.seed).to(config.device)
    per_epoch = len(dataset.train_inputs) // setting.batch_size
    steps = max(1, round(setting.epochs * per_epoch))
    moments: list[dict[str, Any]] = []
    due = set(checkpoints(steps, config.num_checkpoints))

    def look(step: int) -> None:
        if step in due:
            moments.append({"step": step, "epoch": step / per_epoch, **_look(config, model, dataset, setting)})
            on_moment()

    train_sgd(model, dataset, SGDConfig(steps, setting.batch_size, setting.lr, 0.0), config.seed, on_step=look)
    return moments


def _look(config: OutlierConfig, model: nn.Module, dataset: Dataset, setting: Setting) -> dict[str, Any]:
    examples, limit = (dataset.train_inputs, dataset.train_targets), int(config.memory_gib * 2**30)
    found = gradient_statistics(model, examples, tolerance=config.tolerance, memory_limit=limit)
    validation = evaluate(model, dataset.test_inputs, dataset.test_targets)
    return {
        "train_loss": evaluate(model, *examples).loss,
        "validation_loss": validation.loss,
        "validation_error": validation.error,
        "parts": found.summary(setting.batch_size),
        "histogram": found.network.histogram(symmetric_log_bins(config.low, config.high)).tolist(),
    }


def fall(part: dict[str, float]) -> float:
    """Share of the eigenvalue that the trimmed tenth carries."""
    return 1.0 - part["trimmed_eigenvalue"] / part["eigenvalue"] if part["eigenvalue"] > 0 else math.nan


def make_report(config: OutlierConfig, dataset: Dataset, runs: list[Run]) -> Report:
    """Tables, figures, findings."""
    held = findings(runs)
    curves = ("outliers", "eigenvalue", "trimmed_eigenvalue", "drift", "diffusion")
    return Report(
        title=f"Gradient outliers: {config.name}",
        text=[
            f"{config.model['name']} on {len(dataset.train_inputs)} examples of {config.data.name}, plain SGD. Gradients of "
            "all training examples at every checkpoint. Outliers: norm above median + 10 MAD; published rule: norm above 10 "
            "MAD. Trimmed λ: along the same eigenvector, without the tenth of the examples with the largest projections. "
            "Drift: norm of the mean gradient; diffusion: standard deviation of a mini-batch gradient.",
        ],
        tables=[
            Table.of("At the end of each run.", [_row(r, name, part) for r in runs for name, part in r.last.items()]),
            *_rises(runs),
            findings_table("Yashima, Ishikawa, Sato & Matsuoka", held),
        ],
        findings=held,
        figures={
            "outliers": _outlier_figure(runs),
            "projections": _projection_figure(config, runs),
            "trimmed": _trimmed_figure(runs),
        },
        content={
            "bins": symmetric_log_bins(config.low, config.high).tolist(),
            "runs": [{"setting": vars(r.setting), "moments": r.moments.to_dict("records")} for r in runs],
        },
        scalars={
            f"{r.setting.label.replace(' ', '_').replace(',', '')}/{key}": list(
                zip(r.moments["step"], r.moments[key] if key == "validation_loss" else r.curve(key), strict=True)
            )
            for r in runs
            for key in (*curves, "validation_loss")
        },
    )


def _row(found: Run, name: str, part: dict[str, float]) -> dict[str, Any]:
    return {
        "run": found.setting.label,
        "part": name,
        "outliers": int(part["outliers"]),
        "published rule": int(part["outliers_uncentered"]),
        "λ max": part["eigenvalue"],
        "trimmed λ": part["trimmed_eigenvalue"],
        "fall %": 100 * fall(part),
        "|a| < 0.1, %": 100 * part["small_share"],
        "max / median |a|": part["peak_ratio"],
        "drift": part["drift"],
        "diffusion": part["diffusion"],
    }


def _inside(runs: list[Run]) -> list[Run]:
    """Runs whose lowest validation loss is not at an end."""
    return [found for found in runs if 0 < found.best < len(found.moments) - 1]


def _steepest(found: Run) -> int:
    """The checkpoint after which the number of outliers rises fastest."""
    return int(np.argmax(np.diff(found.curve("outliers")) / np.diff(found.moments["epoch"])))


def _rises(runs: list[Run]) -> list[Table]:
    """Where the loss is lowest, and where the outliers rise, in numbers."""
    rows = []
    for found in _inside(runs):
        epochs, losses = found.moments["epoch"], found.moments["validation_loss"]
        outliers, low, first = found.curve("outliers"), found.best, _steepest(found)
        rows.append(
            {
                "run": found.setting.label,
                "lowest validation loss": losses[low],
                "at epoch": epochs[low],
                "outliers rise fastest": f"{outliers[first]:.0f} → {outliers[first + 1]:.0f}",
                "between epochs": f"{epochs[first]:.1f} and {epochs[first + 1]:.1f}",
                "validation losses there": f"{losses[first]:.2f} and {losses[first + 1]:.2f}",
            }
        )
    return [Table.of("Where the loss is lowest and the outliers rise (runs with a minimum inside).", rows)] if rows else []


def findings(runs: list[Run]) -> list[Finding]:
    """The study's findings in numbers; an untrained net has no examples that stand out, and is not counted."""
    trained = [r for r in runs if r.moments["validation_loss"].min() < 0.9 * r.moments["validation_loss"].iloc[0]]
    falls = {r.setting.label: fall(r.last[NETWORK]) for r in trained}
    small = {r.setting.label: r.last[NETWORK]["small_share"] for r in trained}
    grew = {r.setting.label: _grew(r) for r in _inside(runs)}
    learned = "of the runs whose validation loss fell by a tenth"
    return [
        Finding(
            "the largest eigenvalue is carried by few examples: without the tenth it falls by 60 to 99 %",
            f"the whole network's falls by at least 0.6 at the end, share {learned}",
            falls,
            verdict(np.mean([value >= 0.6 for value in falls.values()]) if falls else None),
        ),
        Finding(
            "outliers grow sharply about where the validation loss is lowest",
            "they rise fastest within a factor of two of that epoch: 1; where nine tenths of the loss's fall are done: 0.5; mean "
            "over the runs with a minimum inside",
            grew,
            verdict(np.mean(list(grew.values())) if grew else None),
        ),
        Finding(
            "most projections are near zero",
            f"|a| < 0.1 for more than half of the examples at the end, share {learned}",
            small,
            verdict(np.mean([value > 0.5 for value in small.values()]) if small else None),
        ),
    ]


def _grew(found: Run) -> float:
    """1 where the outliers rise about the lowest validation loss, 0.5 where most of the loss's fall is done, else 0."""
    epochs, losses = (found.moments[key].to_numpy() for key in ("epoch", "validation_loss"))
    outliers = found.curve("outliers")
    start, lowest = _steepest(found), epochs[found.best]
    before, after = np.interp([lowest / 2, min(2 * lowest, epochs[-1])], epochs, outliers)
    if epochs[start + 1] >= lowest / 2 and epochs[start] <= 2 * lowest and after > max(before, 1.0):
        return 1.0
    return 0.5 if losses[0] - losses[start + 1] >= 0.9 * (losses[0] - losses.min()) else 0.0


def _grid(runs: list[Run]) -> tuple[Any, list[Any]]:
    columns = min(2, len(runs))
    rows = -(-len(runs) // columns)
    figure, axes = subplots(rows, columns, figsize=(5.6 * columns, 3.2 * rows), squeeze=False)
    for unused in axes.flat[len(runs) :]:
        unused.set_axis_off()
    return figure, list(axes.flat)


def _outlier_figure(runs: list[Run]) -> Figure:
    figure, panels = _grid(runs)
    for ax, found in zip(panels, runs, strict=False):
        epochs = found.moments["epoch"]
        ax.plot(epochs, found.curve("outliers"), "o-", color=COLOURS[0], markersize=4, label="outliers")
        ax.plot(epochs, found.curve("outliers_uncentered"), ":", color=COLOURS[5], label="outliers, published rule")
        ax.set(xlabel="epoch", ylabel="examples", title=found.setting.label)
        ax.set_yscale("symlog", linthresh=10)
        other = ax.twinx()
        other.plot(epochs, found.moments["validation_loss"], "s-", color=COLOURS[1], markersize=3, label="validation loss")
        other.grid(visible=False)
        other.spines["right"].set_visible(True)
        other.set_ylabel("validation loss in nats")
        ax.axvline(epochs.iloc[found.best], color="#777777", linestyle=":", linewidth=1)
        other.ticklabel_format(useOffset=False)
        lines = [*ax.get_lines()[:2], other.get_lines()[0]]
    figure.legend(lines, [line.get_label() for line in lines], loc="outside upper center", ncols=3)
    caption = "Number of outliers (left axis, whole network) and validation loss (right axis); the dotted line marks its lowest."
    return finish(figure, caption)


def _projection_figure(config: OutlierConfig, runs: list[Run]) -> Figure:
    edges = symmetric_log_bins(config.low, config.high).tolist()
    figure, panels = _grid(runs)
    for ax, found in zip(panels, runs, strict=False):
        counts = np.asarray(found.moments["histogram"].to_list(), dtype=float).T
        shares = np.ma.masked_equal(counts / counts.sum(0), 0)
        image = ax.imshow(shares, origin="lower", aspect="auto", cmap="viridis", norm=LogNorm(1 / counts.sum(0).max(), 1))
        # The middle bin is 0; edges lie half a bin above the one with their number. Every second decade has a label.
        decades = [math.log10(abs(edge)) for edge in edges]
        shown = [i for i, decade in enumerate(decades) if abs(decade % 2 - 1) > 1 - 1e-6 and decade > config.low + 0.5]
        ax.set_yticks([len(edges) // 2, *(i + 0.5 for i in shown)], ["0", *(f"{edges[i]:g}" for i in shown)], fontsize=7)
        places = range(0, len(found.moments), max(1, len(found.moments) // 6))
        ax.set_xticks(list(places), [f"{found.moments['epoch'][i]:.1f}" for i in places])
        ax.set(xlabel="epoch", ylabel="projection a", title=found.setting.label)
        ax.grid(visible=False)
        figure.colorbar(image, ax=ax, label="share of the examples")
    caption = (
        "Projections a of all training gradients on the first eigenvector of the empirical Fisher, over the run: share of "
        "the examples per bin, logarithmic colour."
    )
    return finish(figure, caption)


def _trimmed_figure(runs: list[Run]) -> Figure:
    figure, ax = subplots()
    for found, colour in zip(runs, COLOURS, strict=False):
        ax.plot(found.moments["epoch"], found.curve("eigenvalue"), "-", color=colour, label=found.setting.label)
        ax.plot(found.moments["epoch"], found.curve("trimmed_eigenvalue"), "--", color=colour)
    ax.set(xlabel="epoch", ylabel="λ max (dashed: trimmed)", yscale="log")
    ax.legend()
    return finish(figure, "λ max of the network's empirical Fisher, and without the largest tenth.")


if __name__ == "__main__":
    run_command(main)
