"""Section, page, summary and TensorBoard of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.figures import save_png
from benchmarks.common.page import Figure, Section, Table, machine_footer, write_page
from benchmarks.common.results import describe_machine, describe_versions, provenance, tensorboard_writer, write_json
from benchmarks.common.tasks import Task
from benchmarks.damping import pictures
from benchmarks.damping.config import SweepConfig
from benchmarks.damping.findings import Finding, findings
from benchmarks.damping.results import SettingSummary, Speed, load_rows, measure_speed, summarize, write_table
from benchmarks.damping.spectra import Spectra, follow_spectra

HEADER = ("setting", "trials", "diverged", "final loss (mean of kept)", "best", "test error", "lr", "momentum", "decay")


@dataclass(frozen=True)
class Report:
    """Everything that a sweep came to."""

    config: SweepConfig
    summaries: list[SettingSummary]
    spectra: Spectra
    findings: dict[str, list[Finding]]
    speed: Speed
    section: Section
    stems: list[str]


def make_report(config: SweepConfig, title: str) -> Report:
    """Reads the trials of a sweep and writes the table, the summary and the TensorBoard files below its folder."""
    rows = load_rows(config)
    summaries = summarize(config, rows)
    task = Task(config.task, config.data_root, config.device) if config.num_spectra else None
    spectra = follow_spectra(config, rows, task, config.folder / "spectra.json") if task is not None else {}
    damped = [name for name in config.optimizers if name not in config.without_damping]
    checked = {name: findings(config, summaries, name) for name in damped}
    speed = measure_speed(rows)
    drawn = _figures(config, summaries, spectra, damped)
    text, tables = _text(config, summaries, speed), _tables(config, summaries, checked)
    section = Section(title, text, tables, [figure for _, figure in drawn], config.remarks)
    report = Report(config, summaries, spectra, checked, speed, section, [stem for stem, _ in drawn])
    write_table(config.folder / "trials.csv", rows)
    write_json(config.folder / "summary.json", summary_content(report))
    if config.tensorboard:
        _write_tensorboard(config, summaries, spectra)
    return report


def write_report(report: Report) -> Path:
    """Page and pictures, below the sweep's folder and, small, in ``keep``; returns the page."""
    config = report.config
    footer = machine_footer(describe_machine(config.device), describe_versions())
    page_title = f"The effect of damping: {config.name}"
    page = write_page(config.folder / "index.html", page_title, [report.section], footer=footer)
    folders = [config.folder] if config.keep is None else [config.folder, config.keep]
    for folder in folders:
        for stem, figure in zip(report.stems, report.section.figures, strict=True):
            save_png(folder / f"{stem}.png", figure.png)
    if config.keep is not None:
        write_json(config.keep / "summary.json", summary_content(report))
        write_page(config.keep / "index.html", page_title, [report.section], footer=footer)
    return page


def summary_content(report: Report) -> dict[str, Any]:
    """The numbers behind the page as plain data; histograms only of the dampings that are shown."""
    config = report.config
    settings = []
    for summary in report.summaries:
        content = summary.to_dict()
        damping = summary.setting.damping
        if damping is None or not any(abs(damping / d - 1) < 1e-6 for d in config.histogram.dampings):
            del content["histograms"]
        settings.append(content)
    return {
        **provenance(config, config.seed, config.device),
        "settings": settings,
        "spectra": report.spectra,
        "findings": {name: [{**asdict(f), "verdict": f.verdict} for f in found] for name, found in report.findings.items()},
        "speed": {**asdict(report.speed), "trials_per_minute_of_one_worker": report.speed.trials_per_minute},
    }


def _text(config: SweepConfig, summaries: Sequence[SettingSummary], speed: Speed) -> list[str]:
    finished = [summary.num_finished for summary in summaries]
    budget = str(config.num_trials)
    if min(finished) < config.num_trials:
        budget = f"{min(finished)} to {max(finished)} of the planned {config.num_trials}"
    share = config.num_kept / config.num_trials
    return [
        f"{len(summaries)} settings, {budget} trials each: learning rate, its linear decay and momentum are searched "
        f"(tree-structured Parzen estimator) for every damping alone; {config.task.steps} steps of batch "
        f"{config.task.batch_size} on {config.task.data.name}, weights and batches of trial k the same at every damping. "
        f"Curves are means over the {100 * share:.0f} % of trials with the lowest final training loss, bands run from "
        "the 10th to the 90th percentile. Diverged trials are counted and stay out of the means.",
        f"One worker ran {speed.trials_per_minute:.1f} trials per minute; {100 * speed.compute_share:.1f} % of a trial "
        f"was forward, backward and step, {100 * speed.evaluation_share:.1f} % evaluation and histograms, "
        f"{100 * speed.other_share:.1f} % sampler, storage, model and batches.",
    ]


def _tables(config: SweepConfig, summaries: Sequence[SettingSummary], checked: dict[str, list[Finding]]) -> list[Table]:
    tables = [
        Table(
            "Final training loss in nats; values: median over the kept trials.",
            HEADER,
            [summary_row(summary) for summary in summaries],
            _best_rows(summaries),
        )
    ]
    for name, found in checked.items():
        if found:
            rows = [[f.statement, f.verdict, f.ours] for f in found]
            caption = f"What the study found, and what {name} does here."
            tables.append(Table(caption, ("the study", "here", "in numbers"), rows))
    return tables


def summary_row(summary: SettingSummary) -> list[str]:
    """One row under ``HEADER``."""
    start = [summary.label, str(summary.num_finished), f"{summary.num_diverged} ({100 * summary.share_diverged:.0f} %)"]
    if not summary.num_kept:
        return [*start, *["—"] * (len(HEADER) - len(start))]
    spread = float(np.std(summary.final_losses))
    return [
        *start,
        f"{summary.mean_final_loss:.4f} ± {spread:.4f}",
        f"{summary.final_losses[0]:.4f}",
        f"{100 * summary.test_error:.2f} %",
        *[f"{summary.kept[key][0]:.3g}" for key in ("lr", "momentum", "lr_decay")],
    ]


def _best_rows(summaries: Sequence[SettingSummary]) -> list[int]:
    kept = [number for number, summary in enumerate(summaries) if summary.num_kept]
    return [min(kept, key=lambda number: summaries[number].mean_final_loss)] if kept else []


def _figures(
    config: SweepConfig, summaries: Sequence[SettingSummary], spectra: Spectra, damped: Sequence[str]
) -> list[tuple[str, Figure]]:
    """Pairs of a file's stem and a picture."""
    drawn: list[tuple[str, Figure]] = []
    plain = [s for s in summaries if s.setting.damping is None]
    for name in damped:
        mine = [s for s in summaries if s.setting.optimizer == name]
        suffix = "" if len(damped) == 1 else f"_{name}"
        if any(s.num_kept for s in mine):
            png = pictures.learning_curves(config, [*plain, *mine])
            caption = f"Learning curves, {name}: mean of the kept trials."
            drawn.append((f"learning_curves{suffix}", Figure(png, caption)))
    drawn.append(("final_loss", Figure(pictures.final_losses(config, summaries), "Final loss and diverged trials per damping.")))
    caption = "Searched values per damping: median and quartiles of the kept trials, star: best trial."
    drawn.append(("best_values", Figure(pictures.best_values(config, summaries), caption)))
    for name in damped:
        suffix = "" if len(damped) == 1 else f"_{name}"
        histograms = pictures.gradient_histograms(config, summaries, name)
        if histograms is not None:
            caption = f"Squared mini-batch gradients per layer during training, {name}, kept trials together."
            drawn.append((f"gradients{suffix}", Figure(histograms, caption)))
        settings = [s.setting for s in summaries if s.setting.optimizer == name and s.setting.key in spectra]
        if settings:
            png = pictures.eigenvalue_figure(config, spectra, settings)
            caption = f"Positive definiteness, {name}: the worst block's smallest eigenvalue and condition, best runs."
            drawn.append((f"eigenvalues{suffix}", Figure(png, caption)))
    return drawn


def _write_tensorboard(config: SweepConfig, summaries: Sequence[SettingSummary], spectra: Spectra) -> None:
    """Mean curves, histograms and eigenvalues of each setting as one run."""
    histogram = config.histogram
    limits = (histogram.low + histogram.width * np.arange(histogram.num_bins + 1)).tolist()
    for summary in summaries:
        folder = config.folder / "tensorboard" / summary.setting.key
        for old in folder.glob("events.*"):
            old.unlink()
        writer = tensorboard_writer(folder)
        for x, y in zip(summary.curve_steps, summary.curve, strict=True):
            writer.add_scalar("training_loss", y, round(x))
        writer.add_scalar("share_diverged", summary.share_diverged, 0)
        for step, layers in summary.histograms.items():
            for layer, counts in layers.items():
                _add_histogram(writer, f"log10_squared_gradient/layer_{layer}", limits, counts, int(step))
                writer.add_scalar(f"zero_gradients/layer_{layer}", counts[0], int(step))
        for step, values in spectra.get(summary.setting.key, {}).items():
            writer.add_scalar("smallest_damped_eigenvalue", min(values["smallest"]), int(step))
            writer.add_scalar("largest_condition_number", max(values["condition"]), int(step))
        writer.close()


def _add_histogram(writer: Any, tag: str, limits: list[float], counts: Sequence[int], step: int) -> None:
    filled = np.array(counts[1:], dtype=float)
    if not filled.sum():
        return
    middles = (np.array(limits[1:]) + np.array(limits[:-1])) / 2
    used = np.flatnonzero(filled)
    writer.add_histogram_raw(
        tag,
        min=limits[used[0]],
        max=limits[used[-1] + 1],
        num=int(filled.sum()),
        sum=float((filled * middles).sum()),
        sum_squares=float((filled * middles**2).sum()),
        bucket_limits=limits[1:],
        bucket_counts=filled.tolist(),
        global_step=step,
    )
