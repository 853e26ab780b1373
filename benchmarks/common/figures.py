"""Figures in one house style: readable on a page, told apart by colour and by line, no display needed."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: no display is needed

import matplotlib.pyplot as plt
import numpy as np

# Okabe & Ito's colours, which stay apart for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
OPTIMIZER_COLOURS = {"sgd": "#000000", "adamw": "#E69F00", "muon": "#009E73", "kfac": "#0072B2", "ekfac": "#D55E00"}

HOUSE_STYLE: dict[str, Any] = {
    "figure.figsize": (6.4, 4.0),
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "font.size": 10,
}


@dataclass(frozen=True)
class Curve:
    """One line with its spread: ``x``, ``middle`` and the band from ``low`` to ``high``, all of one length."""

    label: str
    x: Sequence[float]
    middle: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: str | None = None
    style: str = "-"


@contextmanager
def house_style() -> Iterator[None]:
    """Figures made inside look like all others."""
    with plt.rc_context(HOUSE_STYLE):
        yield


def line_figure(
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = True,
    level: tuple[float, str] | None = None,
    legend_beside: bool = False,
) -> bytes:
    """PNG of ``curves``; ``level`` is a horizontal line with its label, ``legend_beside`` for curves that leave no room."""
    with house_style():
        figure, axes = plt.subplots()
        for index, curve in enumerate(curves):
            colour = curve.colour or COLOURS[index % len(COLOURS)]
            axes.plot(curve.x, curve.middle, curve.style, color=colour, label=curve.label)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        if level is not None:
            axes.axhline(level[0], color="#777777", linewidth=1.0, linestyle=":", label=level[1])
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        if log_y:
            axes.set_yscale("log")
        if log_x:
            axes.set_xscale("log")
        if legend_beside:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
        else:
            axes.legend()
        return figure_png(figure)


def spread(
    label: str,
    xs: Sequence[Sequence[float]],
    ys: Sequence[Sequence[float]],
    *,
    colour: str | None = None,
    style: str = "-",
) -> Curve:
    """Median of several runs with the band from the lowest to the highest.

    Runs may have points at different ``x`` (seconds): all are read off, by interpolation, at those of the first run,
    as far as the shortest run goes; runs that broke off earlier than the longest are left out of the median.
    """
    longest = max(len(x) for x in xs)
    whole = [(np.asarray(x, float), np.asarray(y, float)) for x, y in zip(xs, ys, strict=True) if len(x) == longest]
    end = min(x[-1] for x, _ in whole)
    grid = whole[0][0] / max(whole[0][0][-1], 1e-12) * end
    values = np.stack([np.interp(grid, x, y) for x, y in whole])
    return Curve(
        label,
        grid.tolist(),
        np.median(values, axis=0).tolist(),
        values.min(axis=0).tolist(),
        values.max(axis=0).tolist(),
        colour,
        style,
    )


def bar_figure(values: Mapping[str, float], *, y_label: str, title: str = "", colours: Sequence[str] | None = None) -> bytes:
    """PNG of one bar per entry with its number on top."""
    with house_style():
        figure, axes = plt.subplots()
        bars = axes.bar(list(values), list(values.values()), color=colours or COLOURS[0], width=0.6)
        axes.bar_label(bars, fmt="%.2f", fontsize=9)
        axes.set(ylabel=y_label, title=title)
        axes.grid(visible=False, axis="x")
        axes.tick_params(axis="x", labelrotation=20 if len(values) > 5 else 0)
        return figure_png(figure)


def heat_figure(
    values: Sequence[Sequence[float]],
    *,
    x_names: Sequence[str],
    y_names: Sequence[str],
    x_label: str,
    y_label: str,
    title: str = "",
    colour_label: str = "",
    marks: Sequence[Sequence[str]] | None = None,
) -> bytes:
    """PNG of a table as colours (logarithmic), rows from the bottom; ``marks`` are written into the cells."""
    from matplotlib.colors import LogNorm

    table = np.asarray(values, dtype=float)
    with house_style():
        figure, axes = plt.subplots(figsize=(5.2, 4.2))
        positive = table[np.isfinite(table) & (table > 0)]
        norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01)) if positive.size else None
        image = axes.imshow(np.ma.masked_invalid(table), origin="lower", cmap="viridis_r", norm=norm, aspect="auto")
        for row, names in enumerate(marks or []):
            for column, name in enumerate(names):
                axes.text(column, row, name, ha="center", va="center", fontsize=8, color="white")
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        axes.set_xticks(range(len(x_names)), x_names)
        axes.set_yticks(range(len(y_names)), y_names)
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, label=colour_label)
        return figure_png(figure)


def figure_png(figure: Any) -> bytes:
    """The figure as PNG; it is closed afterwards."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def save_png(path: str | Path, png: bytes) -> Path:
    """Writes ``png`` to ``path``, making the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png)
    return path
