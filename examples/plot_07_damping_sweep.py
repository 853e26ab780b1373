"""
A damping sweep
===============

How much does the damping of the natural gradient matter? Relative to each layer's own curvature one value serves over orders
of magnitude; as the absolute γ of the literature it has to be found. ``benchmarks/damping_sweep.py`` does the same with a
fair search of all other settings for every value, over many processes.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from kfac_opt import KFAC

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16.0
y = torch.tensor(digits.target)


def final_loss(damping, scale, steps=80):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = KFAC(model, update_scale="natural", damping=damping, damping_scale=scale)
    rows = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(x), (128,), generator=rows)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model(x), y).item()


# %%
values = [10.0**exponent for exponent in range(-8, 3)]
fig, ax = plt.subplots(figsize=(6, 3.6))
for scale in ("relative", "absolute"):
    ax.loglog(values, [final_loss(value, scale) for value in values], "o-", label=f'damping_scale="{scale}"')
ax.set_xlabel("damping")
ax.set_ylabel("training loss after 80 steps")
ax.legend()
fig.tight_layout()
