"""Tables and figures of an experiment on weight uncertainty."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.common.figures import COLOURS, Curve, figure_png, house_style, line_figure, spread
from benchmarks.common.page import Figure, Section, Table
from benchmarks.common.progress import duration

HEADER = ("method", "at", "accuracy %", "NLL", "ECE %", "Brier", "AUROC shuffled", "AUROC rotated", "gradients", "time")
Results = dict[str, dict[str, Any]]


def rows(results: Results) -> list[list[str]]:
    """One row per method and way to predict, ``mean ± standard deviation`` over seeds."""
    table = []
    for name, result in results.items():
        summary = result["summary"]
        parts = [(part, word) for part, word in (("mean", "mean"), ("samples", "ensemble")) if summary[part] is not None]
        table += [_row(name, word, summary, part) for part, word in parts]
        if not parts:
            table.append([f"{name} (all diverged)", *["–"] * (len(HEADER) - 1)])
    return table


def _row(name: str, word: str, summary: dict[str, Any], part: str) -> list[str]:
    values = summary[part]
    detection = values["detection"]
    note = f" ({summary['diverged']} diverged)" if summary["diverged"] else ""
    return [
        name + note,
        word,
        _cell(values["accuracy"], 100, 2),
        _cell(values["nll"], 1, 4),
        _cell(values["ece"], 100, 2),
        _cell(values["brier"], 1, 4),
        f"{detection['shuffled']['auroc_entropy']['mean']:.3f}",
        f"{detection['rotated']['auroc_entropy']['mean']:.3f}",
        str(summary["cost"]),
        duration(summary["seconds"]),
    ]


def _cell(value: dict[str, float], scale: float, digits: int) -> str:
    return f"{scale * value['mean']:.{digits}f} ± {scale * value['std']:.{digits}f}"


def curves_figure(results: Results) -> bytes:
    """Accuracy over the training: solid on the test set, dashed on the training set."""
    curves = []
    for index, (name, result) in enumerate(results.items()):
        colour = COLOURS[index % len(COLOURS)]
        runs = [run["curve"] for run in result["runs"]]
        epochs = [run["epochs"] for run in runs]
        curves.append(spread(name, epochs, [run["test_accuracy"] for run in runs], colour=colour))
        training = spread("", epochs, [run["train_accuracy"] for run in runs], colour=colour, style="--")
        curves.append(Curve("_training", training.x, training.middle, colour=colour, style="--"))
    return line_figure(
        curves,
        x_label="epoch",
        y_label="accuracy",
        title="Test (solid) and training (dashed) accuracy",
        log_y=False,
        legend_beside=True,
    )


def reliability_figure(results: Results) -> bytes:
    """Accuracy against confidence: on the diagonal a method is as sure as it is right."""
    import matplotlib.pyplot as plt

    with house_style():
        figure, axes = plt.subplots(figsize=(5.2, 4.6))
        axes.plot([0, 1], [0, 1], ":", color="#777777", linewidth=1.0)
        for index, (name, result) in enumerate(results.items()):
            confidence, accuracy = _joined_diagram([part["reliability"] for part in _best_parts(result)])
            axes.plot(confidence, accuracy, "o-", markersize=3, color=COLOURS[index % len(COLOURS)], label=name)
        axes.set(xlabel="confidence", ylabel="accuracy", title="Reliability on the test set")
        axes.legend()
        return figure_png(figure)


def _joined_diagram(diagrams: list[dict[str, list[Any]]]) -> tuple[list[float], list[float]]:
    """Bins of all seeds together; bins with fewer than ten examples are noise and left out."""
    confidence, accuracy = [], []
    for bins in zip(*[zip(d["counts"], d["confidence"], d["accuracy"], strict=True) for d in diagrams], strict=True):
        total = sum(count for count, _, _ in bins)
        if total >= 10:
            confidence.append(sum(count * (mean or 0.0) for count, mean, _ in bins) / total)
            accuracy.append(sum(count * (share or 0.0) for count, _, share in bins) / total)
    return confidence, accuracy


def _best_parts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The ensemble's values of every run that has some, or else those of the single net."""
    parts = [run["mean"] if run["samples"] is None else run["samples"] for run in result["runs"]]
    return [part for part in parts if part is not None]


def rotation_figure(results: Results) -> bytes:
    """Mean entropy of the prediction while the test images turn."""
    curves = []
    for index, (name, result) in enumerate(results.items()):
        parts = _best_parts(result)
        if not parts:
            continue
        angles = [[point["angle"] for point in part["angles"]] for part in parts]
        entropy = [[point["entropy"] for point in part["angles"]] for part in parts]
        curves.append(spread(name, angles, entropy, colour=COLOURS[index % len(COLOURS)]))
    return line_figure(
        curves,
        x_label="rotation of the test images (degrees)",
        y_label="mean entropy (nats)",
        title="Uncertainty away from the training data",
        log_y=False,
    )


def section(title: str, results: Results, text: list[str]) -> Section:
    """The experiment on one page."""
    caption = "Mean ± standard deviation over seeds; the ensemble of a single net is drawn from its posterior."
    return Section(
        title,
        text,
        [Table(caption, HEADER, rows(results))],
        [
            Figure(curves_figure(results), "Accuracy at the mean of the weights."),
            Figure(reliability_figure(results), "Ensemble where there is one, else the single net."),
            Figure(rotation_figure(results), "Ensemble where there is one, else the single net."),
        ],
    )


def verdict(results: Results, metric: str = "nll") -> str:
    """One sentence: who has the best ensemble."""
    found = {name: _best_parts(result) for name, result in results.items()}
    best = {name: statistics.fmean(part[metric] for part in parts) for name, parts in found.items() if parts}
    if not best:
        return "Every run diverged."
    first, *others = sorted(best, key=best.__getitem__)
    second = f", then {others[0]} ({best[others[0]]:.4f})" if others else ""
    return f"Lowest NLL on the test set: {first} ({best[first]:.4f}){second}."
