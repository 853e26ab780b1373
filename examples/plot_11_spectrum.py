"""
The spectrum of a Fisher matrix
===============================

The exact Fisher matrix of a small net during training, its layer-wise part, and what K-FAC makes of it, each as a density of
eigenvalues.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from kfac_opt import KFAC
from kfac_opt.fisher import FisherMatrix, spectral_density

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16.0
y = torch.tensor(digits.target)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = KFAC(model)
for _ in range(20):
    batch = torch.randint(len(x), (256,))
    optimizer.zero_grad()
    F.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()

# %%
full = FisherMatrix(model, x[:500], kind="exact")
densities = {
    "full": spectral_density(full),
    "layer-wise": spectral_density(FisherMatrix(model, x[:500], kind="exact", blocks="layer_wise")),
    "K-FAC": spectral_density(optimizer.curvature),
}
print(f"trace {float(full.trace()):.2f}, largest eigenvalue {float(full.top_eigenpairs(1)[0][0]):.2f}")

fig, ax = plt.subplots(figsize=(6, 3.6))
for name, density in densities.items():
    density.plot(ax, label=name)
ax.legend()
fig.tight_layout()
