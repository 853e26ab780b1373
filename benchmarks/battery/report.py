"""Summary, scores, tables and figure, made from the kept JSON alone.

python -m benchmarks.battery.report benchmarks/results/battery/all.json
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.battery.run import steps_to
from benchmarks.battery.tasks import ALL_TASKS, KEPT_ASIDE
from benchmarks.common.results import read_json, write_text
from benchmarks.common.statistics import mean_and_error

REFERENCE = "adamw"
NOT_REACHED = 2.0
MARKERS = {"adamw": "o", "muon": "v", "soap": "^", "shampoo": "s", "sgd": "P"}
Found = dict[str, dict[str, dict[str, Any]]]


def summarize(found: Found, labels: dict[str, str]) -> dict[str, Any]:
    """What is kept of ``found[task][contestant]``: ``settings``, ``runs`` (by seed), ``num_steps``, ``seconds_per_step``."""
    return {
        "labels": labels,
        "tasks": {
            task: {name: _summarize_one(ALL_TASKS[task].steps, entry, by_name.get(REFERENCE)) for name, entry in by_name.items()}
            for task, by_name in found.items()
        },
    }


def _summarize_one(steps: int, entry: dict[str, Any], reference: dict[str, Any] | None) -> dict[str, Any]:
    """Losses and errors by seed; the share of AdamW's steps that each seed needs for AdamW's final loss at that seed."""
    runs = entry["runs"]
    summary = {"settings": entry["settings"], "seconds_per_step": entry["seconds_per_step"]}
    for key in ("final_loss", "test_loss", "test_error"):
        summary[key] = [run[key] for run in runs]
    if reference is not None:
        reached = [
            steps_to(run["losses"], entry["num_steps"], target["final_loss"])
            for run, target in zip(runs, reference["runs"], strict=True)
        ]
        summary["steps"] = [1.0 if entry is reference else value and value / steps for value in reached]
        summary["seconds"] = entry["seconds_per_step"] / reference["seconds_per_step"]
    return summary


def geometric_mean(values: Sequence[float]) -> float:
    """``exp`` of the mean logarithm."""
    return math.exp(sum(map(math.log, values)) / len(values))


def steps_ratio(entry: dict[str, Any]) -> float:
    """Geometric mean over seeds; a seed that did not reach the target counts as ``NOT_REACHED``."""
    return geometric_mean([NOT_REACHED if value is None else value for value in entry["steps"]])


def seconds_ratio(entry: dict[str, Any]) -> float:
    """Steps times what a step costs beside AdamW's."""
    return steps_ratio(entry) * float(entry["seconds"])


def loss(entry: dict[str, Any]) -> float:
    """Geometric mean of the final training loss over seeds; infinite if one broke."""
    values = entry["final_loss"]
    return math.inf if any(value is None or not 0 < value < math.inf for value in values) else geometric_mean(values)


def error(entry: dict[str, Any]) -> tuple[float, float]:
    """Mean test error and its standard error."""
    values = [math.inf if value is None else value for value in entry["test_error"]]
    return (math.inf, 0.0) if math.inf in values else mean_and_error(values)


def scores(content: dict[str, Any], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """By contestant, over the ``tasks`` where it ran: geometric means of its shares, and on how many it is in front.

    ``error_near_best``: the test error is at most one standard error (of the difference) above the lowest.
    """
    table = content["tasks"]
    result: dict[str, dict[str, float]] = {}
    for name in content["labels"]:
        pairs = [(table[task][name], list(table[task].values())) for task in tasks if name in table[task]]
        if not pairs:
            continue
        result[name] = {
            "tasks": len(pairs),
            "steps": geometric_mean([steps_ratio(entry) for entry, _ in pairs]),
            "seconds": geometric_mean([seconds_ratio(entry) for entry, _ in pairs]),
            "reached": sum(None not in entry["steps"] for entry, _ in pairs),
            "lowest_loss": sum(loss(entry) <= min(map(loss, others)) for entry, others in pairs),
            "fastest": sum(seconds_ratio(entry) <= min(map(seconds_ratio, others)) for entry, others in pairs),
            "faster_than_adamw": sum(seconds_ratio(entry) < 1 for entry, _ in pairs),
            "error_near_best": sum(_is_near(error(entry), min(map(error, others))) for entry, others in pairs),
        }
    return result


def _is_near(mine: tuple[float, float], best: tuple[float, float]) -> bool:
    return mine[0] <= best[0] + math.hypot(mine[1], best[1])


def duels(content: dict[str, Any], name: str, other: str) -> tuple[int, int]:
    """On how many tasks ``name`` ends at or below the training loss of ``other``, of how many where both ran."""
    pairs = [(by_name[name], by_name[other]) for by_name in content["tasks"].values() if name in by_name and other in by_name]
    return sum(loss(mine) <= loss(theirs) for mine, theirs in pairs), len(pairs)


SCORE_COLUMNS = {
    "reached": "reaches AdamW's loss",
    "lowest_loss": "lowest loss",
    "fastest": "fastest",
    "faster_than_adamw": "faster than AdamW",
    "error_near_best": "test error near the best",
}


def markdown(content: dict[str, Any]) -> str:
    """All tables; a contestant appears where it ran."""
    table, labels = content["tasks"], content["labels"]
    names = [name for name in labels if any(name in by_name for by_name in table.values())]
    seen = [task for task in table if task not in KEPT_ASIDE]
    aside = [task for task in table if task in KEPT_ASIDE]
    parts = ["# The battery: fifteen tasks, equal search budgets\n"]
    for title, tasks in (("All tasks", seen + aside), ("The three tasks kept aside while defaults were chosen", aside)):
        parts.append(f"## {title}: shares of tuned AdamW's steps and seconds (geometric means), and numbers of tasks\n")
        rows = []
        for name, s in scores(content, tasks).items():
            counts = [str(s[key]) for key in SCORE_COLUMNS]
            rows.append([labels[name], str(s["tasks"]), f"{s['steps']:.2f}", f"{s['seconds']:.2f}", *counts])
        parts.append(_table(["", "tasks", "steps", "seconds", *SCORE_COLUMNS.values()], rows))
    parts.append("## Tasks on which the row ends at or below the column's training loss\n")
    rows = [
        [labels[name], *("" if name == other else "{} of {}".format(*duels(content, name, other)) for other in names)]
        for name in names
    ]
    parts.append(_table(["", *(labels[name] for name in names)], rows))
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("Final training loss (geometric mean of three seeds)", lambda e: f"{loss(e):.3g}"),
        ("Share of AdamW's steps to AdamW's final training loss", lambda e: f"{steps_ratio(e):.2f}{_missed(e)}"),
        ("The same in seconds of processor time", lambda e: f"{seconds_ratio(e):.2f}{_missed(e)}"),
        ("Test error (% wrong, or squared error), mean ± standard error", _error_text),
        (
            "Settings",
            lambda e: (
                ", ".join(
                    f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in e["settings"].items()
                )
                or "defaults"
            ),
        ),
    ]
    for title, text in columns:
        rows = [
            [ALL_TASKS[task].title + (" (kept aside)" if task in aside else "")]
            + [text(_with_unit(task, table[task][name])) if name in table[task] else "" for name in names]
            for task in seen + aside
        ]
        parts.append(f"## {title}\n")
        parts.append(_table(["", *(labels[name] for name in names)], rows))
    parts.append(
        f"A seed that does not reach AdamW's loss counts as {NOT_REACHED:g}; (n) is how many of the seeds did not. Seconds: the "
        "least that a step took in any run, one thread. Losses are means over the last tenth of the mini-batches.\n"
    )
    return "\n".join(parts)


def _with_unit(task: str, entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "percent": ALL_TASKS[task].likelihood == "categorical" or task == "two_digits"}


def _error_text(entry: dict[str, Any]) -> str:
    mean, deviation = error(entry)
    factor = 100 if entry["percent"] else 1
    return f"{factor * mean:.3g} ± {factor * deviation:.1g}"


def _missed(entry: dict[str, Any]) -> str:
    missed = sum(value is None for value in entry["steps"])
    return f" ({missed})" if missed else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def figure(content: dict[str, Any]) -> bytes:
    """PNG: one line for each task, one mark for each contestant, shares of AdamW's steps and seconds."""
    from matplotlib.ticker import FixedLocator, NullLocator

    from benchmarks.common.figures import COLOURS, OPTIMIZER_COLOURS, figure_png, house_style, plt

    table, labels = content["tasks"], content["labels"]
    tasks = [t for t in reversed(table) if t in KEPT_ASIDE] + [t for t in reversed(table) if t not in KEPT_ASIDE]
    colours = {**OPTIMIZER_COLOURS, "soap": COLOURS[5], "shampoo": COLOURS[3], "kfac_searched": COLOURS[1]}
    with house_style():
        canvas, panels = plt.subplots(1, 2, figsize=(12, 0.34 * len(tasks) + 1.6), sharey=True)
        for axes, ratio, title in ((panels[0], steps_ratio, "steps"), (panels[1], seconds_ratio, "seconds")):
            for index, name in enumerate(labels):
                for place in (place for place, task in enumerate(tasks) if name in table[task]):
                    entry = table[tasks[place]][name]
                    fill = "none" if None in entry["steps"] else "full"
                    marker, colour = MARKERS.get(name, "D"), colours.get(name, COLOURS[index % len(COLOURS)])
                    axes.plot(ratio(entry), place, marker, color=colour, fillstyle=fill, markersize=7, alpha=0.85)
                axes.plot(
                    [], [], MARKERS.get(name, "D"), color=colours.get(name, COLOURS[index % len(COLOURS)]), label=labels[name]
                )
            axes.axvline(1.0, color="#777777", linewidth=1.0, zorder=0)
            axes.set(xscale="log", xlabel=f"share of tuned AdamW's {title}")
            axes.xaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10, 20]))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter("{x:g}")
        panels[0].set_yticks(range(len(tasks)), [ALL_TASKS[task].title + ("*" if task in KEPT_ASIDE else "") for task in tasks])
        notes = "hollow: not by every seed\n*: kept aside"
        panels[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, title=notes)
        return figure_png(canvas)


def write(path: Path) -> None:
    """Tables and figure beside the JSON at ``path``."""
    content = read_json(path)
    write_text(path.with_suffix(".md"), markdown(content))
    path.with_suffix(".png").write_bytes(figure(content))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
