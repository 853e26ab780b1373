"""
Gradient outliers
=================

Which examples carry the largest eigenvalue of the empirical Fisher matrix? A few labels are wrong on purpose: their
gradients stand out, layer by layer.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from kfac_opt import KFAC
from kfac_opt.fisher import gradient_statistics

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32)[:1000] / 16.0
y = torch.tensor(digits.target)[:1000]
wrong = torch.arange(0, 1000, 50)
y[wrong] = (y[wrong] + 1) % 10

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = KFAC(model)
for _ in range(40):
    batch = torch.randint(len(x), (128,))
    optimizer.zero_grad()
    F.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()

# %%
found = gradient_statistics(model, (x, y))
outliers = found.network.outliers()
caught = sum(int(index) in set(wrong.tolist()) for index in outliers.indices)
print(f"{len(outliers)} outliers, {caught} of the {len(wrong)} wrong labels among them")
for name, layer in found.layers.items():
    trimmed = layer.trimmed_eigenvalue()
    print(f"layer {name}: largest eigenvalue {layer.eigenvalues[0]:.3g}, without a tenth of the examples {trimmed:.3g}")

fig, ax = plt.subplots(figsize=(6, 3.6))
ax.semilogy(found.network.norms, ".", markersize=3, label="all examples")
ax.semilogy(wrong, found.network.norms[wrong], "x", color="tab:red", label="wrong labels")
ax.set_xlabel("example")
ax.set_ylabel("norm of its gradient")
ax.legend()
fig.tight_layout()
