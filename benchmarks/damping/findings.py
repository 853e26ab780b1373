"""The findings of the study (Fujimori, Nagase & Naganuma) held against what a sweep found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.damping.config import SweepConfig
from benchmarks.damping.results import SettingSummary

MANY_DIVERGED = 0.5  # of the random trials
STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Finding:
    """One statement of the study: what we saw, in numbers, and whether it ``holds`` (None: not measured)."""

    statement: str
    ours: str
    holds: bool | None

    @property
    def verdict(self) -> str:
        """A word for the table."""
        return {True: "holds", False: "does not hold", None: "not measured"}[self.holds]


def findings(config: SweepConfig, summaries: Sequence[SettingSummary], optimizer: str) -> list[Finding]:
    """All findings for the settings of one optimizer with damping."""
    chosen = [s for s in summaries if s.setting.optimizer == optimizer and s.num_finished]
    if len(chosen) < 3 or not any(s.num_kept for s in chosen):
        return []
    return [
        _middle_is_best(chosen),
        _smallest_diverges(config, chosen),
        _largest_is_slow(config, chosen),
        *_gradients(config, chosen),
    ]


def _middle_is_best(chosen: list[SettingSummary]) -> Finding:
    healthy = [s for s in chosen if s.num_kept]
    best = min(healthy, key=lambda s: s.mean_final_loss)
    ends = (chosen[0].setting, chosen[-1].setting)
    text = ", ".join(f"{s.setting.damping:.0e}: {s.mean_final_loss:.3f}" for s in healthy)
    return Finding(
        "A middle damping gives the lowest final loss (1e0 there); both ends are worse.",
        f"lowest at {best.setting.damping:.0e} ({text})",
        best.setting not in ends,
    )


def _smallest_diverges(config: SweepConfig, chosen: list[SettingSummary]) -> Finding:
    smallest, middle = chosen[0], chosen[len(chosen) // 2]
    text = (
        f"of the random trials, whose learning rates and momenta are the same at every damping, "
        f"{100 * smallest.diverged_startup:.0f} % diverge at {smallest.setting.damping:.0e}, "
        f"{100 * middle.diverged_startup:.0f} % at {middle.setting.damping:.0e}, "
        f"{100 * chosen[-1].diverged_startup:.0f} % at {chosen[-1].setting.damping:.0e}; "
        f"of all {smallest.num_finished} trials at {smallest.setting.damping:.0e} {smallest.num_diverged} diverged"
    )
    if smallest.num_kept:
        text += f"; the search found healthy ones with a mean final loss of {smallest.mean_final_loss:.3f}"
    text += f"; learning rates from {config.ranges(smallest.setting)['lr'].low:g}"
    return Finding("The smallest damping (1e-5) diverges.", text, smallest.diverged_startup > MANY_DIVERGED)


def _largest_is_slow(config: SweepConfig, chosen: list[SettingSummary]) -> Finding:
    largest = chosen[-1]
    best = min((s for s in chosen if s.num_kept), key=lambda s: s.mean_final_loss)
    if not largest.num_kept:
        return Finding("The largest damping (1e2) is slow.", "no healthy trial there", None)
    level = largest.curve[-1]
    reached = next((x for x, y in zip(best.curve_steps, best.curve, strict=True) if y <= level), math.inf)
    areas = [sum(s.curve) / len(s.curve) for s in (largest, best)]
    text = (
        f"mean loss over the run {areas[0]:.3f} at {largest.setting.damping:.0e} against {areas[1]:.3f} at the best "
        f"damping {best.setting.damping:.0e}, which reaches the former's last loss after {reached:.0f} of "
        f"{config.task.steps} steps; median kept learning rate {largest.kept['lr'][0]:.3g} in a range up to "
        f"{config.ranges(largest.setting)['lr'].high:g}"
    )
    return Finding("The largest damping (1e2) is slow.", text, reached <= 0.8 * config.task.steps)


def _gradients(config: SweepConfig, chosen: list[SettingSummary]) -> list[Finding]:
    """Mean log10 of the squared gradient at the first and the last histogram, ends of the shown dampings compared."""
    wanted = [s for s in chosen if s.gradient_levels and any(_near(s, d) for d in config.histogram.dampings)]
    statements = (
        "Early in training larger damping gives larger gradients (it leaves the plateau).",
        "Late in training smaller damping gives larger gradients.",
    )
    if len(wanted) < 2:
        return [Finding(statement, "fewer than two dampings have healthy trials", None) for statement in statements]
    found = []
    for statement, position, sign in ((statements[0], 0, 1.0), (statements[1], -1, -1.0)):
        step = sorted(wanted[0].gradient_levels, key=int)[position]
        levels = [summary.gradient_levels[step] for summary in wanted]
        text = f"step {step}: mean log10 g² " + ", ".join(
            f"{mean:.2f} ± {error:.2f} at {s.setting.damping:.0e}" for s, (mean, error) in zip(wanted, levels, strict=True)
        )
        (first, first_error), (last, last_error) = levels[0], levels[-1]
        errors = math.hypot(first_error, last_error)
        clear = abs(last - first) > STANDARD_ERRORS * errors
        text += "" if clear else f"; the ends differ by less than {STANDARD_ERRORS:g} standard errors"
        found.append(Finding(statement, text, clear and sign * (last - first) > 0))
    return found


def _near(summary: SettingSummary, damping: float) -> bool:
    return summary.setting.damping is not None and abs(summary.setting.damping / damping - 1.0) < 1e-6
