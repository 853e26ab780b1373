"""What a sweep came to: all trials as a table, and one summary per setting."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from benchmarks.common.results import write_text
from benchmarks.damping.config import SEARCHED, Setting, SweepConfig
from benchmarks.damping.study import RESULT, SettingStudy, open_studies

COLUMNS = (
    *("setting", "optimizer", "damping", "trial", "training_seed", *SEARCHED),
    *("initial_loss", "final_loss", "test_loss", "test_error", "diverged_step", "num_steps"),
    *("seconds", "compute_seconds", "evaluation_seconds", "trial_seconds"),
)

Histogram = dict[str, dict[str, list[int]]]


@dataclass(frozen=True)
class TrialRow:
    """One finished trial; ``result`` is what :class:`benchmarks.damping.trial.TrialResult` stored.

    ``duration`` is its whole time in the storage, from being asked for to being told.
    """

    setting: Setting
    trial: int
    params: dict[str, float]
    result: dict[str, Any]
    duration: float

    @property
    def diverged(self) -> bool:
        """Broke off, or ended above where it started."""
        return self.result["diverged_step"] is not None

    @property
    def final_loss(self) -> float:
        """Training loss at the end; infinite when it broke off."""
        value = self.result["final_loss"]
        return math.inf if value is None else float(value)


@dataclass(frozen=True)
class SettingSummary:
    """One setting.

    Attributes:
        num_finished, num_diverged, num_kept: trials; those kept have the lowest final training loss and did not
            diverge.
        diverged_startup: share of diverged trials among the first random ones, whose learning rates and momenta are
            the same at every damping.
        curve_steps, curve, curve_low, curve_high: mini-batch loss, mean over the kept trials, 10th and 90th percentile.
        final_losses: of the kept trials, ascending. ``test_error``: mean over them.
        best: searched values of the best trial. ``kept``: median and quartiles of them over the kept trials.
        histograms: per step and layer ``[zeros, counts of all bins]``, summed over the kept trials.
        gradient_levels: per step, mean over the kept trials of the mean log10 of the squared gradient (layers averaged),
            and its standard error.
    """

    setting: Setting
    num_finished: int
    num_diverged: int
    num_kept: int
    diverged_startup: float
    curve_steps: list[float]
    curve: list[float]
    curve_low: list[float]
    curve_high: list[float]
    final_losses: list[float]
    test_error: float
    best: dict[str, float]
    kept: dict[str, list[float]]
    histograms: Histogram = field(default_factory=dict)
    gradient_levels: dict[str, list[float]] = field(default_factory=dict)

    @property
    def mean_final_loss(self) -> float:
        """Mean over the kept trials; nan without one."""
        return float(np.mean(self.final_losses)) if self.final_losses else math.nan

    @property
    def share_diverged(self) -> float:
        """Of all finished trials."""
        return self.num_diverged / self.num_finished if self.num_finished else math.nan

    @property
    def label(self) -> str:
        """How it is called in pictures."""
        return setting_label(self.setting)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with five digits, for JSON."""
        content = asdict(self)
        content["setting"] = {"key": self.setting.key, **asdict(self.setting)}
        content["mean_final_loss"], content["share_diverged"] = self.mean_final_loss, self.share_diverged
        return _rounded(content)


def setting_label(setting: Setting) -> str:
    """``SGD``, or the damping with the optimizer's name."""
    name = setting.optimizer.upper() if len(setting.optimizer) <= 5 else setting.optimizer.replace("_", " ")
    return name if setting.damping is None else f"{name} γ = {setting.damping:.0e}"


def load_rows(config: SweepConfig) -> dict[Setting, list[TrialRow]]:
    """All finished trials of the sweep, by setting, in order."""
    return {study.setting: [_row(study, trial) for trial in study.finished()] for study in open_studies(config)}


def _row(study: SettingStudy, trial: FrozenTrial) -> TrialRow:
    duration = trial.duration.total_seconds() if trial.duration is not None else math.nan
    return TrialRow(study.setting, trial.number, dict(trial.params), trial.user_attrs[RESULT], duration)


def keep_best(config: SweepConfig, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The healthy trials with the lowest final training loss: ``num_kept`` of ``num_trials``.

    A search that is not finished keeps the same share of what it has.
    """
    number = math.ceil(config.num_kept * min(1.0, len(rows) / config.num_trials))
    healthy = sorted((row for row in rows if not row.diverged), key=lambda row: (row.final_loss, row.trial))
    return healthy[:number]


def summarize(config: SweepConfig, rows: dict[Setting, list[TrialRow]]) -> list[SettingSummary]:
    """One summary per setting, in the order of the pictures."""
    return [_summarize_one(config, setting, rows[setting]) for setting in config.settings()]


def _summarize_one(config: SweepConfig, setting: Setting, rows: list[TrialRow]) -> SettingSummary:
    kept = keep_best(config, rows)
    curves = np.array([row.result["curve"] for row in kept], dtype=float) if kept else np.zeros((0, 0))
    interval, num_steps = config.read_interval, config.task.steps
    ends = [min((index + 1) * interval, num_steps) for index in range(curves.shape[1])]
    startup = rows[: config.num_startup]
    return SettingSummary(
        setting=setting,
        num_finished=len(rows),
        num_diverged=sum(row.diverged for row in rows),
        num_kept=len(kept),
        diverged_startup=sum(row.diverged for row in startup) / len(startup) if startup else math.nan,
        curve_steps=[end - interval / 2 for end in ends],
        curve=_per_column(curves, lambda values: np.mean(values, axis=0)),
        curve_low=_per_column(curves, lambda values: np.percentile(values, 10, axis=0)),
        curve_high=_per_column(curves, lambda values: np.percentile(values, 90, axis=0)),
        final_losses=[row.final_loss for row in kept],
        test_error=float(np.mean([row.result["test_error"] for row in kept])) if kept else math.nan,
        best=dict(kept[0].params) if kept else {},
        kept={key: _quartiles([row.params[key] for row in kept]) for key in SEARCHED} if kept else {},
        histograms=_sum_histograms(config, kept),
        gradient_levels=_gradient_levels(config, kept),
    )


def _per_column(curves: np.ndarray, reduce: Callable[[np.ndarray], np.ndarray]) -> list[float]:
    return reduce(curves).tolist() if curves.size else []


def _quartiles(values: list[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, [50, 25, 75])]


def _sum_histograms(config: SweepConfig, rows: list[TrialRow]) -> Histogram:
    total: dict[str, dict[str, np.ndarray]] = {}
    for row in rows:
        for step, layers in row.result["histograms"].items():
            for layer, packed in layers.items():
                zero = np.zeros(config.histogram.num_bins + 1, dtype=np.int64)
                counts = total.setdefault(step, {}).setdefault(layer, zero)
                first, zeros, *filled = packed
                counts[0] += zeros
                counts[1 + first : 1 + first + len(filled)] += np.array(filled, dtype=np.int64)
    return {step: {layer: counts.tolist() for layer, counts in layers.items()} for step, layers in total.items()}


def _gradient_levels(config: SweepConfig, rows: list[TrialRow]) -> dict[str, list[float]]:
    levels: dict[str, list[float]] = {}
    for row in rows:
        for step, layers in _sum_histograms(config, [row]).items():
            values = [mean_log_square(config, counts) for counts in layers.values()]
            levels.setdefault(step, []).append(float(np.nanmean(values)))
    return {
        step: [float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan]
        for step, values in levels.items()
    }


def mean_log_square(config: SweepConfig, counts: Sequence[int]) -> float:
    """Mean of log10 g² over the entries that are not zero, from the middles of their bins."""
    histogram = config.histogram
    middles = histogram.low + histogram.width * (np.arange(histogram.num_bins) + 0.5)
    filled = np.asarray(counts[1:], dtype=float)
    return float((filled * middles).sum() / filled.sum()) if filled.sum() else math.nan


def write_table(path: Path, rows: dict[Setting, list[TrialRow]]) -> Path:
    """The raw table as CSV, one line per finished trial."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for setting, trials in rows.items():
        for row in trials:
            known = {**row.result, **row.params, "trial": row.trial, "trial_seconds": round(row.duration, 3)}
            known |= {"setting": setting.key, "optimizer": setting.optimizer, "damping": setting.damping}
            writer.writerow(["" if known.get(key) is None else _short(known[key]) for key in COLUMNS])
    return write_text(path, buffer.getvalue())


@dataclass(frozen=True)
class Speed:
    """Where the time of the finished trials went.

    Attributes:
        num_trials, trial_seconds: all finished trials, from being asked for to being told.
        compute_share: forward, backward and step. ``evaluation_share``: losses on the fixed sets, histograms.
        other_share: sampler, storage, building the model, fetching batches.
    """

    num_trials: int
    trial_seconds: float
    compute_share: float
    evaluation_share: float
    other_share: float

    @property
    def trials_per_minute(self) -> float:
        """Of one worker."""
        return 60.0 * self.num_trials / self.trial_seconds if self.trial_seconds else math.nan


def measure_speed(rows: dict[Setting, list[TrialRow]]) -> Speed:
    """Shares over all finished trials of the sweep."""
    trials = [row for group in rows.values() for row in group if math.isfinite(row.duration)]
    total = sum(row.duration for row in trials) or math.nan
    compute = sum(row.result["compute_seconds"] for row in trials) / total
    evaluation = sum(row.result["evaluation_seconds"] for row in trials) / total
    return Speed(len(trials), total, compute, evaluation, 1.0 - compute - evaluation)


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.5g}")
    return value
