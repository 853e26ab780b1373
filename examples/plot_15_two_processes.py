"""
Two processes
=============

The same script under ``torchrun --nproc_per_node 2 examples/plot_15_two_processes.py``: DistributedDataParallel averages the
gradients, ``KFAC`` adds up the factors and divides the refreshes of the inverses among the processes. Run without torchrun,
as here, it starts the two processes itself.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from kfac_opt import KFAC


def train(result):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16.0, torch.tensor(digits.target)
    x, y = x[rank::2], y[rank::2]  # each process has its own half
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    optimizer, losses = KFAC(model), []
    rows = torch.Generator().manual_seed(rank)
    for _ in range(60):
        batch = torch.randint(len(x), (64,), generator=rows)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.save((losses, [p.detach().clone() for p in model.parameters()]), f"{result}.{rank}")
    torch.distributed.destroy_process_group()


# %%
if "RANK" in os.environ:
    train(os.environ.get("RESULT", "losses"))
else:
    import matplotlib.pyplot as plt

    script = globals().get("__file__") or "plot_15_two_processes.py"
    with tempfile.TemporaryDirectory() as folder:
        result = str(Path(folder) / "losses")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
        subprocess.run(launch, check=True, env={**os.environ, "RESULT": result, "OMP_NUM_THREADS": "1"})
        (first, weights), (second, others) = (torch.load(f"{result}.{rank}") for rank in (0, 1))
    print("both processes hold the same weights:", all(torch.equal(a, b) for a, b in zip(weights, others)))
    fig, ax = plt.subplots(figsize=(6, 3.6))
    ax.semilogy(first, label="process 0")
    ax.semilogy(second, label="process 1")
    ax.set_xlabel("step")
    ax.set_ylabel("training loss of its half of the batch")
    ax.legend()
    fig.tight_layout()
