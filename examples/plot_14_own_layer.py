r"""
A layer of one's own
====================

A layer that the package does not know gets a diagonal block, and is named. One class of a few lines makes it a Kronecker
block: say how the weight forms a matrix, and show inputs and output gradients as rows. Here a linear map in front of which the
inputs are squashed, :math:`y = W \tanh(x)`.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from kfac_opt import KFAC, register_layer
from kfac_opt.layers import LayerAdapter, MatrixLayout, append_one


class Squashed(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x):
        return F.linear(torch.tanh(x), self.weight, self.bias)


# %%
# The adapter: rows are ``[groups, batch, shared, features]``.


@register_layer(Squashed)
class SquashedAdapter(LayerAdapter):
    @staticmethod
    def make_layout(module, with_bias):
        return MatrixLayout("matrix", tuple(module.weight.shape), with_bias)

    def input_rows(self, x):
        rows = torch.tanh(x).reshape(1, x.shape[0], -1, x.shape[-1])
        return append_one(rows) if self.layout.has_bias else rows

    def output_rows(self, gradient):
        return gradient.reshape(1, gradient.shape[0], -1, gradient.shape[-1])


# %%
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 8.0 - 1.0
y = torch.tensor(digits.target)

torch.manual_seed(0)
model = nn.Sequential(Squashed(64, 64), Squashed(64, 64), Squashed(64, 10))
optimizer = KFAC(model)
losses = []
for _ in range(100):
    batch = torch.randint(len(x), (128,))
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x[batch]), y[batch])
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(optimizer.curvature["0"])

fig, ax = plt.subplots(figsize=(6, 3.6))
ax.semilogy(losses)
ax.set_xlabel("step")
ax.set_ylabel("training loss of the batch")
fig.tight_layout()
