"""The pictures of the study, each as PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.common.figures import COLOURS, Curve, figure_png, house_style, line_figure
from benchmarks.damping.config import SEARCHED, Setting, SweepConfig
from benchmarks.damping.results import SettingSummary, setting_label
from benchmarks.damping.spectra import Spectra

NAMES = {"lr": "learning rate", "momentum": "momentum", "lr_decay": "linear decay"}


def damping_colour(config: SweepConfig, setting: Setting) -> Any:
    """From dark (small) to light (large) along the grid; black without damping."""
    if setting.damping is None:
        return "#000000"
    grid = sorted(config.dampings)
    return plt.get_cmap("viridis")(0.92 * grid.index(setting.damping) / max(1, len(grid) - 1))


def learning_curves(config: SweepConfig, summaries: Sequence[SettingSummary]) -> bytes:
    """Mean mini-batch loss of the kept trials per setting, with the band from the 10th to the 90th percentile."""
    curves = [
        Curve(
            summary.label,
            summary.curve_steps,
            summary.curve,
            summary.curve_low,
            summary.curve_high,
            damping_colour(config, summary.setting),
            "--" if summary.setting.damping is None else "-",
        )
        for summary in summaries
        if summary.num_kept
    ]
    return line_figure(curves, x_label="step", y_label="training loss in nats")


def final_losses(config: SweepConfig, summaries: Sequence[SettingSummary]) -> bytes:
    """Final training loss against damping, with the share of diverged trials as bars."""
    with house_style():
        figure, axes = plt.subplots()
        shares = axes.twinx()
        for number, name in enumerate(_damped(config)):
            chosen = [s for s in summaries if s.setting.optimizer == name]
            dampings = np.array([s.setting.damping for s in chosen], dtype=float)
            colour = COLOURS[number]
            width = 0.25 * dampings
            shares.bar(dampings * 1.3**number, [100 * s.share_diverged for s in chosen], width, color=colour, alpha=0.2)
            healthy = [s for s in chosen if s.num_kept]
            x = [s.setting.damping for s in healthy]
            axes.plot(x, [s.mean_final_loss for s in healthy], "o-", color=colour, label=f"{name}, mean of kept trials")
            axes.plot(x, [s.final_losses[0] for s in healthy], "v:", color=colour, label=f"{name}, best trial")
        for summary in summaries:
            if summary.setting.damping is None and summary.num_kept:
                axes.axhline(summary.mean_final_loss, color="#000000", linestyle="--", label=summary.label)
        axes.set(xscale="log", xlabel="damping", ylabel="final training loss in nats")
        if any(s.num_kept for s in summaries):  # else the axis has no number to show
            axes.set_yscale("log")
        shares.set(ylabel="diverged trials in % (bars)", ylim=(0, 100))
        shares.grid(visible=False)
        axes.set_zorder(shares.get_zorder() + 1)
        axes.patch.set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        return figure_png(figure)


def best_values(config: SweepConfig, summaries: Sequence[SettingSummary]) -> bytes:
    """Searched values per damping: the best trial's, and median and quartiles over the kept trials."""
    with house_style():
        figure, panels = plt.subplots(1, len(SEARCHED), figsize=(10.5, 3.4))
        for axes, key in zip(panels, SEARCHED, strict=True):
            for number, name in enumerate(_damped(config)):
                chosen = [s for s in summaries if s.setting.optimizer == name and s.num_kept]
                x = np.array([s.setting.damping for s in chosen], dtype=float)
                middle, low, high = (np.array([s.kept[key][part] for s in chosen]) for part in range(3))
                axes.errorbar(x, middle, [middle - low, high - middle], fmt="o-", color=COLOURS[number], capsize=3)
                axes.plot(x, [s.best[key] for s in chosen], "*", color=COLOURS[number], markersize=10)
            axes.set(xscale="log", xlabel="damping", title=NAMES[key])
            if config.search[key].log:
                axes.set_yscale("log")
        return figure_png(figure)


def gradient_histograms(config: SweepConfig, summaries: Sequence[SettingSummary], optimizer: str) -> bytes | None:
    """Squared mini-batch gradients per layer: one row per damping, one column per step; None without histograms."""
    wanted = [
        summary
        for damping in config.histogram.dampings
        for summary in summaries
        if summary.setting.optimizer == optimizer and summary.histograms and _same(summary.setting.damping, damping)
    ]
    if not wanted:
        return None
    steps = sorted(wanted[0].histograms, key=int)
    histogram = config.histogram
    edges = histogram.low + histogram.width * np.arange(histogram.num_bins + 1)
    shares = [_layer_shares(summary.histograms[step]) for summary in wanted for step in steps]
    low, high = _filled_range(shares, edges)
    zero_at = low - 2 * histogram.width
    with house_style():
        size = (2.1 * len(steps) + 1.2, 1.7 * len(wanted) + 0.8)
        figure, panels = plt.subplots(len(wanted), len(steps), figsize=size, sharex=True, sharey=True, squeeze=False)
        for index, layers in enumerate(shares):
            row, column = divmod(index, len(steps))
            axes = panels[row][column]
            for number, (layer, share) in enumerate(layers.items()):
                axes.stairs(share[1:], edges, color=COLOURS[number % len(COLOURS)], label=f"layer {layer}")
                axes.plot([zero_at], [share[0]], "x", color=COLOURS[number % len(COLOURS)], markersize=4)
            axes.set(xlim=(zero_at - histogram.width, high))
            if row == 0:
                axes.set_title(f"step {steps[column]}")
            if column == 0:
                axes.set_ylabel(setting_label(wanted[row].setting), fontsize=8)
        figure.supxlabel("log10 of the squared gradient (× at the left: exact zeros)", fontsize=9)
        figure.supylabel("share of entries in %", fontsize=9)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=7)
        return figure_png(figure)


def _layer_shares(layers: dict[str, list[int]]) -> dict[str, np.ndarray]:
    return {layer: 100 * np.array(counts) / max(1, sum(counts)) for layer, counts in layers.items()}


def _filled_range(shares: Sequence[dict[str, np.ndarray]], edges: np.ndarray) -> tuple[float, float]:
    """From the first to the last bin that holds more than a tenth of a percent of some layer."""
    most = np.max([share[1:] for layers in shares for share in layers.values()], axis=0)
    filled = np.flatnonzero(most > 1e-1)
    return (float(edges[filled[0]]), float(edges[filled[-1] + 1])) if len(filled) else (edges[0], edges[-1])


def eigenvalue_figure(config: SweepConfig, spectra: Spectra, settings: Sequence[Setting]) -> bytes:
    """Smallest eigenvalue (of the worst block) and condition number (of the worst block) during training."""
    parts: list[tuple[str, Callable[[list[float]], float], str]] = [
        ("smallest", min, "smallest eigenvalue of a damped block"),
        ("condition", max, "largest condition number of a damped block"),
    ]
    with house_style():
        figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.0))
        for axes, (key, worst, name) in zip(panels, parts, strict=True):
            for setting in settings:
                found = spectra.get(setting.key, {})
                steps = sorted(found, key=int)
                values = [worst(found[step][key]) for step in steps]
                x = [int(step) for step in steps]
                axes.plot(x, values, "o-", color=damping_colour(config, setting), label=setting_label(setting))
            axes.set(yscale="log", xlabel="step", ylabel=name)
        panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return figure_png(figure)


def _damped(config: SweepConfig) -> list[str]:
    return [name for name in config.optimizers if name not in config.without_damping]


def _same(damping: float | None, wanted: float) -> bool:
    return damping is not None and abs(damping / wanted - 1.0) < 1e-6
