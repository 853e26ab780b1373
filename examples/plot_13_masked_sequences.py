"""
Masked sequences
================

Sentences of different lengths in one padded batch. ``optimizer.masked(mask)`` leaves padded positions out of the Fisher
matrix as ``ignore_index`` leaves them out of the loss: with and without padding the factors are the same.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from kfac_opt import KFAC

torch.manual_seed(0)
VOCABULARY, LONGEST = 12, 16


class Tagger(nn.Module):
    """Says of every token how often it occurred so far (0, 1, 2 or more)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32, padding_idx=0)
        self.recurrent = nn.GRU(32, 48, batch_first=True)
        self.head = nn.Linear(48, 3)

    def forward(self, tokens):
        return self.head(self.recurrent(self.embedding(tokens))[0])


def make_batch(size=64):
    tokens = torch.randint(1, VOCABULARY, (size, LONGEST))
    earlier = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).tril(-1).sum(2)
    lengths = torch.randint(4, LONGEST + 1, (size, 1))
    mask = torch.arange(LONGEST) < lengths
    return tokens.masked_fill(~mask, 0), earlier.clamp_max(2).masked_fill(~mask, -100), mask


# %%


def fit(make_optimizer, steps=120):
    torch.manual_seed(0)
    model, losses = Tagger(), []
    optimizer = make_optimizer(model)
    for _ in range(steps):
        tokens, targets, mask = make_batch()
        optimizer.zero_grad()
        if isinstance(optimizer, KFAC):
            with optimizer.masked(mask):
                logits = model(tokens)
        else:
            logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


fig, ax = plt.subplots(figsize=(6, 3.6))
ax.plot(fit(lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3)), label="AdamW, lr 3e-3")
ax.plot(fit(KFAC), label="KFAC(model)")
ax.set_xlabel("step")
ax.set_ylabel("training loss of the batch")
ax.legend()
fig.tight_layout()
