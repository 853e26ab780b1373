"""Figures in one house style: readable on a page, told apart by colour and by line, no display needed."""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
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
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
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
house_style = functools.partial(plt.rc_context, HOUSE_STYLE)
"""Context in which figures look like all others."""


@dataclass(frozen=True)
class Figure:
    """A PNG with the sentence below it, and what it shows for readers who do not see it."""

    png: bytes
    caption: str
    description: str

    @property
    def wide(self) -> bool:
        """Whether it wants the page's whole width."""
        width, height = struct.unpack(">II", self.png[16:24])
        return width > 1.9 * height


def subplots(*arguments: Any, **options: Any) -> tuple[Any, Any]:
    """``plt.subplots`` in the house style."""
    plt.rcParams.update(HOUSE_STYLE)
    return plt.subplots(*arguments, **options)


def finish(figure: Any, caption: str) -> Figure:
    """The figure as a picture of a page; it is closed afterwards."""
    description = describe(figure)
    return Figure(figure_png(figure), caption, description)


def figure_png(figure: Any) -> bytes:
    """The figure as PNG; it is closed afterwards."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def describe(figure: Any) -> str:
    """What stands on the axes and in the legends, in words: the text alternative of a picture."""
    parts = []
    for axes in figure.axes:
        labels = [label for label in axes.get_legend_handles_labels()[1] if not label.startswith("_")]
        against = f"{axes.get_ylabel()} against {axes.get_xlabel()}" if axes.get_xlabel() else axes.get_ylabel()
        parts.append(": ".join(part for part in (axes.get_title(), against, ", ".join(labels)) if part))
    return "Figure. " + "; ".join(dict.fromkeys(part for part in parts if part))


@dataclass(frozen=True)
class Curve:
    """One line with its spread: ``x``, ``middle`` and the band from ``low`` to ``high``, all of one length."""

    label: str
    x: Sequence[float]
    middle: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: Any = None
    style: str = "-"


def line_figure(
    caption: str,
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = True,
    level: tuple[float, str] | None = None,
    beside: bool = False,
) -> Figure:
    """``curves``; ``level`` is a horizontal line with its label, ``beside`` puts the legend where no curve is."""
    figure, axes = subplots()
    for index, curve in enumerate(curves):
        colour = curve.colour or COLOURS[index % len(COLOURS)]
        axes.plot(curve.x, curve.middle, curve.style, color=colour, label=curve.label)
        if curve.low is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    if level is not None:
        axes.axhline(level[0], color="#777777", linewidth=1.0, linestyle=":", label=level[1])
    axes.set(xlabel=x_label, ylabel=y_label)
    if log_y and curves:
        axes.set_yscale("log")
    axes.legend(**({"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0} if beside else {}))
    return finish(figure, caption)


def spread(label: str, xs: Sequence[Sequence[float]], ys: Sequence[Sequence[float]], **look: Any) -> Curve:
    """Median of several runs with the band from the lowest to the highest.

    Runs may have points at different ``x`` (seconds): all are read off, by interpolation, at those of the first run,
    as far as the shortest run goes; runs that broke off earlier than the longest are left out of the median.
    """
    longest = max(len(x) for x in xs)
    whole = [(np.asarray(x, float), np.asarray(y, float)) for x, y in zip(xs, ys, strict=True) if len(x) == longest]
    end = min(x[-1] for x, _ in whole)
    grid = whole[0][0] / max(whole[0][0][-1], 1e-12) * end
    values = np.stack([np.interp(grid, x, y) for x, y in whole])
    return Curve(label, grid.tolist(), *(part.tolist() for part in (np.median(values, 0), values.min(0), values.max(0))), **look)
