"""
In front of another optimizer
=============================

``precondition_gradients_()`` replaces every ``.grad`` by its preconditioned direction and leaves the step to whoever you
like: here to Adam, whose own second moment then acts on natural gradients. (``update_scale="natural"`` brings the power and the
damping of the literature; the step itself is Adam's.)
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


def fit(with_curvature, lr, steps=150):
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(64, 64), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    kfac = KFAC(model, update_scale="natural") if with_curvature else None
    rows, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        batch = torch.randint(len(x), (128,), generator=rows)
        adam.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        if kfac is not None:
            kfac.precondition_gradients_()
        adam.step()
        losses.append(loss.item())
    return losses


# %%
fig, ax = plt.subplots(figsize=(6, 3.6))
ax.semilogy(fit(False, lr=3e-3), label="Adam, lr 3e-3")
ax.semilogy(fit(True, lr=3e-3), label="Adam behind KFAC, lr 3e-3")
ax.set_xlabel("step")
ax.set_ylabel("training loss of the batch")
ax.legend()
fig.tight_layout()
