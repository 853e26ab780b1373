"""Pictures of the study of gradient outliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.common.data import Dataset
from benchmarks.common.figures import COLOURS, figure_png, house_style
from benchmarks.fisher.outliers.study import OutlierConfig, Run
from kfac_opt.fisher import symmetric_log_bins


def _grid(runs: list[Run], height: float = 3.2, **options: Any) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    columns = min(2, len(runs))
    rows = -(-len(runs) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.6 * columns, height * rows), squeeze=False, **options)
    for unused in axes.flat[len(runs) :]:
        unused.set_axis_off()
    return figure, list(axes.flat)


def outlier_figure(runs: list[Run]) -> bytes:
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
            other.ticklabel_format(useOffset=False)
            lines = [*ax.get_lines()[:2], other.get_lines()[0]]
        figure.legend(lines, [line.get_label() for line in lines], loc="outside upper center", ncols=3)
        return figure_png(figure)


def projection_figure(config: OutlierConfig, runs: list[Run]) -> bytes:
    from matplotlib.colors import LogNorm

    edges = symmetric_log_bins(config.low, config.high).tolist()
    with house_style():
        figure, axes = _grid(runs)
        for ax, found in zip(axes, runs):
            counts = np.asarray([moment.histogram for moment in found.moments], dtype=float).T
            shares = np.ma.masked_equal(counts / counts.sum(0), 0)
            norm = LogNorm(1 / counts.sum(0).max(), 1)
            image = ax.imshow(shares, origin="lower", aspect="auto", cmap="viridis", norm=norm)
            ticks = {len(edges) // 2: "0"}  # the middle bin; edges lie half a bin above the one with their number
            ticks |= {i + 0.5: f"{edge:g}" for i, edge in enumerate(edges) if _is_labelled(edge, config.low)}
            ax.set_yticks(list(ticks), list(ticks.values()), fontsize=7)
            places = range(0, len(found.moments), max(1, len(found.moments) // 6))
            ax.set_xticks(list(places), [f"{found.moments[i].epoch:.1f}" for i in places])
            ax.set(xlabel="epoch", ylabel="projection a", title=found.setting.label)
            ax.grid(visible=False)
            figure.colorbar(image, ax=ax, label="share of the examples")
        return figure_png(figure)


def _is_labelled(edge: float, low: float) -> bool:
    """Every second decade, away from the middle bin."""
    decade = math.log10(abs(edge))
    return decade > low + 0.5 and min(decade % 2, 2 - decade % 2) < 1e-6


def trimmed_figure(runs: list[Run]) -> bytes:
    import matplotlib.pyplot as plt

    with house_style():
        figure, ax = plt.subplots(figsize=(6.4, 4))
        for found, colour in zip(runs, COLOURS):
            ax.plot(found.epochs, found.curve("eigenvalue"), "-", color=colour, label=found.setting.label)
            ax.plot(found.epochs, found.curve("trimmed_eigenvalue"), "--", color=colour)
        ax.set(xlabel="epoch", ylabel="λ max (dashed: trimmed)", yscale="log")
        ax.legend()
        return figure_png(figure)


def drift_figure(runs: list[Run]) -> bytes:
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


def picture_figure(dataset: Dataset, indices: Sequence[int]) -> bytes:
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
