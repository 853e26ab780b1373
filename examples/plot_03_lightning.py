"""
Lightning
=========

``configure_optimizers`` returns ``KFAC(self)``: give it the module that Lightning calls.
"""

import logging
import warnings

import lightning
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_opt import KFAC

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        x, y = batch
        loss = F.cross_entropy(self(x), y)  # self(x), not self.net(x): KFAC watches the module it was given
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = KFAC(self)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)]


# %%
digits = load_digits()
data = TensorDataset(torch.tensor(digits.images, dtype=torch.float32) / 16.0, torch.tensor(digits.target))
loader = DataLoader(data, batch_size=128, shuffle=True)

lightning.seed_everything(0, verbose=False)
model = Classifier()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(max_epochs=6, accelerator="cpu", **quiet)
trainer.fit(model, loader)

# %%
fig, ax = plt.subplots(figsize=(6, 3.6))
ax.semilogy(model.losses)
ax.set_xlabel("step")
ax.set_ylabel("training loss of the batch")
fig.tight_layout()
