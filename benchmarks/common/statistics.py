"""Numbers over seeds, with pandas, and how numbers stand in tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds (nan for one seed)."""
    series = pd.Series(values, dtype=float)
    return float(series.mean()), float(series.sem())


def median(values: Sequence[float | None]) -> float:
    """Median over seeds, a miss (None, nan) counting as never: infinite when half of the seeds or more missed."""
    return float(pd.Series([math.inf if value is None or math.isnan(value) else value for value in values]).median())


def text(value: Any) -> str:
    """A cell: three digits of a number, the mean ± standard error of a list, a dash for what is missing or not finite."""
    if isinstance(value, list | tuple):
        mean, error = mean_and_error(value)
        return text(mean) + ("" if math.isnan(error) else f" ± {error:.1g}")
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "—"
    return f"{value:.3g}" if isinstance(value, float | np.floating) else str(value)
