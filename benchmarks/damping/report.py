"""What a sweep came to: the trials as a table, one summary per setting, the study's findings, pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.common.figures import COLOURS, Curve, Figure, finish, line_figure, plt, subplots
from benchmarks.common.report import Finding, Report, Table, findings_table, verdict
from benchmarks.common.results import write_text
from benchmarks.common.tasks import Task
from benchmarks.damping.config import SEARCHED, Setting, SweepConfig
from benchmarks.damping.spectra import Spectra, follow_spectra
from benchmarks.damping.sweep import RESULT, open_searches

COLUMNS = (
    *("setting", "optimizer", "damping", "trial", "training_seed", *SEARCHED),
    *("initial_loss", "final_loss", "test_loss", "test_error", "diverged_step", "num_steps"),
    *("seconds", "compute_seconds", "trial_seconds"),
)
MANY_DIVERGED, EARLY, STANDARD_ERRORS = 0.5, 0.8, 2.0
Summary = dict[str, Any]


def load_trials(config: SweepConfig) -> pd.DataFrame:
    """All finished trials of the sweep, a row each: ``COLUMNS``, the ``curve`` and the ``histograms``."""
    rows = []
    for setting, search in open_searches(config).items():
        for trial in search.finished():
            seconds = trial.duration.total_seconds() if trial.duration is not None else math.nan
            known = {"setting": setting.key, "optimizer": setting.optimizer, "damping": setting.damping}
            rows.append({**known, "trial": trial.number, **trial.params, **trial.user_attrs[RESULT], "trial_seconds": seconds})
    trials = pd.DataFrame(rows, columns=[*COLUMNS, "curve", "histograms", "message"])
    return trials.assign(diverged=trials["diverged_step"].notna())


def keep_best(config: SweepConfig, trials: pd.DataFrame) -> pd.DataFrame:
    """Of each setting the healthy trials with the lowest final training loss: ``num_kept`` of ``num_trials``.

    A search that is not finished keeps the same share of what it has.
    """
    share = trials.groupby("setting")["trial"].transform("size").clip(upper=config.num_trials) / config.num_trials
    healthy = trials.assign(number=np.ceil(config.num_kept * share))[~trials["diverged"]]
    healthy = healthy.sort_values(["setting", "final_loss", "trial"])
    return healthy[healthy.groupby("setting").cumcount() < healthy["number"]]


def summarize(config: SweepConfig, trials: pd.DataFrame) -> list[Summary]:
    """One summary per setting, in the order of the pictures; means are over the kept trials.

    ``diverged_startup``: share of diverged trials among the first random ones, whose learning rates and momenta are the same
    at every damping. ``kept``: median and quartiles of the searched values. ``gradient_levels``: per step, mean over trials of
    the mean log10 of the squared gradient (layers averaged), and its standard error.
    """
    best = keep_best(config, trials)
    return [
        _summarize_one(config, setting, trials[trials["setting"] == setting.key], best[best["setting"] == setting.key])
        for setting in config.settings()
    ]


def _summarize_one(config: SweepConfig, setting: Setting, trials: pd.DataFrame, kept: pd.DataFrame) -> Summary:
    curves = np.array(kept["curve"].to_list(), dtype=float).reshape(len(kept), -1 if len(kept) else 0)
    interval, num_steps = config.read_interval, config.task.steps
    ends = [min((index + 1) * interval, num_steps) for index in range(curves.shape[1])]
    quartiles = kept[list(SEARCHED)].quantile([0.5, 0.25, 0.75])
    some = len(kept) > 0
    return {
        "setting": {"key": setting.key, "optimizer": setting.optimizer, "damping": setting.damping},
        "label": setting.label,
        "num_finished": len(trials),
        "num_diverged": int(trials["diverged"].sum()),
        "share_diverged": float(trials["diverged"].mean()),
        "diverged_startup": float(trials["diverged"][: config.num_startup].mean()),
        "num_kept": len(kept),
        "mean_final_loss": float(kept["final_loss"].mean()),
        "final_losses": kept["final_loss"].to_list(),
        "test_error": float(kept["test_error"].astype(float).mean()),
        "best": kept[list(SEARCHED)].iloc[0].to_dict() if some else {},
        "kept": {key: quartiles[key].to_list() for key in SEARCHED} if some else {},
        "curve_steps": [end - interval / 2 for end in ends] if some else [],
        "curve": curves.mean(0).tolist() if some else [],
        "curve_low": np.percentile(curves, 10, axis=0).tolist() if some else [],
        "curve_high": np.percentile(curves, 90, axis=0).tolist() if some else [],
        "histograms": _sum_histograms(config, kept["histograms"]),
        "gradient_levels": _gradient_levels(config, kept["histograms"]),
    }


def _sum_histograms(config: SweepConfig, histograms: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """Per step and layer ``[zeros, counts of all bins]``, summed over trials."""
    total: dict[str, dict[str, np.ndarray]] = {}
    for found in histograms:
        for step, layers in found.items():
            for layer, (first, zeros, *filled) in layers.items():
                none = np.zeros(config.histogram.num_bins + 1, dtype=np.int64)
                counts = total.setdefault(step, {}).setdefault(layer, none)
                counts[0] += zeros
                counts[1 + first : 1 + first + len(filled)] += np.array(filled, dtype=np.int64)
    return {step: {layer: counts.tolist() for layer, counts in layers.items()} for step, layers in total.items()}


def _gradient_levels(config: SweepConfig, histograms: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    histogram = config.histogram
    middles = histogram.low + histogram.width * (np.arange(histogram.num_bins) + 0.5)

    def level(counts: Sequence[int]) -> float:
        filled = np.asarray(counts[1:], dtype=float)
        return float((filled * middles).sum() / filled.sum()) if filled.sum() else math.nan

    levels = pd.DataFrame(
        {step: pd.Series([level(c) for c in layers.values()]).mean() for step, layers in _sum_histograms(config, [found]).items()}
        for found in histograms
    )
    return {step: [float(levels[step].mean()), float(levels[step].sem())] for step in levels}


def make_report(config: SweepConfig) -> Report:
    """Reads the trials of a sweep, follows the best ones' eigenvalues, and draws everything."""
    trials = load_trials(config)
    summaries = summarize(config, trials)
    spectra: Spectra = {}
    if config.num_spectra:
        spectra = follow_spectra(config, keep_best(config, trials), Task(config.task, config.data_root, config.device))
    write_text(config.folder / "trials.csv", trials[list(COLUMNS)].to_csv(index=False, float_format="%.6g"))
    checked = {name: findings(config, summaries, name) for name in config.damped}
    seconds = trials[["trial_seconds", "compute_seconds"]].sum()
    speed = {"trials_per_minute": 60 * len(trials) / seconds.iloc[0], "compute_share": seconds.iloc[1] / seconds.iloc[0]}
    least, most = (int(end) for end in trials.groupby("setting").size().agg(["min", "max"]))
    finished = f"{most}" if least == most else f"{least} to {most}"
    title = f"The effect of damping: {config.name}"
    hidden = [{} if config.shows_histogram(s["setting"]["damping"]) else {"histograms": {}} for s in summaries]
    small = [{**summary, **without} for summary, without in zip(summaries, hidden, strict=True)]
    return Report(
        title=title,
        text=[
            f"{len(summaries)} settings, {finished} of {config.num_trials} trials each: learning rate, "
            "its linear decay and momentum are searched (tree-structured Parzen estimator) for every damping alone; "
            f"{config.task.steps} steps of batch {config.task.batch_size} on {config.task.data.name}, weights and batches of "
            f"trial k the same at every damping. Curves are means over the {config.num_kept} of {config.num_trials} trials with "
            "the lowest final training loss, bands run from the 10th to the 90th percentile. Diverged trials are counted and "
            "stay out of the means.",
            f"One worker ran {speed['trials_per_minute']:.1f} trials per minute; {speed['compute_share']:.0%} of a trial was "
            "forward, backward and step.",
        ],
        tables=[
            Table.of("Final training loss in nats; values: median over the kept trials.", [_row(s) for s in summaries]),
            *[findings_table(f"Fujimori, Nagase & Naganuma, beside {name}", found) for name, found in checked.items() if found],
        ],
        findings=[finding for found in checked.values() for finding in found],
        figures=_figures(config, summaries, spectra),
        content=_rounded({"settings": small, "spectra": spectra, "speed": speed}),
        scalars=_scalars(summaries, spectra) if config.tensorboard else {},
    )


def _row(summary: Summary) -> dict[str, Any]:
    losses = summary["final_losses"]
    mean = f"{summary['mean_final_loss']:.4f} ± {np.std(losses):.4f}" if losses else "—"
    return {
        "setting": summary["label"],
        "trials": summary["num_finished"],
        "diverged": f"{summary['num_diverged']} ({summary['share_diverged']:.0%})",
        "final loss (mean of kept)": mean,
        "best": losses[0] if losses else None,
        "test error %": 100 * summary["test_error"],
        **{key: summary["kept"][key][0] if losses else None for key in SEARCHED},
    }


def findings(config: SweepConfig, summaries: Sequence[Summary], optimizer: str) -> list[Finding]:
    """What the study found, for the settings of one optimizer with damping."""
    chosen = [s for s in summaries if s["setting"]["optimizer"] == optimizer and s["num_finished"]]
    healthy = [s for s in chosen if s["num_kept"]]
    if len(chosen) < 3 or not healthy:
        return []
    smallest, largest, best = chosen[0], chosen[-1], min(healthy, key=lambda s: s["mean_final_loss"])
    ends = {s["label"]: s["diverged_startup"] for s in (smallest, chosen[len(chosen) // 2], largest)}
    reached = math.nan
    if largest["num_kept"]:
        there = [x for x, y in zip(best["curve_steps"], best["curve"], strict=True) if y <= largest["curve"][-1]]
        reached = min(there, default=math.inf)
    return [
        Finding(
            "A middle damping gives the lowest final loss (1e0 there); both ends are worse.",
            "the lowest mean final loss is at neither end",
            {s["label"]: s["mean_final_loss"] for s in healthy},
            verdict(best is not smallest and best is not largest),
        ),
        Finding(
            "The smallest damping (1e-5) diverges.",
            f"more than {MANY_DIVERGED:.0%} of its random trials diverge, whose rates and momenta are the same at every damping",
            ends,
            verdict(smallest["diverged_startup"] > MANY_DIVERGED),
        ),
        Finding(
            "The largest damping (1e2) is slow.",
            f"the best damping is at the largest one's last loss within {EARLY:.0%} of the steps",
            {"steps of the best": reached, "steps": config.task.steps},
            verdict(None if math.isnan(reached) else reached <= EARLY * config.task.steps),
        ),
        _gradients(config, chosen, "Early in training larger damping gives larger gradients (it leaves the plateau).", 0, 1),
        _gradients(config, chosen, "Late in training smaller damping gives larger gradients.", -1, -1),
    ]


def _gradients(config: SweepConfig, chosen: list[Summary], statement: str, position: int, sign: int) -> Finding:
    """Mean log10 of the squared gradient at one histogram, ends of the shown dampings compared."""
    rule = f"mean log10 g² of the ends of the shown dampings differs that way by more than {STANDARD_ERRORS:g} standard errors"
    shown = [s for s in chosen if config.shows_histogram(s["setting"]["damping"])]
    wanted = [s for s in shown if s["gradient_levels"]]
    if len(wanted) < 2:
        return Finding(statement, rule, {}, "not shown")
    step = sorted(wanted[0]["gradient_levels"], key=int)[position]
    levels = {s["label"]: s["gradient_levels"][step] for s in wanted}
    (first, first_error), *_, (last, last_error) = levels.values()
    error = math.hypot(first_error, last_error)
    clear = abs(last - first) > STANDARD_ERRORS * error
    numbers = {"step": float(step), **{label: mean for label, (mean, _) in levels.items()}, "standard error": error}
    return Finding(statement, rule, numbers, verdict(sign * (last - first) > 0 if clear else None))


def _scalars(summaries: Sequence[Summary], spectra: Spectra) -> dict[str, list[tuple[int, float]]]:
    scalars = {}
    for summary in summaries:
        key = summary["setting"]["key"]
        scalars[f"{key}/training_loss"] = [(round(x), y) for x, y in zip(summary["curve_steps"], summary["curve"], strict=True)]
        scalars[f"{key}/share_diverged"] = [(0, summary["share_diverged"])]
        found = spectra.get(key, {})
        scalars[f"{key}/smallest_damped_eigenvalue"] = [(int(step), min(v["smallest"])) for step, v in found.items()]
        scalars[f"{key}/largest_condition_number"] = [(int(step), max(v["condition"])) for step, v in found.items()]
    return scalars


def _figures(config: SweepConfig, summaries: Sequence[Summary], spectra: Spectra) -> dict[str, Figure]:
    drawn: dict[str, Figure] = {}
    plain = [s for s in summaries if s["setting"]["damping"] is None]
    for name in config.damped:
        mine = [s for s in summaries if s["setting"]["optimizer"] == name]
        suffix = "" if len(config.damped) == 1 else f"_{name}"
        if any(s["num_kept"] for s in mine):
            drawn[f"learning_curves{suffix}"] = _learning_curves(config, name, [*plain, *mine])
        shown = [s for s in mine if s["histograms"] and config.shows_histogram(s["setting"]["damping"])]
        if shown:
            drawn[f"gradients{suffix}"] = _gradient_histograms(config, name, shown)
        if any(s["setting"]["key"] in spectra for s in mine):
            drawn[f"eigenvalues{suffix}"] = _eigenvalues(config, name, spectra, mine)
    return {"final_loss": _final_losses(config, summaries), "best_values": _best_values(config, summaries), **drawn}


def _colour(config: SweepConfig, summary: Summary) -> Any:
    """From dark (small) to light (large) along the grid; black without damping."""
    if summary["setting"]["damping"] is None:
        return "#000000"
    grid = sorted(config.dampings)
    return plt.get_cmap("viridis")(0.92 * grid.index(summary["setting"]["damping"]) / max(1, len(grid) - 1))


def _learning_curves(config: SweepConfig, name: str, summaries: Sequence[Summary]) -> Figure:
    curves = [
        Curve(
            *(summary[key] for key in ("label", "curve_steps", "curve", "curve_low", "curve_high")),
            _colour(config, summary),
            "--" if summary["setting"]["damping"] is None else "-",
        )
        for summary in summaries
        if summary["num_kept"]
    ]
    caption = f"Learning curves, {name}: mean of the kept trials."
    return line_figure(caption, curves, x_label="step", y_label="training loss in nats", beside=True)


def _final_losses(config: SweepConfig, summaries: Sequence[Summary]) -> Figure:
    """Final training loss against damping, with the share of diverged trials as bars."""
    figure, axes = subplots()
    shares = axes.twinx()
    for number, name in enumerate(config.damped):
        chosen = [s for s in summaries if s["setting"]["optimizer"] == name]
        dampings = np.array([s["setting"]["damping"] for s in chosen], dtype=float)
        bars = [100 * s["share_diverged"] for s in chosen]
        shares.bar(dampings * 1.3**number, bars, 0.25 * dampings, color=COLOURS[number], alpha=0.2)
        healthy = [s for s in chosen if s["num_kept"]]
        x = [s["setting"]["damping"] for s in healthy]
        look = {"color": COLOURS[number]}
        axes.plot(x, [s["mean_final_loss"] for s in healthy], "o-", label=f"{name}, mean of kept trials", **look)
        axes.plot(x, [s["final_losses"][0] for s in healthy], "v:", label=f"{name}, best trial", **look)
    for summary in summaries:
        if summary["setting"]["damping"] is None and summary["num_kept"]:
            axes.axhline(summary["mean_final_loss"], color="#000000", linestyle="--", label=summary["label"])
    axes.set(xscale="log", xlabel="damping", ylabel="final training loss in nats")
    if any(s["num_kept"] for s in summaries):  # else the axis has no number to show
        axes.set_yscale("log")
    shares.set(ylabel="diverged trials in % (bars)", ylim=(0, 100))
    shares.grid(visible=False)
    axes.set_zorder(shares.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.legend(fontsize=8)
    return finish(figure, "Final loss and diverged trials per damping.")


def _best_values(config: SweepConfig, summaries: Sequence[Summary]) -> Figure:
    """Searched values per damping: the best trial's, and median and quartiles over the kept trials."""
    figure, panels = subplots(1, len(SEARCHED), figsize=(10.5, 3.4))
    names = ("learning rate", "linear decay", "momentum")
    for axes, key, title in zip(panels, SEARCHED, names, strict=True):
        for number, name in enumerate(config.damped):
            chosen = [s for s in summaries if s["setting"]["optimizer"] == name and s["num_kept"]]
            x = np.array([s["setting"]["damping"] for s in chosen], dtype=float)
            middle, low, high = (np.array([s["kept"][key][part] for s in chosen]) for part in range(3))
            axes.errorbar(x, middle, [middle - low, high - middle], fmt="o-", color=COLOURS[number], capsize=3, label=name)
            axes.plot(x, [s["best"][key] for s in chosen], "*", color=COLOURS[number], markersize=10)
        axes.set(xscale="log", xlabel="damping", title=title)
        if config.search[key].log:
            axes.set_yscale("log")
    return finish(figure, "Searched values per damping: median and quartiles of the kept trials, star: best trial.")


def _gradient_histograms(config: SweepConfig, name: str, summaries: Sequence[Summary]) -> Figure:
    """Squared mini-batch gradients per layer: one row per damping, one column per step."""
    histogram, steps = config.histogram, sorted(summaries[0]["histograms"], key=int)
    edges = histogram.low + histogram.width * np.arange(histogram.num_bins + 1)

    def shares(counts: Sequence[int]) -> np.ndarray:
        return 100 * np.array(counts) / max(1, sum(counts))

    most = np.max([shares(c)[1:] for s in summaries for step in steps for c in s["histograms"][step].values()], axis=0)
    filled = np.flatnonzero(most > 1e-1)
    low, high = (edges[filled[0]], edges[filled[-1] + 1]) if len(filled) else (edges[0], edges[-1])
    size = (2.1 * len(steps) + 1.2, 1.7 * len(summaries) + 0.8)
    figure, panels = subplots(len(summaries), len(steps), figsize=size, sharex=True, sharey=True, squeeze=False)
    for row, summary in zip(panels, summaries, strict=True):
        for axes, step in zip(row, steps, strict=True):
            for number, (layer, counts) in enumerate(summary["histograms"][step].items()):
                colour, share = COLOURS[number % len(COLOURS)], shares(counts)
                axes.stairs(share[1:], edges, color=colour, label=f"layer {layer}")
                axes.plot([low - 2 * histogram.width], [share[0]], "x", color=colour, markersize=4)
            axes.set(xlim=(low - 3 * histogram.width, high))
        row[0].set_ylabel(summary["label"], fontsize=8)
    for axes, step in zip(panels[0], steps, strict=True):
        axes.set_title(f"step {step}")
    figure.supxlabel("log10 of the squared gradient (× at the left: exact zeros)", fontsize=9)
    figure.supylabel("share of entries in %", fontsize=9)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return finish(figure, f"Squared mini-batch gradients per layer during training, {name}, kept trials together.")


def _eigenvalues(config: SweepConfig, name: str, spectra: Spectra, summaries: Sequence[Summary]) -> Figure:
    """Smallest eigenvalue (of the worst block) and condition number (of the worst block) during training."""
    figure, panels = subplots(1, 2, figsize=(10.5, 4.0))
    parts = (("smallest", min, "smallest eigenvalue of a damped block"), ("condition", max, "largest condition number"))
    for axes, (key, worst, y_label) in zip(panels, parts, strict=True):
        for summary in summaries:
            found = spectra.get(summary["setting"]["key"], {})
            steps = sorted(found, key=int)
            values = [worst(found[step][key]) for step in steps]
            axes.plot([int(step) for step in steps], values, "o-", color=_colour(config, summary), label=summary["label"])
        axes.set(yscale="log", xlabel="step", ylabel=y_label)
    panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    caption = f"Positive definiteness, {name}: the worst block's smallest eigenvalue and condition, best runs."
    return finish(figure, caption)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value
