"""Pictures of the variance study."""

from __future__ import annotations

from benchmarks.common.figures import COLOURS, figure_png, house_style
from benchmarks.common.page import Figure
from benchmarks.fisher.variance.checks import Check
from benchmarks.fisher.variance.study import Point, VarianceConfig

SHOWN = 1e-10
"""What is smaller than this share of the largest value is left out of a picture."""


def pictures(
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
    from matplotlib.ticker import FormatStrFormatter, LogLocator

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
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes[1].invert_xaxis()
        axes[0].set_ylabel("‖F sampled − F‖ / ‖F‖")
        axes[0].legend()
        return figure_png(figure)


def _sweep_figure(points: list[Point], x_label: str) -> bytes:
    import matplotlib.pyplot as plt

    with house_style():
        figure, ax = plt.subplots(figsize=(5.6, 3.8))
        points = [p for p in points if p.covariance > 0]  # nothing to draw on a logarithmic axis
        x = [p.x for p in points]
        ax.plot(x, [p.covariance for p in points], "o-", color=COLOURS[0], label="‖Cov(I1)‖")
        ax.plot(x, [p.bound for p in points], "--", color=COLOURS[0], label="its bound")
        ax.plot(x, [p.second_covariance for p in points], "s-", color=COLOURS[1], label="‖Cov(I2)‖")
        ax.plot(x, [p.second_bound for p in points], "--", color=COLOURS[1], label="its bound")
        ax.plot(x, [p.fisher_norm**2 for p in points], ":", color="#555555", label="‖F‖²")
        ax.set(xscale="log", yscale="log", xlabel=x_label)
        ax.set_xticks(x, [f"{value:g}" for value in x])
        ax.minorticks_off()
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, SHOWN * high), high)
        ax.legend()
        return figure_png(figure)
