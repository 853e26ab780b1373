"""One small network of every kind, for the batteries that each of them must pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.support import Lambda, Sequence, Twice, pool

Case = tuple[nn.Module, Tensor, Tensor]
DOUBLE = torch.float64


class Tied(nn.Module):
    """Embedding and decoder share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle, self.decoder = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.middle(self.embedding(x).mean(1))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.head = (
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.LayerNorm(4),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Unused(nn.Module):
    """A spare layer, and a bare parameter that scales the output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.spare, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.head(torch.tanh(self.inner(x)))


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def convolutional(**options) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, **options), nn.Tanh(), Lambda(pool), nn.Linear(4, 3))


def images(count: int) -> Tensor:
    return torch.randn(count, 2, 5, 5, dtype=DOUBLE)


def vectors(count: int) -> Tensor:
    return torch.randn(count, 4, dtype=DOUBLE)


def sequences(count: int) -> Tensor:
    return torch.randn(count, 3, 4, dtype=DOUBLE)


def tokens(count: int) -> Tensor:
    return torch.randint(5, (count, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], int]] = {
    "linear": (lambda: nn.Linear(4, 3), vectors, 3),
    "mlp, in-place relu": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), vectors, 3),
    "mlp, no bias": (
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)),
        vectors,
        3,
    ),
    "sequence": (lambda: Sequence(4, 4, 3), sequences, 3),
    "tokens": (lambda: Sequence(4, 4, 3, per_token=True), sequences, 3),
    "convolution": (convolutional, images, 3),
    "convolution, padded and strided": (lambda: convolutional(padding=1, stride=2), images, 3),
    "convolution, same": (lambda: convolutional(padding="same"), images, 3),
    "convolution, dilated": (lambda: convolutional(dilation=2, padding=1), images, 3),
    "convolution, grouped": (lambda: convolutional(groups=2), images, 3),
    "convolution, no bias": (lambda: convolutional(bias=False), images, 3),
    "convolution, norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), Lambda(pool), nn.Linear(4, 3)),
        images,
        3,
    ),
    "segmentation": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)), images, 3),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)), vectors, 3),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), Lambda(lambda h: h.mean(1)), nn.Linear(4, 3)),
        tokens,
        3,
    ),
    "called twice": (Twice, vectors, 3),
    "frozen layer": (
        lambda: frozen(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), "0.weight", "0.bias"),
        vectors,
        3,
    ),
    "frozen bias": (lambda: frozen(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), "0.bias"), vectors, 3),
    "frozen weight": (
        lambda: frozen(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), "0.weight"),
        vectors,
        3,
    ),
    "unused layer": (Unused, vectors, 3),
    "attention": (Attention, sequences, 3),
    "lstm": (Recurrent, sequences, 3),
    "tied weights": (Tied, tokens, 5),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Tanh(), Lambda(pool), nn.Linear(3, 3)),
        images,
        3,
    ),
}

KRONECKER_ONLY = [name for name in NETWORKS if name not in ("frozen weight", "unused layer", "tied weights")]
"""Networks whose blocks are all made of per-example sums: their ``exact`` estimates are exact."""

ONE_TERM_PER_ROW = [name for name in KRONECKER_ONLY if name != "segmentation"]


def build(name: str, examples: int = 4) -> Case:
    """The network in float64, inputs and labels in the shape that its outputs ask for."""
    torch.manual_seed(sum(name.encode()))
    make, inputs, classes = NETWORKS[name]
    model, x = make().to(DOUBLE), inputs(examples)
    shape = {"tokens": (examples, 3), "segmentation": (examples, 5, 5)}.get(name, (examples,))
    return model, x, torch.randint(classes, shape)


def loss(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy over all terms: classes last in sequences, at dimension 1 in images."""
    if outputs.dim() == 3:
        return nn.functional.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), y.reshape(-1))
    return nn.functional.cross_entropy(outputs, y)
