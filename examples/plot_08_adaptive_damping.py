"""
Damping that adapts
===================

``LevenbergMarquardt`` compares what a step promised with what it brought, every ten steps, and corrects a damping that was
chosen badly. It is stepped with the loss and a closure that evaluates the same batch again.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from kfac_opt import KFAC
from kfac_opt.damping import LevenbergMarquardt

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16.0
y = torch.tensor(digits.target)


def fit(damping, adapt, steps=150):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = KFAC(model, update_scale="natural", damping=damping)
    rule = LevenbergMarquardt(optimizer) if adapt else None
    rows, losses, dampings = torch.Generator().manual_seed(0), [], []
    for _ in range(steps):
        batch = torch.randint(len(x), (128,), generator=rows)

        def loss_of_batch(batch=batch):
            return F.cross_entropy(model(x[batch]), y[batch])

        optimizer.zero_grad()
        loss = loss_of_batch()
        loss.backward()
        optimizer.step()
        if rule is not None:
            rule.step(loss, loss_of_batch)
        losses.append(loss.item())
        dampings.append(optimizer.param_groups[0]["damping"])
    return losses, dampings


# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6))
for damping, adapt in ((30.0, False), (30.0, True)):
    losses, dampings = fit(damping, adapt)
    label = f"from {damping:g}, {'adapted' if adapt else 'fixed'}"
    left.semilogy(losses, label=label)
    right.semilogy(dampings, label=label)
left.set_ylabel("training loss of the batch")
right.set_ylabel("damping")
for ax in (left, right):
    ax.set_xlabel("step")
    ax.legend()
fig.tight_layout()
