"""
Laplace after the fact
======================

A net that is trained already gets a Gaussian posterior from one pass over its data: ``fit_laplace`` takes the curvature, the
evidence chooses the prior, and the linearised predictive gives error bars that grow where there were no data.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from kfac_opt import KFAC
from kfac_opt.bayes.laplace import fit_laplace, log_marginal_likelihood
from kfac_opt.bayes.linearized import output_distribution
from kfac_opt.likelihoods import Gaussian

torch.manual_seed(0)
noise = 0.1
x = torch.cat([torch.rand(40, 1) * 2 - 3, torch.rand(40, 1) * 2 + 1])
y = torch.sin(2 * x) + noise * torch.randn_like(x)

model = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
likelihood = Gaussian(variance=noise**2)
optimizer = KFAC(model, likelihood=likelihood)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 400)
for _ in range(400):
    optimizer.zero_grad()
    likelihood.loss(model(x), y).backward()
    optimizer.step()
    schedule.step()
optimizer.detach()

# %%
model.eval()
posterior = fit_laplace(model, [(x, y)], likelihood, prior_precision="evidence")
print(f"log evidence {float(log_marginal_likelihood(posterior)):.1f}")

grid = torch.linspace(-5, 5, 300).unsqueeze(1)
mean, covariance = output_distribution(model, posterior, grid)
deviation = covariance.squeeze().add(noise**2).sqrt()

fig, ax = plt.subplots(figsize=(6, 3.6))
ax.plot(x, y, ".", color="black", label="data")
ax.plot(grid, mean, label="mean")
low, high = mean.flatten() - 2 * deviation, mean.flatten() + 2 * deviation
ax.fill_between(grid.flatten(), low, high, alpha=0.25, label="two standard deviations")
ax.set_ylim(-4, 4)
ax.legend()
fig.tight_layout()
