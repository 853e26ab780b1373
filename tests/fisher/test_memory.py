"""The memory that a matrix really takes stays at its limit."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from torch import nn
from kfac_opt.fisher import FisherMatrix

torch.set_num_threads(1)
route, limit = sys.argv[1], int(sys.argv[2])
small = FisherMatrix(nn.Linear(3, 2), torch.randn(4, 3), route=route)  # what the first use of a route loads
small @ torch.ones(8), small.trace()
model = nn.Sequential(
    nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 10),
)
x = torch.randn(300, 3, 32, 32)
size = sum(p.numel() for p in model.parameters())
model(x[:1]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fisher = FisherMatrix(model, x, route=route, memory_limit=limit)
fisher @ torch.ones(size), fisher.trace()
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in Linux' units")
@pytest.mark.parametrize(("route", "limit"), [("func", 30), ("streamed", 30), ("factored", 200)])
def test_peak_memory_stays_near_the_limit(route, limit):
    limit *= 2**20
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, route, str(limit)], capture_output=True, text=True, check=True, timeout=300
    )
    # The copy of the model, vectors, and what the allocator keeps come on top.
    assert int(found.stdout.split()[-1]) < limit + 20 * 2**20
