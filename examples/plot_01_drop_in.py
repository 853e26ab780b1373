"""
Swap one line
=============

A plain training loop on the digits that scikit-learn ships, once with AdamW and once with ``KFAC(model)``. Nothing else
differs, and nothing is set.
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
train, test = torch.arange(len(x))[:1400], torch.arange(len(x))[1400:]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


# %%
# The loop is the one you know. It is told which optimizer to build and knows nothing of it.


def fit(make_optimizer, steps=150):
    model = make_model()
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    rows, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        batch = train[torch.randint(len(train), (128,), generator=rows)]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        error = (model(x[test]).argmax(1) != y[test]).float().mean().item()
    return losses, error


adamw = fit(lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3))
kfac = fit(lambda model: KFAC(model))

# %%
fig, ax = plt.subplots(figsize=(6, 3.6))
for name, (losses, error) in {"AdamW, lr 3e-3": adamw, "KFAC(model)": kfac}.items():
    ax.semilogy(losses, label=f"{name}: test error {100 * error:.1f} %")
ax.set_xlabel("step")
ax.set_ylabel("training loss of the batch")
ax.legend()
fig.tight_layout()
