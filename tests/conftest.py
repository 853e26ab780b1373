"""Settings of the whole test run: one thread, known markers, no leaking global state."""

from __future__ import annotations

import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

# Tiny float64 matrices with several threads beside a busy process are many times slower.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, so that a misspelt one is noticed under ``--strict-markers``."""
    config.addinivalue_line("markers", "slow: takes more than about ten seconds; deselect with -m 'not slow'")
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the ``gpu`` tests on a machine without a CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch.cuda.is_available() is false")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _global_state():
    """Seed the global generators, and put back what a test may have changed."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is what is seeded
    random.seed(0)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
