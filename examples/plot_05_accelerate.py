"""
accelerate
==========

``accelerator.prepare`` wraps model and optimizer; gradient accumulation and clipping go on as they are. Build ``KFAC`` on the
model before it is prepared.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_opt import KFAC

torch.manual_seed(0)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16.0, torch.tensor(digits.target))
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = KFAC(model)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=64, shuffle=True))

losses = []
for _ in range(4):
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())

# %%
fig, ax = plt.subplots(figsize=(6, 3.6))
ax.semilogy(losses)
ax.set_xlabel("micro-batch (two make a step)")
ax.set_ylabel("training loss")
fig.tight_layout()
