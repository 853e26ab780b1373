"""The constructor of collectors under the name that optimizers know."""

from __future__ import annotations

from kfac_opt._capture.collector import Collector as make_collector

__all__ = ["make_collector"]
