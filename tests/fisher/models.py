"""Small models in float64 that are each unusual in one way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import Sequence, Twice


class TimeFirst(nn.Module):
    """A linear layer that sees positions in front of the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))


class Folded(nn.Module):
    """A linear layer that sees examples and positions in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x.reshape(-1, 3)))
        return self.head(hidden.reshape(x.shape[0], -1, 4).mean(1))


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class WeightReused(nn.Module):
    """A layer whose weight is used a second time without its module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(torch.tanh(self.inner(x)), self.inner.weight))


class WithParameter(nn.Module):
    """A parameter without a module of its own, and a layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        self.inner, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


class Attention(nn.Module):
    """``nn.MultiheadAttention``, whose output projection never runs as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.attention(x, x, x)[0]).mean(1))


class Recurrent(nn.Module):
    """A recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(3, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class Branching(nn.Module):
    """Control flow on values, which cannot be vectorised over examples, around a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = [row * self.scale if float(row.sum()) > 0 else row / self.scale for row in x]
        return self.head(torch.stack(rows))


class TokenModel(nn.Module):
    """Embedding (with a padding token) to one class per token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        return self.head(torch.tanh(hidden + hidden.cumsum(1)))


class Residual(nn.Module):
    """Convolution, batch normalization in evaluation mode, in-place activation, residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2, bias=False)
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.inner = nn.Conv2d(4, 4, 3, padding="same", dilation=2)
        self.head = nn.Linear(4, 3)
        self.norm.running_mean.uniform_(-0.5, 0.5)
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.norm(self.conv(x)))
        return self.head((hidden + self.act(self.inner(hidden))).mean((2, 3)))


def frozen_part() -> nn.Module:
    """Frozen weight with a trainable bias, and a frozen layer."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    net[0].weight.requires_grad_(False)
    net[2].requires_grad_(False)
    return net


def normalized_weight() -> nn.Module:
    """A parametrized weight, whose operation has no forward-mode derivative."""
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


def instance_norm() -> nn.Module:
    """An in-place activation on a view: the layer's output leaves the graph that leads to the logits."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.InstanceNorm2d(3, affine=True), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 3)
    )


class Encoder(nn.Module):
    """A transformer layer, which has a fast path for inference that cannot be differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Square(torch.autograd.Function):
    """An operation in the older form, which ``torch.func`` cannot transform."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class CustomFunction(nn.Module):
    """Such an operation behind a layer and a bare parameter, and a layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 1.0]))
        self.inner, self.head, self.unused = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Square.apply(self.inner(x) * self.scale))


def lenet_like() -> nn.Module:
    """Two convolutions, in-place activations and max-pooling, two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 3, 2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(12, 4, bias=False),
        nn.Tanh(),
        nn.Linear(4, 3),
    )


def make(name: str) -> tuple[nn.Module, Tensor]:
    """The model in float64 and evaluation mode, and five inputs."""
    torch.manual_seed(3)
    builders = {
        "lenet": (lenet_like, (1, 8, 8)),
        "residual": (Residual, (2, 6, 6)),
        "twice": (Twice, (4,)),
        "sequence": (Sequence, (3, 3)),
        "time_first": (TimeFirst, (5, 3)),
        "folded": (Folded, (2, 3)),
        "tied": (Tied, (4,)),
        "weight_reused": (WeightReused, (4,)),
        "parameter": (WithParameter, (4,)),
        "attention": (Attention, (3, 4)),
        "recurrent": (Recurrent, (3, 3)),
        "branching": (Branching, (4,)),
        "frozen": (frozen_part, (4,)),
        "weight_norm": (normalized_weight, (4,)),
        "instance_norm": (instance_norm, (1, 4, 4)),
        "encoder": (Encoder, (3, 4)),
        "custom_function": (CustomFunction, (4,)),
    }
    build, shape = builders[name]
    model = build().double().eval()
    return model, torch.randn(5, *shape, dtype=torch.float64)


NAMES = (
    "lenet", "residual", "twice", "sequence", "time_first", "folded", "tied", "weight_reused", "parameter", "attention",
    "recurrent", "branching", "frozen", "weight_norm", "instance_norm", "encoder", "custom_function",
)  # fmt: skip
