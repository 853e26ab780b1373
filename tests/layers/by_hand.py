"""Attention and recurrent layers written by hand out of ``nn.Linear``: the same functions as torch's, one layer per matrix.

All take the batch first. What a layer is given and what it returns is that of torch's module.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def linear(weight: Tensor, bias: Tensor | None = None, *, train_bias: bool = True) -> nn.Linear:
    """A layer with copies of these values."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias).requires_grad_(train_bias)
    return layer


class HandAttention(nn.Module):
    """``q``, ``k``, ``v``, ``out``."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = module.num_heads
        packed, biases = module._qkv_same_embed_dim, module.in_proj_bias
        weights = module.in_proj_weight.chunk(3) if packed else [getattr(module, f"{name}_proj_weight") for name in "qkv"]
        chunks = [None] * 3 if biases is None else biases.chunk(3)
        # Biases of separate projections are one parameter of their own in torch's module.
        self.q, self.k, self.v = (linear(w, b, train_bias=packed) for w, b in zip(weights, chunks))
        self.out = linear(module.out_proj.weight, module.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        projected = (self.q(query), self.k(key), self.v(value))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if attn_mask is not None:
            scores = scores.masked_fill(attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask[:, None, None], -math.inf)
        weights = scores.softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights.mean(1)


class HandRecurrent(nn.Module):
    """``parts.ih_l0``, ``parts.hh_l0``, ...: called once per step. With ``lengths`` one sequence is run at a time."""

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        self.kind, self.hidden, self.out_dim = module.mode, module.hidden_size, module.proj_size or module.hidden_size
        self.suffixes = [
            [f"_l{layer}{d}" for d in ["", "_reverse"][: 1 + module.bidirectional]] for layer in range(module.num_layers)
        ]
        for suffix in (suffix for both in self.suffixes for suffix in both):
            for name in ("ih", "hh", "hr")[: 3 if module.proj_size else 2]:
                own = [getattr(module, f"{kind}_{name}{suffix}", None) for kind in ("weight", "bias")]
                self.parts[name + suffix] = linear(*own)

    def step(self, suffix: str, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        of_x, of_h = self.parts[f"ih{suffix}"](x), self.parts[f"hh{suffix}"](state[0])
        if self.kind == "LSTM":
            i, f, g, o = (of_x + of_h).chunk(4, -1)
            c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            return (self.parts[f"hr{suffix}"](h) if f"hr{suffix}" in self.parts else h), c
        if self.kind == "GRU":
            (r, z, n), (rh, zh, nh) = of_x.chunk(3, -1), of_h.chunk(3, -1)
            r, z = torch.sigmoid(r + rh), torch.sigmoid(z + zh)
            return ((1 - z) * torch.tanh(n + r * nh) + z * state[0],)
        return (torch.relu(of_x + of_h) if self.kind == "RNN_RELU" else torch.tanh(of_x + of_h),)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Outputs ``[batch, time, features]``, zero behind the end of a sequence, and the last states."""
        if lengths is not None:
            one_by_one = [self.run(one[None, :length]) for one, length in zip(x, lengths.tolist())]
            outputs = [nn.functional.pad(out, (0, 0, 0, x.shape[1] - out.shape[1])) for out, _ in one_by_one]
            states = zip(*(state for _, state in one_by_one))
            return torch.cat(outputs), [torch.cat(parts, 1) for parts in states]
        return self.run(x)

    def run(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        last = []
        for both in self.suffixes:
            found = []
            for number, suffix in enumerate(both):
                state = tuple(x.new_zeros(len(x), size) for size in (self.out_dim, self.hidden)[: 1 + (self.kind == "LSTM")])
                steps = []
                for t in range(x.shape[1])[:: -1 if number else 1]:
                    state = self.step(suffix, x[:, t], state)
                    steps.append(state[0])
                found.append(torch.stack(steps[:: -1 if number else 1], 1))
                last.append(state)
            x = torch.cat(found, -1)
        return x, [torch.stack(parts) for parts in zip(*last)]
