"""Pieces of random networks: every one maps ``[batch, *shape]`` to another shape, in one of the ways that users write it.

A piece may say of itself, for the reference:

``mixes``      its rows, or its outputs, depend on more than one example;
``unaligned``  its layers do not hold their examples along the first dimension, so that nothing that sums per example is
               defined for them (the factors of ``expand`` are).
``flat``       the weights of its layers have uses that no layer's forward shows: their parameters have diagonal curvature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------
# What happens to the output of a layer right away


def _peek(y: Tensor) -> Tensor:
    """A part of the output is used before the rest is overwritten."""
    part = y.mean(-1, keepdim=True)
    return y.tanh_() + part


def _first_channel_in_place(y: Tensor) -> Tensor:
    y[..., 0].mul_(2.0)
    return y.tanh()


def _view_in_place(y: Tensor) -> Tensor:
    if y.is_contiguous():
        y.view(-1).sigmoid_()
    return y


def _masked(y: Tensor) -> Tensor:
    return y.masked_fill_(torch.ones_like(y, dtype=torch.bool).cumsum(-1) == 2, 0.5).tanh()


AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu_": torch.relu_,
    "tanh_": torch.tanh_,
    "silu_": lambda y: F.silu(y, inplace=True),
    "leaky_relu_": lambda y: F.leaky_relu(y, 0.3, inplace=True),
    "hardtanh_": lambda y: F.hardtanh(y, -0.7, 0.7, inplace=True),
    "mul_": lambda y: y.mul_(0.5).add_(0.1).tanh(),
    "peek": _peek,
    "first channel": _first_channel_in_place,
    "view": _view_in_place,
    "masked": _masked,
}
SMOOTH = ("nothing", "tanh", "gelu", "tanh_", "silu_", "mul_", "peek", "view")
"""Those that let every gradient through."""


class Piece(nn.Module):
    """A layer, the way it is called and what happens to its output."""

    mixes: ClassVar[bool] = False
    unaligned: ClassVar[bool] = False
    flat: bool = False

    def __init__(self, layer: nn.Module, after: str = "nothing") -> None:
        super().__init__()
        self.layer, self.after = layer, after

    def extra_repr(self) -> str:
        return f"after={self.after}"

    def call(self, x: Tensor) -> Tensor:
        return AFTER[self.after](self.layer(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


# ---------------------------------------------------------------------------------------------
# Ways to call a layer on vectors [batch, features], sequences [batch, time, features], images [batch, channels, *space]


class Unsqueezed(Piece):
    def forward(self, x: Tensor) -> Tensor:
        return self.call(x.unsqueeze(1)).squeeze(1)


class OneByOne(Piece):
    """Examples without a batch dimension, one call each."""

    unaligned = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.call(example) for example in x])


class Twice(Piece):
    """The same layer again, on its own output."""

    def forward(self, x: Tensor) -> Tensor:
        return self.call(torch.tanh(self.call(x)))


class Flat(Piece):
    """Batch and positions as one dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class FourDimensional(Piece):
    def forward(self, x: Tensor) -> Tensor:
        split = 2 if x.shape[1] % 2 == 0 else 1
        return self.call(x.unflatten(1, (split, -1))).flatten(1, 2)


class Windows(Piece):
    """Windows of positions in the first dimension, as attention over windows has them."""

    def forward(self, x: Tensor) -> Tensor:
        count = 2 if x.shape[1] % 2 == 0 else x.shape[1]
        windows = x.reshape(x.shape[0] * count, -1, x.shape[-1])
        return self.call(windows).reshape(*x.shape[:2], -1)


class TimeFirst(Piece):
    unaligned = True

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x.transpose(0, 1)).transpose(0, 1)


class Steps(Piece):
    """One call for each position."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.call(x[:, t]) for t in range(x.shape[1])], dim=1)


class Chunks(Piece):
    """Calls on slices of unequal length."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.call(part) for part in x.split(2, dim=1)], dim=1)


class AcrossTime(Piece):
    """A layer over positions instead of features."""

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x.mT).mT


class ChannelsFirst(Piece):
    """A layer of channels, ``[batch, features, time]``, inside a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x.mT).mT


class Cell(Piece):
    """A recurrent step called position by position, its state among its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], self.layer.out_features)
        states = []
        for t in range(x.shape[1]):
            state = torch.tanh(self.call(torch.cat([x[:, t], state], dim=-1)))
            states.append(state)
        return torch.stack(states, dim=1)


class Rows(Piece):
    """The rows of an image as examples of a one-dimensional layer."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(0, 1)
        # Contiguous: torch's backward of BatchNorm is wrong behind a transposed view whose last dimension is one place.
        return self.call(rows).unflatten(0, (x.shape[0], -1)).transpose(1, 2).contiguous()


class ChannelsLastMemory(Piece):
    def forward(self, x: Tensor) -> Tensor:
        return self.call(x.contiguous(memory_format=torch.channels_last))


class OverExamples(Piece):
    """Statistics over the batch."""

    mixes = True


class OverExamplesFlat(Flat):
    mixes = True


class Residual(Piece):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.call(x)


class Checkpointed(Piece):
    """The layer runs again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.call, x, use_reentrant=False)


class WithTeacher(Piece):
    """The layer also runs without gradients, as a target network does."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.call(x)
        return self.call(x) - 0.5 * target


class OnlyTheWeight(Piece):
    """A weight used without its layer."""

    flat = True

    def forward(self, x: Tensor) -> Tensor:
        return AFTER[self.after](F.linear(x, self.layer.weight, self.layer.bias))


class WeightBeside(Piece):
    """A weight used in its layer and beside it, transposed."""

    flat = True

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.call(x), self.layer.weight.mT)


# ---------------------------------------------------------------------------------------------
# Pieces without a layer of their own, and those with several


class Function(nn.Module):
    """A function without parameters."""

    mixes = unaligned = False
    TABLE: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = {
        "cumsum": lambda x: x.cumsum(1),
        "mean of positions": lambda x: x + x.mean(1, keepdim=True),
        "all but the first": lambda x: x[:, 1:],
        "every other": lambda x: x[:, ::2],
        "flip": lambda x: x.flip(1),
        "repeat": lambda x: x.unsqueeze(1).expand(-1, 2, *[-1] * (x.dim() - 1)).flatten(1, 2),
        "halves": lambda x: torch.stack(x.chunk(2, -1), 0).prod(0),
        "gate": lambda x: x.chunk(2, -1)[0] * torch.sigmoid(x.chunk(2, -1)[1]),
        "pool positions": lambda x: x.mean(1),
        "last position": lambda x: x[:, -1],
        "pool space": lambda x: x.flatten(2).mean(2),
        "flatten": lambda x: x.flatten(1),
        "to sequence": lambda x: x.flatten(2).mT,
        "max pool": lambda x: getattr(F, f"max_pool{x.dim() - 2}d")(x, 2),
        "avg pool": lambda x: getattr(F, f"avg_pool{x.dim() - 2}d")(x, 2),
    }

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def extra_repr(self) -> str:
        return self.name

    def forward(self, x: Tensor) -> Tensor:
        return self.TABLE[self.name](x)


class Unflatten(nn.Module):
    mixes = unaligned = False

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes

    def extra_repr(self) -> str:
        return f"{self.sizes}"

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.sizes)


class Gain(nn.Module):
    """A bare parameter."""

    mixes = unaligned = False

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Code(nn.Module):
    """A layer on one vector that all examples share: its only row has a gradient from all of them."""

    mixes = unaligned = True

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(2, features)
        self.register_buffer("code", torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.code).tanh_()


class Positions(nn.Module):
    """Learnt positions, looked up once for all examples."""

    mixes = unaligned = True

    def __init__(self, time: int, features: int) -> None:
        super().__init__()
        self.table = nn.Embedding(time, features)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1]))


class Attention(nn.Module):
    """Causal or not, with or without a dimension for heads in the first one."""

    mixes = unaligned = False

    def __init__(self, features: int, causal: bool, heads_in_front: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.causal, self.heads_in_front = causal, heads_in_front

    def extra_repr(self) -> str:
        return f"causal={self.causal}, heads_in_front={self.heads_in_front}"

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        if self.heads_in_front:
            mixed = self.out(mixed.reshape(-1, x.shape[-1])).view_as(x)
        else:
            mixed = self.out(mixed)
        return x + mixed


class TiedHead(nn.Module):
    """Scores of an embedding's rows: the other use of a weight that belongs to the first piece."""

    mixes = unaligned = False

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = [table]  # in a list: not a second name of the module

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.table[0].weight)


class SharedWeight(nn.Module):
    """Two layers, one weight."""

    mixes = unaligned = False
    flat = True

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, features), nn.Linear(features, features)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class TorchAttention(nn.Module):
    """Its projections have no forward of their own, and with a zero among the keys no adapter either."""

    mixes = unaligned = False

    def __init__(self, features: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(features, 1, batch_first=True, add_zero_attn=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class _OwnGRU(nn.GRU):
    """No adapter's map."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, state = super().forward(x)
        return out + 0.5, state


class Recurrent(nn.Module):
    mixes = unaligned = False

    def __init__(self, features: int) -> None:
        super().__init__()
        self.cell = _OwnGRU(features, features, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]
