"""The nets of the experiments, all small enough to read; ``build_model`` makes one by name."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common.config import ConfigError, check_keys

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}


def mlp(sizes: Sequence[int] = (64, 128, 128, 10), activation: str = "relu") -> nn.Module:
    """Fully connected net of the layer widths ``sizes``; inputs of any shape are flattened."""
    layers: list[nn.Module] = [nn.Flatten()]
    for index, (in_dim, out_dim) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(in_dim, out_dim))
        if index + 2 < len(sizes):
            layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


def deep_linear(in_dim: int = 64, out_dim: int = 10, width: int = 100, num_layers: int = 6) -> nn.Module:
    """``num_layers`` linear layers without activation, the net of the damping study by Fujimori et al."""
    return mlp([in_dim] + [width] * (num_layers - 1) + [out_dim], activation="identity")


def hdeep(in_dim: int = 64, out_dim: int = 10, width: int = 32, num_layers: int = 8) -> nn.Module:
    """A deep narrow ReLU net that plain gradient descent hardly trains: its signals shrink from layer to layer."""
    return mlp([in_dim] + [width] * (num_layers - 1) + [out_dim])


def autoencoder(
    sizes: Sequence[int] = (784, 1000, 500, 250, 30), activation: str = "tanh", code_activation: str = "identity"
) -> nn.Module:
    """Deep autoencoder, ``sizes`` down to the code and back (Hinton & Salakhutdinov 2006); returns pixel logits."""
    encoder, decoder = mlp(sizes, activation), mlp(tuple(reversed(sizes)), activation)
    return nn.Sequential(encoder, ACTIVATIONS[code_activation](), decoder)


def small_cnn(in_channels: int = 1, num_classes: int = 10, width: int = 16, image_size: int = 8) -> nn.Module:
    """Two 3×3 convolutions (the second of stride 2) and one linear layer."""
    first, second = nn.Conv2d(in_channels, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
    features = 2 * width * ((image_size + 1) // 2) ** 2
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(features, num_classes))


def lenet5(in_channels: int = 3, num_classes: int = 10, image_size: int = 32) -> nn.Module:
    """LeNet5 with ReLU and max-pooling, as used for CIFAR-10 in the K-FAC literature."""
    reduced = ((image_size - 4) // 2 - 4) // 2
    layers = [nn.Conv2d(in_channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, *mlp([16 * reduced * reduced, 120, 84, num_classes]))


class ToColour32(nn.Module):
    """Images as three channels of 32 × 32: 8 × 8 enlarged, 28 × 28 with a border of zeros; no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] <= 16:
            x = functional.interpolate(x, size=(32, 32), mode="nearest")
        border = (32 - x.shape[-1]) // 2
        x = functional.pad(x, (border, border, border, border))
        return x if x.shape[1] == 3 else x.repeat(1, 3, 1, 1)


def spectrum_cnn(num_classes: int = 10) -> nn.Module:
    """The CNN of the spectrum study by Ishii and Yokota, 1952 parameters: two convolutions, three linear layers."""
    layers = [nn.Conv2d(3, 4, 5, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 5), nn.ReLU(), nn.MaxPool2d(2)]
    linear = [nn.Linear(150, 6, bias=False), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, num_classes)]
    return nn.Sequential(ToColour32(), *layers, nn.Flatten(), *linear)


def conv4_fc3(in_channels: int = 3, image_size: int = 32, width: int = 16, num_classes: int = 10) -> nn.Module:
    """Four 3×3 convolutions with two poolings, and three linear layers, as in the gradient study's CIFAR-10 net."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((in_channels, width), (width, 2 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    features = 2 * width * (image_size // 4) ** 2
    return nn.Sequential(*layers, *mlp([features, 128, 64, num_classes]))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and a shortcut (He et al. 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


def resnet18(num_classes: int = 10, width: int = 64, in_channels: int = 3) -> nn.Module:
    """ResNet18 for 32 × 32 images: a 3×3 stem without pooling, four stages of two blocks."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    channels = width
    for stage in range(4):
        out_channels = width * 2**stage
        layers.append(ResidualBlock(channels, out_channels, stride=1 if stage == 0 else 2))
        layers.append(ResidualBlock(out_channels, out_channels, stride=1))
        channels = out_channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class CausalAttention(nn.Module):
    """Multi-head causal self-attention, ``[batch, time, width]`` to the same shape."""

    def __init__(self, width: int, num_heads: int, fused_qkv: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_qkv = fused_qkv
        if fused_qkv:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        parts = self.qkv(x).chunk(3, dim=-1) if self.fused_qkv else (self.query(x), self.key(x), self.value(x))
        query, key, value = (part.reshape(batch, time, self.num_heads, -1).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class TransformerBlock(nn.Module):
    """Pre-norm attention and a feed-forward part of four times the width."""

    def __init__(self, width: int, num_heads: int, fused_qkv: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalAttention(width, num_heads, fused_qkv)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Decoder-only transformer: tokens ``[batch, time]`` to logits ``[batch, time, vocabulary]``."""

    def __init__(
        self,
        vocabulary: int = 65,
        context: int = 128,
        num_layers: int = 4,
        width: int = 256,
        num_heads: int = 4,
        fused_qkv: bool = False,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ConfigError(f"key 'model.width' must be a multiple of num_heads {num_heads}, got {width}.")
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, num_heads, fused_qkv) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(_init_gpt_)
        for block in self.blocks:  # residual branches share the variance of the sum (Radford et al. 2019)
            for layer in (block.attention.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / (2 * num_layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _init_gpt_(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


MODELS: dict[str, Callable[..., nn.Module]] = {
    make.__name__.lower(): make
    for make in (mlp, deep_linear, hdeep, autoencoder, small_cnn, lenet5, spectrum_cnn, conv4_fc3, resnet18, GPT)
}


def build_model(config: Mapping[str, Any], seed: int) -> nn.Module:
    """The net ``config["name"]`` with the other keys as its arguments; weights depend on ``seed`` alone.

    The global random state is left as it was.
    """
    check_model(config)
    options = dict(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[options.pop("name")](**options)


def check_model(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for an unknown name, argument or activation, and for sizes below 1."""
    options = dict(config)
    name = options.pop("name", None)
    if name not in MODELS:
        raise ConfigError(f"key 'model.name' must be one of {', '.join(MODELS)}, got {name!r}.")
    check_keys(options, list(inspect.signature(MODELS[name]).parameters), "model")
    for key, value in options.items():
        if key.endswith("activation"):
            if value not in ACTIVATIONS:
                raise ConfigError(f"key 'model.{key}' must be one of {', '.join(ACTIVATIONS)}, got {value!r}.")
        elif not all(isinstance(size, int) and (size >= 1 or size is False) for size in _as_list(value)):
            raise ConfigError(f"key 'model.{key}' must be whole numbers >= 1, got {value!r}.")


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
