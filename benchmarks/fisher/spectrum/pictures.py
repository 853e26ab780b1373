"""Pictures of the spectrum study."""

from __future__ import annotations

import itertools
from typing import Any, Literal

from benchmarks.common.figures import COLOURS, figure_png, house_style
from benchmarks.fisher.spectrum.study import BLOCKS, KINDS, TITLES, Spectrum
from kfac_opt.fisher import SpectralDensity


def panels_figure(table: dict[tuple[str, str], Spectrum], axis: Literal["linear", "log"]) -> bytes:
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


def kfac_figure(table: dict[tuple[str, str], Spectrum], kfac: SpectralDensity) -> bytes:
    import matplotlib.pyplot as plt

    full, blocks = table["exact", "full"].exact, table["exact", "layer_wise"].exact
    floor = full.default_floor()
    with house_style():
        figure, ax = plt.subplots(figsize=(7, 4.2))
        full.plot(ax, floor=floor, label="exact, full", color=COLOURS[0])
        blocks.plot(ax, floor=floor, label="exact, layer-wise", color=COLOURS[2], linestyle="-.")
        kfac.plot(ax, floor=floor, label="K-FAC", color=COLOURS[1], linestyle="--")
        return figure_png(figure)
